"""What every test has in common: one thread, no network, a fixed seed, the material beside the project."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pyro
import pytest
import torch

TESTS = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("LMPPL_SHARED") or TESTS.parents[1] / "shared")
MARKER_OF_FOLDER = {"statistical": "slow", "benchmarks": "benchmark"}

torch.set_num_threads(1)
hypothesis.settings.register_profile("lmppl", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("lmppl")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder and by their use of `shared`; skip what needs an absent folder."""
    absent = pytest.mark.skip(reason=f"needs the shared material: no folder {SHARED} (or set LMPPL_SHARED)")
    for item in items:
        if " at 0x" in item.nodeid:  # workers collect in processes of their own, and must find equal names
            raise pytest.UsageError(f"{item.nodeid}: the name holds an address; give the parameters `ids`")
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in MARKER_OF_FOLDER:
            item.add_marker(MARKER_OF_FOLDER[folder])
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(absent)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real language models and texts; a test that uses it carries the marker `shared`."""
    return SHARED


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
