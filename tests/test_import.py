"""`import lmppl` is cheap and changes no global state; every public name is there."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(".".join(init.parent.relative_to(PROJECT).parts) for init in (PROJECT / "lmppl").rglob("__init__.py"))

# Each costs a tenth of a second or more, or belongs to an extra; all are imported where they are used.
HEAVY = (
    "accelerate",
    "arviz_stats",
    "datasets",
    "gguf",
    "lmppl.distributed",
    "lmppl.testing",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "ray",
    "scipy.stats",
    "sklearn",
    "transformers",
)

PROBE = """
import builtins, json, logging, os, random, signal, sys, warnings
import numpy, pyro, torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),
        "random generator": random.getstate(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "pyro param store": list(pyro.get_param_store().keys()),
        # A filter for a warning class of its own is a package's own business: scipy.special adds one.
        "warning filters": [f for f in warnings.filters if hasattr(builtins, f[2].__name__)],
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "environment": dict(os.environ),
        "import path": list(sys.path),
        "hooks": (sys.excepthook, sys.displayhook, signal.getsignal(signal.SIGINT)),
    }

def changed_by(action):
    before = state()
    exec(action, globals())
    after = state()
    return [name for name in before if before[name] != after[name]]
"""

MUTANTS = {
    "torch.set_default_dtype(torch.float64)": "default dtype",
    "torch.set_grad_enabled(False)": "gradient mode",
    "torch.set_num_threads(torch.get_num_threads() + 1)": "threads",
    "torch.use_deterministic_algorithms(True)": "deterministic algorithms",
    "torch.manual_seed(1)": "torch generator",
    "numpy.random.seed(1)": "numpy generator",
    "random.random()": "random generator",
    "pyro.enable_validation(False)": "validation of distributions",
    "pyro.param('theta', torch.zeros(1))": "pyro param store",
    "warnings.simplefilter('ignore')": "warning filters",
    "logging.basicConfig()": "root logger",
    "os.environ['TOKENIZERS_PARALLELISM'] = 'maybe'": "environment",
    "sys.path.append('.')": "import path",
    "signal.signal(signal.SIGINT, signal.SIG_IGN)": "hooks",
}


def probe(script: str) -> object:
    """What `script` prints as JSON in a fresh interpreter, after the definitions of PROBE."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE + script], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_changes_nothing_and_leaves_the_heavy_packages_alone() -> None:
    changed, modules = probe(
        "known = set(sys.modules)\n"
        "changed = changed_by('import lmppl')\n"
        "print(json.dumps([changed, sorted(set(sys.modules) - known)]))"
    )
    assert "lmppl" in modules
    assert changed == []
    assert [name for name in HEAVY if name in modules] == []


def test_the_probe_sees_every_kind_of_change() -> None:
    changed = probe(f"print(json.dumps([changed_by(action) for action in {list(MUTANTS)!r}]))")
    assert [kind for kind, seen in zip(MUTANTS.values(), changed, strict=True) if kind not in seen] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
