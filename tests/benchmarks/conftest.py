"""What benchmarks on random Llamas share: folders with the models, and one thread, as the peers have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.benchmarks.measuring import single_thread
from tests.benchmarks.random_llama import make_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the model of a size, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(size: str) -> Path:
        if size not in made:
            made[size] = make_folder(size, tmp_path_factory.mktemp(size))
        return made[size]

    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch."""
    with single_thread():
        yield
