"""User functions as features: what a function is called, and whether it can be called with a list of texts."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from lmppl.errors import ModelError
from lmppl.modeling.factors import Feature, FeatureInput
from lmppl.modeling.function_contents import code_digest
from lmppl.modeling.label_scores import FittedScore, Label, LabelScore, fitted_score, label_score

__all__ = ["LabelScore", "function_name", "qualified_name", "to_feature"]


def function_name(fn: Callable[..., Any]) -> str | None:
    """How `fn` calls itself; None for a lambda."""
    if isinstance(fn, LabelScore | FittedScore):
        return str(fn.label)
    if isinstance(fn, functools.partial):
        return function_name(fn.func)
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return None if name == "<lambda>" else str(name)


def qualified_name(fn: Callable[..., Any]) -> str:
    """`module:qualname` of a function, for display and serialisation.

    Lambdas and functions inside functions share their names, so that a digest of the compiled code is appended; values
    that such a function closes over are not in it: see `content_digest`.
    """
    if isinstance(fn, LabelScore):
        return f"{'log ' if fn.is_log_prob else ''}{qualified_name(fn.pipeline)}[{fn.label}]"
    if isinstance(fn, FittedScore):
        return f"log {qualified_name(fn.classifier)}[{fn.label}]"
    if isinstance(fn, functools.partial):
        bound = [*map(repr, fn.args), *(f"{name}={value!r}" for name, value in sorted(fn.keywords.items()))]
        without_addresses = re.sub(r" at 0x[0-9a-fA-F]+", "", ", ".join(bound))
        return f"{qualified_name(fn.func)}({without_addresses})"
    owner = fn if hasattr(fn, "__qualname__") else type(fn)
    name = f"{owner.__module__}:{owner.__qualname__}"
    code = getattr(fn, "__code__", None)
    return f"{name}@{code_digest(code)}" if code is not None and "<" in name else name


def to_feature(
    fn: Callable[..., Any] | Feature,
    *,
    kind: str,
    name: str | None = None,
    on: FeatureInput = "text",
    stochastic: bool = False,
    fingerprint: str | None = None,
    label: Label | None = None,
    log_prob: bool = False,
) -> Feature:
    """The feature of a function; a `Feature` is passed through.

    Parameters
    ----------
    fn : callable or Feature
        See `Feature.fn`. A fitted classifier with `predict_log_proba` or `predict_proba` becomes log p(label|x).
    kind : str
        The declaration that asks ("Reward"), for messages.
    name : str, optional
        What a lambda is called; by default "reward" for a `Reward`.
    on, stochastic, fingerprint
        As in `Feature`.
    label : str or int, optional
        For a text-classification pipeline or a fitted classifier: the label that is meant.
    log_prob : bool
        Of a pipeline: the log of the score.

    Raises
    ------
    ModelError
        Where `fn` is no function of one list of texts, or options contradict a given `Feature`.
    """
    if isinstance(fn, Feature):
        if (on, stochastic, fingerprint, label) != ("text", False, None, None):
            raise ModelError(f"{kind}: got a Feature together with its options; set them in the Feature")
        return fn
    fitted = fitted_score(fn, label, kind)
    if fitted is not None:
        fn, label = fitted, None
    if not callable(fn):
        raise ModelError(f"{kind}: got {type(fn).__name__}, expected a function of a list of texts")
    if hasattr(fn, "config") and hasattr(fn, "forward"):
        raise ModelError(
            f"{kind}: got the network {type(fn).__name__}, expected a function of a list of texts; "
            "a sequence classifier becomes one by Reward.from_pretrained(model, tokenizer)"
        )
    if hasattr(fn, "log_prob"):
        raise ModelError(f"{kind}: got the distribution {type(fn).__name__}, expected a function of a list of texts")
    if on not in ("text", "full", "ids", "hidden", "log_prior"):
        raise ModelError(f"{kind}: got on={on!r}, expected 'text', 'full', 'ids', 'hidden' or 'log_prior'")
    if label is not None:
        fn = label_score(fn, label, log_prob, kind)
    if stochastic and getattr(fn, "remembers", False) is True:
        raise ModelError(
            f"{kind}: got stochastic=True with a {type(fn).__name__} that remembers its answers, so that no sample is "
            "fresh; make it with remember=False"
        )
    feature = Feature(function_name(fn) or name or kind.lower(), fn, on, stochastic, fingerprint)
    _check_signature(feature, kind)
    try:
        hash(fn)
    except TypeError as error:
        raise ModelError(
            f"{kind}: {feature.name} cannot be hashed, so that factors could not share it; "
            "a dataclass becomes hashable with @dataclass(eq=False)"
        ) from error
    return feature


def _check_signature(feature: Feature, kind: str) -> None:
    if inspect.iscoroutinefunction(feature.fn) or inspect.iscoroutinefunction(type(feature.fn).__call__):
        raise ModelError(
            f"{kind}: {feature.name} is an async function, expected one that returns its values; wrap it: "
            f"lambda texts: asyncio.run({feature.name}(texts))"
        )
    if feature.reads_prompts:
        needed = [
            p.name
            for p in inspect.signature(feature.fn).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        unknown = [name for name in needed if name not in ("prompts", "completions", "completion_ids")]
        if unknown:
            raise ModelError(
                f"{kind}: {feature.name} needs {', '.join(unknown)} besides prompts and completions; "
                f"bind it: functools.partial({feature.name}, {unknown[0]}=...)"
            )
        if feature.on != "text":
            raise ModelError(
                f"{kind}: {feature.name} takes prompts and completions, which contradicts on={feature.on!r}; "
                "leave on= out"
            )
        return
    try:
        signature = inspect.signature(feature.fn)
    except (TypeError, ValueError):  # builtins have no signature
        return
    try:
        signature.bind([])
    except TypeError as error:
        raise ModelError(
            f"{kind}: {feature.name}{signature} cannot be called with one list of texts ({error}); "
            "bind the other arguments with functools.partial"
        ) from error
