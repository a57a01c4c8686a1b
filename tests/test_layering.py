"""Who may import whom: the paragraph of the design, enforced on the syntax tree of every file in lmppl/."""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[1]

# A unit is a module or package directly under lmppl/; "lmppl" is its __init__.py.
GROUND = {"errors", "sequences", "storage"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "sequences": GROUND,
    "storage": GROUND,
    "diagnostics": {"errors", "sequences"},
    "lm": GROUND,
    "modeling": GROUND | {"lm"},
    "inference": GROUND | {"lm", "modeling", "diagnostics"},
    "distributed": GROUND | {"lm", "modeling", "inference"},
    "comparison": GROUND | {"lm", "modeling", "inference", "diagnostics"},
    "cli": GROUND | {"lm", "modeling", "inference", "comparison", "lmppl"},
    "__main__": {"cli"},
    "lmppl": GROUND | {"lm", "modeling", "inference", "diagnostics", "comparison"},
}
MAY_IMPORT["testing"] = {*MAY_IMPORT, "testing"}
UNITS = set(MAY_IMPORT)
IMPORTS_DISTRIBUTED_LAZILY = "lmppl/inference/run.py"  # where the run loop is, which is what an executor replaces

HUGGING_FACE_PLACES = (
    "lmppl/lm/",
    "lmppl/modeling/evidence/reward.py",
    "lmppl/modeling/evidence/preference/",
    "lmppl/inference/variational/",
    "lmppl/distributed/",
)
PLACES_OF_LIBRARY = {
    "networkx": ("lmppl/modeling/graph.py",),
    "pyro": (
        "lmppl/lm/",
        "lmppl/modeling/program.py",
        "lmppl/modeling/evidence/preference/",
        "lmppl/inference/pyro_bridge.py",
    ),
    "transformers": HUGGING_FACE_PLACES,
    "peft": HUGGING_FACE_PLACES,
    "accelerate": HUGGING_FACE_PLACES,
}
LIBRARIES_OF_DIAGNOSTICS = {"arviz_stats", "numpy", "scipy", "torch"}


class Import(NamedTuple):
    """One imported name with its line; `lazy` when it is not executed on import of the file."""

    name: str
    line: int
    lazy: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import of a file: statements anywhere in it, and `import_module("...")` with a literal name."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, lazy) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                prefix = "." * level + (f"{module}." if module else "")
                yield from (Import(prefix + alias.name, node.lineno, lazy) for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str() as name), *_],
            ):
                yield Import(name, node.lineno, lazy)
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for child in node.body:
                    yield from visit(child, True)
                for child in node.orelse:
                    yield from visit(child, lazy)
                return
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    return visit(tree, False)


def unit_of(path: str) -> str:
    """The unit that a file belongs to: `lmppl/lm/base.py` is of `lm`, `lmppl/__init__.py` of `lmppl`."""
    first = PurePosixPath(path).parts[1].removesuffix(".py")
    return "lmppl" if first == "__init__" else first


def complaint(path: str, found: Import) -> str | None:
    """What is wrong with one import in the file `path`, or None."""
    if found.name.startswith("."):
        return f"relative import {found.name}: write the absolute one"
    unit, parts = unit_of(path), found.name.split(".")
    if parts[0] != "lmppl":
        library = parts[0]
        if unit == "testing":
            return None
        if library in PLACES_OF_LIBRARY and not path.startswith(PLACES_OF_LIBRARY[library]):
            return f"imports {library}, which only {', '.join(PLACES_OF_LIBRARY[library])} may"
        if unit == "diagnostics" and library not in LIBRARIES_OF_DIAGNOSTICS | sys.stdlib_module_names:
            return f"imports {library}: diagnostics needs numerical libraries only"
        return None
    imported = parts[1] if len(parts) > 1 and parts[1] in UNITS else "lmppl"
    if path == IMPORTS_DISTRIBUTED_LAZILY and imported == "distributed":
        return None if found.lazy else "imports lmppl.distributed eagerly: import it where it is used"
    if imported != unit and imported not in MAY_IMPORT[unit]:
        return f"{unit} imports {found.name}, but may import only {sorted(MAY_IMPORT[unit])}"
    return None


def defines_all(tree: ast.Module) -> bool:
    """Whether a module assigns a literal list of strings to `__all__`."""
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List() | ast.Tuple() as names)
                | ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.List() | ast.Tuple() as names)
            ):
                return all(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in names.elts)
    return False


def violations(sources: Mapping[str, str]) -> list[str]:
    """Every breach of the design in files given as path -> source, `path:line: what is wrong`."""
    found = []
    for path, source in sources.items():
        tree = ast.parse(source, path)
        if unit_of(path) not in UNITS:
            found.append(f"{path}:1: has no place in the order of the design")
            continue
        wrong = ((one.line, complaint(path, one)) for one in imports(tree))
        found += [f"{path}:{line}: {message}" for line, message in wrong if message]
        if path.endswith("/__init__.py") and not defines_all(tree):
            found.append(f"{path}:1: a package defines __all__, a literal list of names")
    packages = {str(PurePosixPath(path).parent) for path in sources}
    found += [f"{p}/:1: has no __init__.py" for p in sorted(packages) if f"{p}/__init__.py" not in sources]
    return found


def read(project: Path) -> dict[str, str]:
    files = sorted((project / "lmppl").rglob("*.py"))
    return {file.relative_to(project).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_the_library_keeps_the_order() -> None:
    sources = read(PROJECT)
    assert "lmppl/errors.py" in sources
    assert violations(sources) == []


# A small house with everything that is allowed, so that a mutant below differs from it in one breach.
HOUSE = {
    "lmppl/__init__.py": "from lmppl.comparison.run import compare\n__all__ = ['compare']",
    "lmppl/__main__.py": "from lmppl.cli import main",
    "lmppl/errors.py": "import logging",
    "lmppl/sequences.py": "import torch\nfrom lmppl import errors, storage",
    "lmppl/storage.py": "import lmppl.sequences\nfrom safetensors.torch import save_file",
    "lmppl/cli.py": "import lmppl, typer\nfrom lmppl import infer, modeling, comparison",
    "lmppl/lm/__init__.py": "__all__ = ()",
    "lmppl/lm/base.py": "import pyro.distributions, transformers\nfrom lmppl import storage",
    "lmppl/modeling/__init__.py": "__all__ = ['a', 'b']",
    "lmppl/modeling/graph.py": "import networkx as nx\nfrom lmppl.lm.base import LanguageModel",
    "lmppl/modeling/program.py": "from pyro import poutine",
    "lmppl/modeling/evidence/__init__.py": "__all__: list[str] = []",
    "lmppl/modeling/evidence/reward.py": "def load():\n    import transformers",
    "lmppl/modeling/evidence/preference/__init__.py": "__all__ = []",
    "lmppl/modeling/evidence/preference/sampling.py": "import pyro\nimport transformers",
    "lmppl/inference/__init__.py": "__all__ = []",
    "lmppl/inference/run.py": "def run():\n    from lmppl.distributed import serial\n    return serial",
    "lmppl/inference/smc.py": "from lmppl.diagnostics import weights\nimport lmppl.inference.engine",
    "lmppl/inference/pyro_bridge.py": "import pyro.infer",
    "lmppl/inference/variational/__init__.py": "__all__ = []",
    "lmppl/inference/variational/trainer.py": "import accelerate\nimport peft",
    "lmppl/diagnostics/__init__.py": "__all__ = []",
    "lmppl/diagnostics/weights.py": "import math, arviz_stats, numpy, scipy.stats, torch, lmppl.errors",
    "lmppl/comparison/__init__.py": "__all__ = []",
    "lmppl/comparison/run.py": "import rich, lmppl.inference.smc, lmppl.diagnostics.weights",
    "lmppl/distributed/__init__.py": "__all__ = []",
    "lmppl/distributed/serial.py": "import accelerate\nfrom lmppl.errors import LmpplError",
    "lmppl/testing/__init__.py": "import lmppl.cli, networkx, pyro, pytest, peft\n__all__ = []",
}

MUTANTS = [
    # errors, sequences <- lm <- modeling <- inference <- comparison <- cli
    ("lmppl/errors.py", "from lmppl.sequences import Draws", "errors imports"),
    ("lmppl/sequences.py", "import lmppl.lm.base", "sequences imports"),
    ("lmppl/storage.py", "from lmppl import lm", "storage imports"),
    ("lmppl/lm/base.py", "from lmppl.modeling.model import Model", "lm imports"),
    ("lmppl/lm/base.py", "import lmppl.inference", "lm imports"),
    ("lmppl/modeling/model.py", "from lmppl.inference.run import infer", "modeling imports"),
    ("lmppl/modeling/model.py", "def f():\n    from lmppl.inference.run import infer", "modeling imports"),
    ("lmppl/modeling/evidence/moments.py", "from lmppl import inference", "modeling imports"),
    ("lmppl/modeling/model.py", "from lmppl.comparison import run", "modeling imports"),
    ("lmppl/inference/smc.py", "import lmppl.comparison.run as run", "inference imports"),
    ("lmppl/inference/smc.py", "if TYPE_CHECKING:\n    from lmppl.cli import app", "inference imports"),
    ("lmppl/comparison/run.py", "from lmppl.cli import app", "comparison imports"),
    ("lmppl/comparison/run.py", "import lmppl", "comparison imports"),
    ("lmppl/lm/base.py", "from lmppl import Reward", "lm imports"),
    (
        "lmppl/modeling/model.py",
        "importlib.import_module('lmppl.inference')",
        "modeling imports",
    ),
    ("lmppl/modeling/model.py", "__import__('lmppl.cli')", "modeling imports"),
    ("lmppl/__init__.py", "import lmppl.cli\n__all__ = []", "lmppl imports"),
    # diagnostics: errors, sequences and numerical libraries; for inference and comparison
    ("lmppl/diagnostics/weights.py", "from lmppl.lm.base import LanguageModel", "diagnostics imports"),
    ("lmppl/diagnostics/weights.py", "from lmppl.storage import load", "diagnostics imports"),
    ("lmppl/diagnostics/weights.py", "from lmppl.inference import approximation", "diagnostics imports"),
    ("lmppl/diagnostics/weights.py", "def f():\n    import pandas", "numerical libraries"),
    ("lmppl/diagnostics/weights.py", "from rich.table import Table", "numerical libraries"),
    ("lmppl/diagnostics/weights.py", "import pyro", "imports pyro"),
    ("lmppl/sequences.py", "from lmppl.diagnostics import weights", "sequences imports"),
    ("lmppl/lm/base.py", "from lmppl.diagnostics import weights", "lm imports"),
    ("lmppl/modeling/model.py", "from lmppl.diagnostics import weights", "modeling imports"),
    ("lmppl/cli.py", "from lmppl.diagnostics import weights", "cli imports"),
    # distributed: inference/run.py, lazily
    ("lmppl/inference/run.py", "from lmppl.distributed import serial", "eagerly"),
    ("lmppl/inference/run.py", "class A:\n    import lmppl.distributed", "eagerly"),
    (
        "lmppl/inference/run.py",
        "if True:\n    from lmppl import distributed",
        "eagerly",
    ),
    ("lmppl/inference/smc.py", "def f():\n    import lmppl.distributed", "inference imports"),
    ("lmppl/inference/engine.py", "def f():\n    import lmppl.distributed", "inference imports"),
    ("lmppl/comparison/run.py", "def f():\n    from lmppl import distributed", "comparison imports"),
    ("lmppl/__init__.py", "from lmppl import distributed\n__all__ = []", "lmppl imports"),
    ("lmppl/distributed/serial.py", "from lmppl.comparison import run", "distributed imports"),
    # nothing imports testing
    ("lmppl/__init__.py", "from lmppl import testing\n__all__ = []", "lmppl imports"),
    ("lmppl/cli.py", "def f():\n    from lmppl.testing import check_factor", "cli imports"),
    ("lmppl/comparison/run.py", "from lmppl.testing import reference", "comparison imports"),
    ("lmppl/distributed/serial.py", "import lmppl.testing", "distributed imports"),
    # networkx, pyro, transformers, peft, accelerate
    ("lmppl/modeling/model.py", "import networkx", "imports networkx"),
    ("lmppl/lm/base.py", "from networkx.algorithms import dag", "imports networkx"),
    ("lmppl/modeling/factors.py", "import pyro", "imports pyro"),
    ("lmppl/modeling/evidence/reward.py", "from pyro.distributions import Normal", "imports pyro"),
    ("lmppl/inference/smc.py", "def f():\n    import pyro.infer", "imports pyro"),
    ("lmppl/inference/variational/svi.py", "import pyro", "imports pyro"),
    (
        "lmppl/sequences.py",
        "if TYPE_CHECKING:\n    import transformers",
        "imports transformers",
    ),
    ("lmppl/modeling/evidence/constraint.py", "import transformers", "imports transformers"),
    ("lmppl/inference/smc.py", "from transformers.cache_utils import DynamicCache", "imports transformers"),
    ("lmppl/inference/mcmc.py", "import peft", "imports peft"),
    ("lmppl/comparison/run.py", "import accelerate", "imports accelerate"),
    ("lmppl/cli.py", "def f():\n    import transformers", "imports transformers"),
    # absolute imports, __all__, a place for everything
    ("lmppl/lm/tabular.py", "from .base import LanguageModel", "relative import"),
    ("lmppl/inference/smc.py", "from . import engine", "relative import"),
    ("lmppl/testing/reference.py", "from ..lm import tabular", "relative import"),
    ("lmppl/lm/__init__.py", "from lmppl.lm.base import LanguageModel", "__all__"),
    ("lmppl/lm/__init__.py", "__all__ = [name for name in dir()]", "__all__"),
    ("lmppl/lm/__init__.py", "__all__: list[str]", "__all__"),
    ("lmppl/lm/__init__.py", "__all__ = ['a', 1]", "__all__"),
    ("lmppl/lm/__init__.py", "def f():\n    __all__ = []", "__all__"),
    ("lmppl/__init__.py", "", "__all__"),
    ("lmppl/inference/mcmc/kernels.py", "", "no __init__.py"),
    ("lmppl/utils.py", "", "no place"),
    ("lmppl/helpers/__init__.py", "__all__ = []", "no place"),
]


def test_the_rules_allow_what_the_design_allows() -> None:
    assert violations(HOUSE) == []


@pytest.mark.parametrize(("path", "source", "words"), MUTANTS)
def test_every_breach_is_found(path: str, source: str, words: str) -> None:
    found = violations({**HOUSE, path: source})
    assert len(found) == 1, found
    assert found[0].startswith(path.rpartition("/")[0])
    assert words in found[0]
