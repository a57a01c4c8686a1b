"""The content of a user function, as a digest: its code, and the values it was made with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from enum import Enum
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmppl.lm.base import LanguageModel
from lmppl.lm.hashing import hash_weights
from lmppl.storage import tensor_bytes

__all__ = ["code_digest", "content_digest"]

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, type(...))


def content_digest(fn: Callable[..., Any]) -> str:
    """Equal for functions of equal content, in every process of one Python version.

    Seen are compiled code, defaults, bound arguments, and the values that a function closes over: numbers, strings,
    regular expressions, enums, containers and dataclasses of those, arrays and tensors by their bytes, networks by
    their weights, language models by their fingerprints, functions by their own content. Of a callable object, and of
    the object of a bound method: the code and constants of its class, and its attributes. Of an object with a
    `fingerprint` that string stands for all this; of an estimator of the scikit-learn kind its attributes count, and of
    an object around a network, such as a pipeline, the weights. Of any other object only the type is seen; of global
    names, called functions among them, only the name.
    """
    return hashlib.sha256(_called(fn, ()).encode()).hexdigest()[:16]


def code_digest(code: CodeType) -> str:
    """sha256 of compiled code, nested functions included, without file names and line numbers."""
    parts = (code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, _constant(code.co_consts))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return code_digest(value)
    if isinstance(value, tuple):
        return repr([_constant(one) for one in value])
    # The order of a set differs from process to process.
    return repr(sorted(map(_constant, value))) if isinstance(value, frozenset) else repr(value)


def _called(fn: Any, above: tuple[int, ...]) -> str:
    """The function itself, not a value that it uses: an object then counts with its attributes.

    Objects that are merely used may be anything, and may change with use (pipelines count their calls).
    """
    if isinstance(fn, MethodType):
        return repr(("method", _contents(fn.__func__, above), _called(fn.__self__, above)))
    if isinstance(fn, BuiltinMethodType | FunctionType | functools.partial | LanguageModel | type):
        return _contents(fn, above)
    return _state(fn, above)


def _state(obj: Any, above: tuple[int, ...]) -> str:
    if isinstance(getattr(obj, "fingerprint", None), str):
        return f"{_type_name(obj)} {obj.fingerprint}"
    above = (*above, id(obj))
    members: list[tuple[str, str]] = []
    unseen: set[str] = set()
    for owner in type(obj).__mro__:
        if owner in (nn.Module, object):
            break
        for name, value in sorted(vars(owner).items()):
            if isinstance(value, functools.cached_property):
                unseen.add(name)  # fills an attribute on first use, which changes nothing
            code = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(code, FunctionType):
                members.append((name, _contents(code, above)))
            elif inspect.ismemberdescriptor(value):
                members.append((name, _contents(getattr(obj, name, None), above)))
            elif not name.startswith("__"):
                members.append((name, _contents(value, above)))
    if isinstance(obj, nn.Module):
        members.append(("weights", hash_weights(obj)))
        unseen |= {"_parameters", "_buffers", "_modules"}
    attributes = {name: value for name, value in getattr(obj, "__dict__", {}).items() if name not in unseen}
    members += [(name, _contents(value, above)) for name, value in sorted(attributes.items())]
    return repr((_type_name(obj), members))


def _contents(value: Any, above: tuple[int, ...]) -> str:
    if id(value) in above:
        return f"itself, {len(above) - above.index(id(value))} up"
    if type(value) in PLAIN:
        return f"{type(value).__name__} {value!r}"
    inner = (*above, id(value))
    if isinstance(value, Enum | re.Pattern):
        own = value.name if isinstance(value, Enum) else (value.pattern, value.flags)
        return repr((_type_name(value), own))
    if isinstance(value, FunctionType):
        return repr(_function(value, inner))
    if isinstance(value, MethodType):
        return repr(("method", _contents(value.__func__, inner), _contents(value.__self__, inner)))
    if isinstance(value, BuiltinMethodType):
        owner = None if inspect.ismodule(value.__self__) else _contents(value.__self__, inner)
        return repr((value.__module__, value.__qualname__, owner))
    if isinstance(value, functools.partial):
        bound = [_contents(value.args, inner), _contents(value.keywords, inner)]
        return repr(("partial", _called(value.func, inner), bound))
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, LanguageModel) or isinstance(getattr(value, "fingerprint", None), str):
        return f"{_type_name(value)} {value.fingerprint}"
    network = getattr(value, "model", None) if not isinstance(value, nn.Module) else value
    if isinstance(network, nn.Module):
        return f"{_type_name(value)} {hash_weights(network)}"
    if hasattr(value, "get_params"):
        return repr((_type_name(value), _estimator(value, inner)))
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return repr((_type_name(value), _array(value, inner)))
    return repr((_type_name(value), _parts(value, inner)))


def _function(fn: FunctionType, above: tuple[int, ...]) -> tuple[Any, ...]:
    values = [_contents(value, above) for value in (fn.__defaults__, fn.__kwdefaults__)]
    return (fn.__module__, fn.__qualname__, code_digest(fn.__code__), values, _cells(fn, above))


def _cells(fn: FunctionType, above: tuple[int, ...]) -> list[str]:
    found = []
    for cell in fn.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # assigned only after the function was made
            found.append("empty")
        else:
            found.append(_contents(value, above))
    return found


def _array(value: Tensor | np.ndarray[Any, Any] | np.generic, above: tuple[int, ...]) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        data: bytes | memoryview = tensor_bytes(dense)
    elif value.dtype.hasobject:  # its bytes are addresses
        return (value.shape, _contents(value.tolist(), above))
    else:
        data = value.tobytes()
    return (str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest())


def _parts(value: Any, above: tuple[int, ...]) -> list[Any] | None:
    """Of a container or a dataclass; None where an object is opaque."""
    if isinstance(value, list | tuple):
        return [_contents(one, above) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(_contents(one, above) for one in value)
    if isinstance(value, dict):
        return sorted((_contents(k, above), _contents(v, above)) for k, v in value.items())
    if dataclasses.is_dataclass(value):
        return [(field.name, _contents(getattr(value, field.name, None), above)) for field in dataclasses.fields(value)]
    return None


def _estimator(value: Any, above: tuple[int, ...]) -> list[tuple[str, str]]:
    """Of an object that was fitted: parameters and what was learned, trees and sparse matrices among it."""
    return [
        (name, _contents(_learned(one), above))
        for name, one in sorted(getattr(value, "__dict__", {}).items())
        if not (name.startswith("_") and name.endswith("_id"))  # vectorizers remember an address there
    ]


def _learned(value: Any) -> Any:
    """Arrays in place of a compiled object that holds them."""
    if hasattr(value, "tocoo"):
        triples = value.tocoo()
        return (triples.row, triples.col, triples.data, triples.shape)
    has_own_state = getattr(type(value), "__getstate__", None) is not vars(object)["__getstate__"]
    plain = isinstance(value, Tensor | np.ndarray | np.generic | nn.Module) or hasattr(value, "get_params")
    return value.__getstate__() if has_own_state and not plain else value


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"
