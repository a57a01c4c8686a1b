"""Preference pairs: which of two texts a person likes better, and what pairs no reward can be learned from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.modeling.returned_values import quote

__all__ = ["Pairs", "Preference", "check_for_fit", "read_pairs"]


@dataclass(frozen=True)
class Preference:
    """What a person said of two texts.

    Parameters
    ----------
    chosen, rejected : str
        The better and the worse text; of a tie, the two in any order.
    context : str
        What both texts complete.
    annotator : str, optional
        Who said it.
    tie : bool
        Neither is better.
    """

    chosen: str
    rejected: str
    context: str = ""
    annotator: str | None = None
    tie: bool = False


@dataclass(frozen=True, eq=False)
class Pairs:
    """N checked preferences.

    Parameters
    ----------
    chosen, rejected : list of str
        The texts as features read them.
    tie : Tensor (N,)
        Which of them are ties.
    annotators : tuple of str
        The distinct annotators, sorted; empty where none is named.
    annotator : Tensor (N,)
        Index into `annotators`; −1 where none is named.
    """

    chosen: list[str]
    rejected: list[str]
    tie: Tensor
    annotators: tuple[str, ...]
    annotator: Tensor

    def __len__(self) -> int:
        return len(self.chosen)


def read_pairs(pairs: Iterable[Any], who: str, on: Literal["text", "full"]) -> Pairs:
    """Check preferences: `Preference`s, tuples (chosen, rejected), or dicts in the Hugging Face convention.

    Parameters
    ----------
    pairs : iterable
        A dict has "chosen" and "rejected", and may have "prompt", "annotator" and "tie"; other keys are not read.
    who : str
        The declaration that asks, for messages.
    on : {"text", "full"}
        Whether features read the text, or context + text.

    Raises
    ------
    ModelError
        No pairs; a pair of another form; two equal texts; annotators named for some pairs only.
    """
    if on not in ("text", "full"):
        raise ModelError(f"{who}: got on={on!r}, expected 'text' or 'full'")
    known = [_read(one, row, who) for row, one in enumerate(pairs)]
    if not known:
        raise ModelError(f"{who}: got no pairs, expected a list of (chosen, rejected)")
    for row, one in enumerate(known):
        if one.chosen == one.rejected:
            raise ModelError(
                f"{who}: pair {row} has the text {quote(one.chosen)} on both sides, which says nothing about a reward; "
                "leave it out"
            )
    names = tuple(sorted({one.annotator for one in known if one.annotator is not None}))
    if names and any(one.annotator is None for one in known):
        row = next(row for row, one in enumerate(known) if one.annotator is None)
        raise ModelError(f"{who}: pair {row} names no annotator and others do; name one for every pair, or for none")
    number = {name: j for j, name in enumerate(names)}
    head = [one.context if on == "full" else "" for one in known]
    return Pairs(
        chosen=[h + one.chosen for h, one in zip(head, known, strict=True)],
        rejected=[h + one.rejected for h, one in zip(head, known, strict=True)],
        tie=torch.tensor([one.tie for one in known]),
        annotators=names,
        annotator=torch.tensor([-1 if one.annotator is None else number[one.annotator] for one in known]),
    )


def check_for_fit(pairs: Pairs, who: str) -> None:
    """Refuse pairs that determine no reward: a single one, ties alone, one annotator as several."""
    if len(pairs) == 1:
        raise ModelError(f"{who}: got a single pair, expected at least two; a reward of one choice is its prior")
    if bool(pairs.tie.all()):
        raise ModelError(f"{who}: all {len(pairs)} pairs are ties, expected some choices; ties do not order texts")
    if len(pairs.annotators) == 1:
        raise ModelError(
            f"{who}: every pair has the annotator {pairs.annotators[0]!r}, and one cannot be told from the population; "
            "leave annotators out, or give pairs of several"
        )


def _read(one: Any, row: int, who: str) -> Preference:
    if isinstance(one, Mapping):
        missing = [key for key in ("chosen", "rejected") if key not in one]
        if missing:
            raise ModelError(f"{who}: pair {row} lacks {missing[0]!r}; it has the keys {list(one)}")
        one = Preference(
            one["chosen"], one["rejected"], one.get("prompt", ""), one.get("annotator"), one.get("tie", False)
        )
    elif isinstance(one, tuple | list) and len(one) == 2:
        one = Preference(*one)
    if not isinstance(one, Preference):
        raise ModelError(
            f"{who}: pair {row} is {_described(one)}, expected (chosen, rejected), a dict with 'chosen' and "
            "'rejected', or a Preference"
        )
    for name in ("chosen", "rejected", "context"):
        if not isinstance(getattr(one, name), str):
            raise ModelError(
                f"{who}: pair {row} has {name}={_described(getattr(one, name))}, expected a string; make one of chat "
                "turns with tokenizer.apply_chat_template(..., tokenize=False)"
            )
    if not isinstance(one.tie, bool):
        raise ModelError(f"{who}: pair {row} has tie={one.tie!r}, expected True or False")
    if one.annotator is not None and not isinstance(one.annotator, str):
        raise ModelError(f"{who}: pair {row} has annotator={one.annotator!r}, expected a name, a string")
    return one


def _described(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{size}"
