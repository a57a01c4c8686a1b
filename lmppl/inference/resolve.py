"""From what a user names to an engine: an instance, `'importance(num_draws=4096)'`, `package.module:Mine()`, None.

Text is read, never run: arguments are Python literals.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from lmppl.errors import ModelError, UnsupportedModel
from lmppl.inference.ais import AIS
from lmppl.inference.beam_search import Beam, Greedy
from lmppl.inference.best_of_n import BestOfN
from lmppl.inference.engine import Engine, Guarantee, require_instance
from lmppl.inference.exact import Exact
from lmppl.inference.importance import Importance
from lmppl.inference.mcmc import MCMC, Tempered
from lmppl.inference.pplm import PPLM
from lmppl.inference.quasi_rejection import QuasiRejection
from lmppl.inference.rejection import Rejection
from lmppl.inference.smc import SMC
from lmppl.inference.splitting import Splitting
from lmppl.inference.tempered_smc import TemperedSMC
from lmppl.inference.weighted_decoding import WeightedDecoding
from lmppl.modeling.target import TargetForm

__all__ = ["ENGINES", "parse_engine", "resolve_engine", "split_engines"]

ENGINES: tuple[type[Engine], ...] = (
    Exact,
    Rejection,
    Importance,
    SMC,
    AIS,
    TemperedSMC,
    Splitting,
    MCMC,
    Tempered,
    QuasiRejection,
    WeightedDecoding,
    PPLM,
    BestOfN,
    Greedy,
    Beam,
)
"""Every engine of lmppl, in the order of preference: exact, then approximate; heuristics last."""

_CALL = re.compile(r"(?:(?P<module>[\w.]+):)?(?P<name>[\w-]+)\s*(?P<arguments>\(.*\))?", re.DOTALL)


def resolve_engine(engine: Engine | str | None, form: TargetForm) -> Engine:
    """The engine that `engine` stands for.

    Parameters
    ----------
    engine : Engine, str or None
        An instance, which is returned as it is; text for `parse_engine`; or None for the first in `ENGINES` that can
        run on `form` with its default configuration. Where a factor knows something of prefixes, `SMC` comes before
        `Rejection`, which would write every text to its end. Heuristics sample another law than π*, so they are never
        chosen by default.
    form : TargetForm
        What the engine is to run on.

    Raises
    ------
    ModelError
        Where `engine` is a class, or text that names no engine.
    UnsupportedModel
        Where None was given and no engine can run, with the reason of each.
    """
    if isinstance(engine, str):
        return parse_engine(engine)
    if engine is not None:
        return require_instance(engine)
    reasons = []
    order: list[type[Engine]] = list(ENGINES)
    if form.incremental:
        order.remove(SMC)
        order.insert(order.index(Rejection), SMC)
    for kind in order:
        if kind.guarantee is Guarantee.HEURISTIC:
            continue
        candidate = kind()
        reason = candidate.unsupported_reason(form)
        if reason is None:
            return candidate
        reasons.append(f"  {kind.name}: {reason}")
    raise UnsupportedModel("no engine can run on this model:\n" + "\n".join(reasons))


def parse_engine(text: str) -> Engine:
    """An engine from text: `rejection`, `importance(4096)`, `importance(num_draws=4096)`, `package.module:Mine(k=3)`.

    Parameters
    ----------
    text : str
        The name of an engine in `ENGINES` (`best_of_n`, `best-of-n` and `BestOfN` are one), or `module:name` for a
        class or an instance elsewhere; then, in parentheses, Python literals for the fields of its configuration.

    Raises
    ------
    ModelError
        Where the text is malformed, names no engine, or gives an argument that the engine does not have.
    """
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise ModelError(
            f"engine: cannot read {text!r}; write a name such as 'importance' or 'importance(num_draws=4096)'"
        )
    module, name, call = match["module"], match["name"], match["arguments"]
    found = _engine_of_name(name) if module is None else _engine_of_module(module, name)
    if isinstance(found, Engine):
        if call is not None:
            raise ModelError(f"engine: {module}:{name} is an engine already, expected no arguments; got {call}")
        return found
    positional, keywords = _literals(call or "()", text)
    return _construct(found, positional, keywords)


def split_engines(text: str) -> list[str]:
    """The pieces of a comma-separated list of engines; commas inside brackets or quotes belong to their engine.

    Raises
    ------
    ModelError
        Where brackets do not match or a piece is empty.
    """
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
    pieces = [p.strip() for p in pieces]
    if depth != 0 or quote or not all(pieces):
        raise ModelError(
            f"engines: cannot read {text!r}; write names separated by commas: 'exact,importance(num_draws=4096)'"
        )
    return pieces


def _engine_of_name(name: str) -> type[Engine]:
    by_name = {_plain(kind.name): kind for kind in ENGINES}
    wanted = _plain(name)
    if wanted in by_name:
        return by_name[wanted]
    close = difflib.get_close_matches(wanted, by_name, n=1)
    hint = f" (did you mean {by_name[close[0]].name!r}?)" if close else ""
    raise ModelError(
        f"engine: none is called {name!r}{hint}; there are {', '.join(k.name for k in ENGINES)}; one of your own is "
        "package.module:MyEngine"
    )


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _engine_of_module(module: str, name: str) -> type[Engine] | Engine:
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ModelError(f"engine {module}:{name}: cannot import {module}: {error}") from error
    except AttributeError:
        raise ModelError(f"engine {module}:{name}: the module {module} has no {name!r}") from None
    if isinstance(found, Engine) or (isinstance(found, type) and issubclass(found, Engine)):
        return found
    raise ModelError(f"engine {module}:{name}: got {type(found).__name__}, expected a subclass of lmppl.Engine")


def _literals(call: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        tree = ast.parse(f"engine{call}", mode="eval").body
    except SyntaxError:
        raise ModelError(f"engine: cannot read the arguments of {text!r}") from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ModelError(f"engine: cannot read the arguments of {text!r}")
    named = {str(k.arg): _literal(k.value, text) for k in tree.keywords if k.arg is not None}
    if len(named) < len(tree.keywords):
        raise ModelError(f"engine: {text!r} gives ** or one argument twice; name each once")
    return [_literal(a, text) for a in tree.args], named


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ModelError(
            f"engine: {ast.unparse(node)!r} in {text!r} is no literal; text takes a number, a quoted string, True, "
            "None, and tuples of them; for an object, make the engine in Python: in a list `engines` of the spec, "
            "which `lmppl compare` runs, or as a variable of a module, named package.module:NAME"
        ) from None


def _construct(kind: type[Engine], positional: Sequence[Any], keywords: dict[str, Any]) -> Engine:
    settable = [f for f in fields(kind) if f.init]
    names = [f.name for f in settable]
    known = f"it has {', '.join(names)}" if names else "it has none"
    in_order = [f.name for f in settable if not f.kw_only]
    if len(positional) > len(in_order):
        raise ModelError(f"engine {kind.name}: got {len(positional)} arguments without a name; {known}")
    arguments = dict(zip(in_order, positional, strict=False))
    for name, value in keywords.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ModelError(f"engine {kind.name}: no argument is called {name!r}{hint}; {known}")
        if name in arguments:
            raise ModelError(f"engine {kind.name}: the argument {name!r} is given twice")
        arguments[name] = value
    missing = [f.name for f in settable if f.name not in arguments and _required(f)]
    if missing:
        raise ModelError(f"engine {kind.name}: missing {', '.join(missing)}; write {kind.name}({missing[0]}=...)")
    return kind(**arguments)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
