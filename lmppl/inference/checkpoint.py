"""Checkpoint: the finished parts of one run in a folder, so that a run that was stopped can go on.

A part is written whole or not at all. A run that goes on reads the parts that are there and computes the others, each
from its own seed (or from the state that the part before left), so that its draws are bit-identical to those of a run
that was never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from lmppl.errors import ModelError, StorageError, UnsupportedModel
from lmppl.inference.approximation import Approximation
from lmppl.inference.engine import Engine, Part, Shard
from lmppl.lm.base import LanguageModel
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Cost, Draws, Sequences
from lmppl.storage import atomic_write, hash_content, hash_tensors, pack, unpack, versions

__all__ = ["Checkpoint", "engine_identity"]

log = logging.getLogger(__name__)

FORMAT = "lmppl.checkpoint/2"
MANIFEST = "run.json"
SEQUENCES = ("ids", "lengths", "finished", "context")


class Checkpoint:
    """The parts of one run on disk.

    Parameters
    ----------
    folder : str or Path
        Made where it does not exist. It belongs to one run: one declaration, one engine with its configuration, one
        seed, one set of versions.
    engine, target, seed
        The run.

    Raises
    ------
    StorageError
        Where the folder holds another run, or its `run.json` is damaged: nothing there is touched.
    """

    def __init__(self, folder: str | Path, engine: Engine, target: Target, seed: int) -> None:
        self.folder = Path(folder)
        self.prior = target.prior
        self.identity = {
            "format": FORMAT,
            "model": model_identity(target.model),
            "spec_hash": target.model.spec_hash,
            "formula": target.model.formula,
            "engine": engine_identity(engine),
            "seed": seed,
            "versions": versions(),
        }
        if self.folder.exists() and not self.folder.is_dir():
            raise StorageError(f"checkpoint {self.folder}: it exists and is no folder; give another path")
        manifest = self.folder / MANIFEST
        if manifest.exists():
            _require_same(self.folder, _read_manifest(manifest), self.identity)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"checkpoint {self.folder}: cannot be made: {error.strerror or error}") from error
        if any(self.folder.iterdir()):
            raise StorageError(f"checkpoint {self.folder}: the folder is not empty and holds no run; give another path")
        atomic_write(manifest, lambda path: path.write_text(json.dumps(self.identity, indent=2), encoding="utf-8"))

    @property
    def num_parts(self) -> int:
        """How many whole parts lie there."""
        return len(list(self.folder.glob("part-*.safetensors")))

    def path(self, shard: Shard) -> Path:
        """Where the part of a shard lies."""
        return self.folder / f"part-{shard.id:06d}.safetensors"

    def save(self, part: Part) -> None:
        """Write a part, whole or not at all.

        Raises
        ------
        StorageError
            Where it cannot be written; parts written before stay.
        """
        tensors: dict[str, Tensor] = {}
        draws = part.draws
        content = {
            "shard": pack(dataclasses.asdict(part.shard), tensors, "shard"),
            "cost": pack(dict(part.cost.as_dict()), tensors, "cost"),
            "info": pack(dict(part.info), tensors, "info"),
            "draws": pack({name: getattr(draws, name) for name in _columns()}, tensors, "draws"),
        }
        content = {**content, "digest": hash_content(content, tensors)}
        stored = safetensors.torch.save(tensors, {"format": FORMAT, "content": json.dumps(content)})
        atomic_write(self.path(part.shard), lambda path: path.write_bytes(stored))

    def load(self, shard: Shard) -> Part | None:
        """The part of this very shard; None where there is none.

        A file that is damaged, or of a shard that was planned otherwise, is refused with a warning: the part is
        computed again, which gives the same draws.
        """
        path = self.path(shard)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            content = json.loads(metadata["content"])
            if content.pop("digest") != hash_content(content, tensors):
                raise ValueError("its digest is not that of its content")
            if unpack(content["shard"], tensors) != dataclasses.asdict(shard):
                log.warning("checkpoint %s is of a shard that was planned otherwise; it is computed again", path)
                return None
            return Part(
                shard,
                self._draws(unpack(content["draws"], tensors)),
                Cost(**unpack(content["cost"], tensors)),
                unpack(content["info"], tensors),
            )
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("checkpoint %s is damaged (%s) and not used; the part is computed again", path, error)
            return None

    def _draws(self, columns: dict[str, Any]) -> Draws:
        return Draws(**columns, prompts=self.prior.prompts, decoder=self.prior.decode)


def engine_identity(engine: Any) -> Any:
    """An engine (or another configuration) as plain data: equal exactly where it would compute the same.

    Fields that are language models or twists count by their `fingerprint`, tensors, draws and functions by their
    content (see `lmppl.modeling.function_contents`), approximations by their draws and, where they are one, their
    language model.

    Raises
    ------
    ModelError
        Naming a field that has no content hash: a run with it cannot be recognised again.
    """
    if engine is None or isinstance(engine, bool | int | float | str):
        return engine
    if isinstance(engine, Tensor):
        return f"tensor {hash_tensors({'': engine})[:16]}"
    if isinstance(engine, Sequences):
        columns = {name: getattr(engine, name) for name in SEQUENCES}
        log_weight = getattr(engine, "log_weight", None)
        if log_weight is not None:
            columns["log_weight"] = log_weight
        return f"sequences {hash_tensors(columns)[:16]}"
    fingerprint = getattr(engine, "fingerprint", None)
    if isinstance(fingerprint, str):
        return f"{type(engine).__name__} {fingerprint}"
    if isinstance(engine, Mapping):
        return {str(key): engine_identity(value) for key, value in engine.items()}
    if isinstance(engine, list | tuple):
        return [engine_identity(value) for value in engine]
    if isinstance(engine, Approximation):
        law = _law(engine)
        return {"draws": engine_identity(engine.draws)} | ({} if law is None else {"law": engine_identity(law)})
    if dataclasses.is_dataclass(engine) and not isinstance(engine, type):
        fields = {f.name: engine_identity(getattr(engine, f.name)) for f in dataclasses.fields(engine) if f.init}
        return {"type": f"{type(engine).__module__}.{type(engine).__qualname__}", **fields}
    if isinstance(engine, re.Pattern):
        return repr(engine)
    if isinstance(engine, FunctionType | MethodType):
        return f"function {content_digest(engine)}"
    raise ModelError(
        f"checkpoint: {type(engine).__name__} has no fingerprint, so that a run with it cannot be recognised again; "
        "give it a `fingerprint` (a string that changes with its content), or run without a checkpoint"
    )


def _law(approximation: Approximation) -> LanguageModel | None:
    try:
        return approximation.as_language_model()
    except UnsupportedModel:
        return None


def model_identity(model: Model) -> dict[str, Any]:
    """A declaration piece by piece, to say which one differs: the LM's fingerprint and a digest of each factor."""
    graph = model.graph.to_dict()
    factors = {}
    for factor, data in zip(model.factors, graph["factors"], strict=True):
        features = [one for one in graph["features"] if one["name"] in data["features"]]
        functions = [content_digest(f.fn) for f in factor.features if f.fingerprint is None]
        content = json.dumps([data, features, functions, content_digest(factor.log_factor)], sort_keys=True)
        factors[factor.name] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return {"lm": model.prior.fingerprint, "factors": factors}


def _columns() -> tuple[str, ...]:
    return (*SEQUENCES, "log_weight", "log_prior", "log_q", "features", "log_factors", "columns")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"checkpoint {path}: damaged ({error}); nothing there was touched: restore the file, or give another folder"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise StorageError(f"checkpoint {path}: expected format {FORMAT}; give another folder")
    return data


def _require_same(folder: Path, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = next((f for name in expected if (f := first_difference(got.get(name), expected[name], name))), None)
    if found is None:
        return
    match found.path:
        case ("model", "lm"):
            what = f"its LM is another one, or asked for other contexts: {found.got}, expected {found.expected}"
        case ("model", "factors", name, *_):
            there, here = found.got is not MISSING, found.expected is not MISSING
            what = f"its factor {name!r} is declared otherwise, or its function has other contents"
            if not (there and here):
                what = (
                    f"it has {'a' if there else 'no'} factor {name!r}, and this model has {'one' if here else 'none'}"
                )
        case path:
            what = f"its {'.'.join(path)} is {_shown(found.got)}, expected {_shown(found.expected)}"
    raise StorageError(
        f"checkpoint {folder} belongs to another run: {what}; give another folder, or delete this one to start again"
    )


class Difference(NamedTuple):
    """Where two pieces of plain data differ first, and what stands there; `MISSING` where nothing does."""

    path: tuple[str, ...]
    got: Any
    expected: Any


MISSING = object()


def first_difference(got: Any, expected: Any, *path: str) -> Difference | None:
    """The first field, in the order of `expected`, in which two pieces of plain data differ; None where they agree."""
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        both = ((key, got.get(key, MISSING), expected.get(key, MISSING)) for key in [*expected, *got])
        return next((f for key, a, b in both if (f := first_difference(a, b, *path, str(key)))), None)
    if isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        both = ((i, a, b) for i, (a, b) in enumerate(zip(got, expected, strict=True)))
        return next((f for i, a, b in both if (f := first_difference(a, b, *path, str(i)))), None)
    return None if got == expected else Difference(path, got, expected)


def _shown(value: Any) -> str:
    return "missing" if value is MISSING else repr(value)
