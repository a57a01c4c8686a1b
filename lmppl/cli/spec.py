"""Spec files: a Python file that builds a model, loaded for the command line.

The file is run as a script is: its folder is on the import path, and `__file__` is set. What it prints goes to
stderr, so that stdout carries results only.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lmppl.errors import SpecError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.model import Model

__all__ = ["Spec", "add_import_folders", "load_spec"]

MODULE = "lmppl_spec"


@dataclass(frozen=True)
class Spec:
    """A loaded spec file.

    Parameters
    ----------
    path : Path
    name : str
        The variable that holds the model.
    model : Model
    engines : tuple
        The file's list `engines`, empty where it has none.
    """

    path: Path
    name: str
    model: Model
    engines: tuple[Any, ...] = ()


def load_spec(text: str) -> Spec:
    """The model of `SPEC.py` or `SPEC.py:name`.

    Without a name it is the variable `model`, or the only `Model` of the file. A bare language model counts as the
    model without evidence where it is named or called `model`.

    Raises
    ------
    SpecError
        Where the file is missing or raises (with its own line), or where no model, or more than one, is found.
    """
    path, name = _split(text)
    _require_file(path)
    module = _run(path)
    chosen = name or _only_model(module, path)
    if not hasattr(module, chosen):
        close = difflib.get_close_matches(chosen, _models(module), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SpecError(f"{path}: has no variable {chosen!r}{hint}; {_candidates(module)}")
    value = getattr(module, chosen)
    if isinstance(value, LanguageModel):
        value = Model(value)
    if not isinstance(value, Model):
        raise SpecError(
            f"{path}: {chosen} is of type {type(value).__name__}, expected a model, prior * factor; "
            f"{_candidates(module)}"
        )
    return Spec(path, chosen, value, _engines(module, path))


def add_import_folders(text: str) -> None:
    """Put the folder of the spec file, and the working folder, on the import path, as running a script would."""
    for folder in (Path.cwd(), _split(text)[0].resolve().parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def _split(text: str) -> tuple[Path, str]:
    head, colon, tail = text.rpartition(":")
    if colon and tail.isidentifier() and not Path(text).exists():
        return Path(head), tail
    return Path(text), ""


def _require_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise SpecError(f"{path}: is a folder, expected a Python file that builds a model")
    others = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, others, n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    raise SpecError(f"{path}: there is no such file{hint}")


def _run(path: Path) -> ModuleType:
    module = ModuleType(MODULE)
    module.__file__ = str(path)
    add_import_folders(str(path))
    sys.modules[MODULE] = module  # dataclasses and pickle look a class up by its module
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        line = f"\n    {error.text.strip()}" if isinstance(error, SyntaxError) and error.text else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise SpecError(f"{path}{where}{line}\n{type(error).__name__}: {message}") from error
    with _at_its_line(path), contextlib.redirect_stdout(sys.stderr):
        exec(code, module.__dict__)
    return module


@contextlib.contextmanager
def _at_its_line(path: Path) -> Iterator[None]:
    """Turn whatever the spec raises into a `SpecError` that shows the spec's own last frame and the error itself."""
    try:
        yield
    except SystemExit as error:
        raise SpecError(
            f"{path}: it called sys.exit({error.code!r}); a spec file builds a model and returns"
        ) from error
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f", line {frames[-1].lineno}, in {frames[-1].name}\n    {frames[-1].line}" if frames else ""
        raise SpecError(f"{path}{place}\n{type(error).__name__}: {error}") from error


def _models(module: ModuleType) -> list[str]:
    return [k for k, v in vars(module).items() if isinstance(v, Model) and not k.startswith("_")]


def _only_model(module: ModuleType, path: Path) -> str:
    if hasattr(module, "model"):
        return "model"
    names = _models(module)
    if len(names) == 1:
        return names[0]
    looked = "looked for a variable `model`, or for the only Model in the file"
    raise SpecError(f"{path}: {looked}; {_candidates(module)}")


def _candidates(module: ModuleType) -> str:
    models = _models(module)
    if models:
        return f"it has {', '.join(models)}: write SPEC.py:{models[0]}"
    priors = [k for k, v in vars(module).items() if isinstance(v, LanguageModel) and not k.startswith("_")]
    if priors:
        name = priors[0]
        return f"it has no Model, only the language model {name}: write SPEC.py:{name}, or multiply it by factors"
    return "it has none; write model = prior * factor"


def _engines(module: ModuleType, path: Path) -> tuple[Any, ...]:
    listed = getattr(module, "engines", ())
    if not isinstance(listed, list | tuple):
        raise SpecError(
            f"{path}: `engines` is of type {type(listed).__name__}, expected a list of engines or of their names"
        )
    return tuple(listed)
