"""Constraints prefix by prefix: the incremental forms that a `Constraint` gets when it meets its language model.

A hard constraint has one where "already violated, for good" can be told from a prefix: an automaton knows its dead
states; of a user's function it holds where the user says so (`prefix_closed=True`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lmppl.errors import FactorError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.automaton_prefixes import AutomatonPrefixes
from lmppl.modeling.evidence.prefix_reader import LogFactor, PrefixReader, as_log
from lmppl.modeling.factors import Factor, Incremental
from lmppl.modeling.function_contents import content_digest
from lmppl.sequences import Sequences

__all__ = ["FormShelf", "LazyForm", "automaton_form", "evaluator", "prefix_closed_form"]

FORMS_KEPT = 4
PROBES = 8  # texts that a run tries in order to find a function that is not prefix-closed


class FormShelf:
    """The forms that a factor has for language models: their tables are made once, however many runs ask."""

    def __init__(self) -> None:
        self._kept: list[tuple[LanguageModel, Incremental]] = []

    def get(self, lm: LanguageModel, make: Callable[[], Incremental]) -> Incremental:
        """The form for `lm`, made by `make` if it is new."""
        for known, form in self._kept:
            if known is lm:
                return form
        form = make()
        self._kept = [*self._kept[1 - FORMS_KEPT :], (lm, form)]
        return form


def automaton_form(automaton: Automaton, lm: LanguageModel) -> Incremental:
    """The form of 1[automaton accepts x] for prefixes of `lm`: a table where tokens add up to text, else a reader."""
    return _AutomatonForm(automaton, lm)


class LazyForm(ABC):
    """A form of prefixes that is chosen on first use, since knowing how tokens spell takes decoding the vocabulary."""

    @cached_property
    def form(self) -> Any:
        """The `Incremental` that was chosen."""
        return self._chosen()

    @abstractmethod
    def _chosen(self) -> Incremental: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of what is asked of prefixes."""

    @property
    def needs(self) -> Collection[Literal["text", "ids", "hidden"]]:
        """As `Incremental.needs`: text only where prefixes are read, which is slow for all V tokens."""
        needs: Collection[Literal["text", "ids", "hidden"]] = self.form.needs
        return needs

    def start(self, contexts: Tensor, step: Step | None = None) -> Any:
        """As `Incremental.start`."""
        return self.form.start(contexts)

    def weigh(self, state: Any, candidates: Tensor | None) -> Tensor:
        """As `Incremental.weigh`."""
        weights: Tensor = self.form.weigh(state, candidates)
        return weights

    def advance(self, state: Any, tokens: Tensor, step: Any = None) -> Any:
        """As `Incremental.advance`."""
        return self.form.advance(state, tokens, step)

    def potential(self, state: Any) -> Tensor:
        """As `Incremental.potential`."""
        values: Tensor = self.form.potential(state)
        return values

    def select(self, state: Any, index: Tensor) -> Any:
        """As `Incremental.select`."""
        return self.form.select(state, index)

    def crop(self, state: Any, lengths: Tensor) -> Any:
        """As `Incremental.crop`."""
        return self.form.crop(state, lengths)


class _AutomatonForm(LazyForm):
    """A table, or a reader of settled texts."""

    def __init__(self, automaton: Automaton, lm: LanguageModel) -> None:
        self.automaton, self.lm = automaton, lm

    def _chosen(self) -> Incremental:
        whole = self.lm.ends_by_eos_alone
        tabulated = whole and (self.automaton.over == "tokens" or self.lm.spelling.additive)
        return AutomatonPrefixes(self.automaton, self.lm) if tabulated else self._reader()

    @property
    def fingerprint(self) -> str:
        """Of the automaton."""
        return hashlib.sha256(repr(self.automaton.to_dict()).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"automaton_form({self.automaton!r})"

    def _reader(self) -> PrefixReader:
        automaton, live = self.automaton, self.automaton.live()

        def verdict(good: Tensor, rows: Sequences) -> Tensor:
            words: Sequence[Any] = rows.text if automaton.over == "characters" else rows.token_lists()
            return as_log(good[automaton.run(words)])

        going, ending = (lambda rows: verdict(live, rows)), (lambda rows: verdict(automaton.accept, rows))
        return PrefixReader(self.lm, going, ending, lambda: self.fingerprint)


def prefix_closed_form(factor: Factor, lm: LanguageModel, log_factor: LogFactor | None) -> PrefixReader:
    """The form of a constraint whose violated prefixes cannot be mended: log ψ(x_≤t) = log φ of the settled text.

    Parameters
    ----------
    factor : Factor
        With one feature, of texts or ids.
    lm : LanguageModel
    log_factor : callable, optional
        log φ of sequences, cached and counted by whoever runs the factor; by default with a cache of its own.

    Notes
    -----
    That no violated prefix can be mended is checked at run time where it costs little: the empty text must be allowed,
    and a few violated texts are tried with other texts behind them, all of which must be forbidden.
    """

    def content() -> str:
        functions = [(f.on, f.fingerprint or content_digest(f.fn)) for f in factor.features]
        return hashlib.sha256(repr((functions, content_digest(factor.log_factor))).encode()).hexdigest()[:16]

    return PrefixReader(lm, _Watched(factor, lm, log_factor), evaluator(factor, lm, log_factor), content)


def evaluator(factor: Factor, lm: LanguageModel, log_factor: LogFactor | None) -> LogFactor:
    """log φ of sequences as a run gives it, cached and counted; by default evaluated with a cache of its own."""
    if log_factor is not None:
        return log_factor
    own: list[Any] = []

    def evaluated(rows: Sequences) -> Tensor:
        from lmppl.modeling.model import Model
        from lmppl.modeling.target import Target

        if not own:
            own.append(Target(Model(lm, (factor,))))
        values: Tensor = own[0].log_factors(rows)[factor.name]
        return values

    return evaluated


class _Watched:
    """log φ of prefixes, with an eye on texts that a violated prefix begins."""

    def __init__(self, factor: Factor, lm: LanguageModel, log_factor: LogFactor | None) -> None:
        self.factor, self.evaluate = factor, evaluator(factor, lm, log_factor)
        self.on_text = all(f.on == "text" and not f.reads_prompts for f in factor.features)
        self.probes = PROBES if self.on_text else 0

    def __call__(self, rows: Sequences) -> Tensor:
        values = self.evaluate(rows)
        if self.on_text and "" in rows.text and bool(values[rows.text.index("")] == -torch.inf):
            raise FactorError(
                f"factor {self.factor.name!r}: it is declared prefix_closed=True and forbids the empty text, with "
                "which every text begins, so that nothing would be allowed; leave prefix_closed out unless what is "
                "forbidden stays forbidden whatever follows"
            )
        if self.probes:
            self._probe(rows, values)
        return values

    def _probe(self, rows: Sequences, values: Tensor) -> None:
        violated = list(dict.fromkeys(t for t, v in zip(rows.text, values.tolist(), strict=True) if v == -torch.inf))
        if not violated:
            return
        others = list(dict.fromkeys(t for t in reversed(rows.text) if t))
        pairs = [(v, w) for w in others for v in violated][: self.probes]
        self.probes -= len(pairs)
        texts = [v + w for v, w in pairs]
        tried = rows.select([0] * len(texts))
        tried.__dict__["text"] = texts
        for (prefix, _), text, value in zip(pairs, texts, self.evaluate(tried).tolist(), strict=True):
            if value > -torch.inf:
                raise FactorError(
                    f"factor {self.factor.name!r}: it is declared prefix_closed=True, but forbids {prefix!r} and "
                    f"allows {text!r}, which begins with it; leave prefix_closed out"
                )
