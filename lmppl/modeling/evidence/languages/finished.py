"""Finished: completions that end by themselves, and are not cut by the cap."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.automata import Automaton, Symbol
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.languages.language import Language
from lmppl.modeling.evidence.prefix_reader import LogFactor, PrefixReader, as_log, no_verdict
from lmppl.modeling.evidence.prefixes import automaton_form
from lmppl.modeling.factors import Factor, Feature
from lmppl.sequences import Sequences

__all__ = ["Finished"]


def is_finished(sequences: Sequences) -> Tensor:
    """(B,) bool: which completions ended by EOS, or by a stop string."""
    return sequences.finished


class Finished(Language):
    """Completions that ended by EOS (or a stop string) before the cap: log φ = 0 if `Sequences.finished` else −inf.

    Parameters
    ----------
    name : str, optional
        By default "finished".
    """

    def __init__(self, *, name: str | None = None) -> None:
        Constraint.__init__(self, Feature("finished", is_finished, "ids"), name=name or "finished")
        self._set(arguments={}, formula="1[x is finished]", named=name is not None)

    def accepts(self, texts: Sequence[str]) -> Tensor:
        """As `Language.accepts`, which no text can answer."""
        raise ModelError("Finished: a text does not show whether it is finished; use Sequences.finished")

    def accepts_sequences(self, sequences: Sequences) -> Tensor:
        """As `Language.accepts_sequences`."""
        return is_finished(sequences)

    def bind(self, lm: LanguageModel, log_factor: LogFactor | None = None) -> Factor:
        """As `Factor.bind`: over the tokens of `lm`, an automaton where only EOS ends a completion."""
        bound = copy.copy(self)
        if lm.ends_by_eos_alone:
            automaton = _ends_with(lm.eos_ids)
            object.__setattr__(bound, "automaton", automaton)
            object.__setattr__(bound, "incremental", self.forms.get(lm, lambda: automaton_form(automaton, lm)))
        else:
            object.__setattr__(bound, "incremental", PrefixReader(lm, no_verdict, _verdict, lambda: "finished"))
        return bound


def _ends_with(tokens: Sequence[int]) -> Automaton:
    """Rows whose last token is one of these."""
    moves: dict[Symbol | None, Hashable] = {None: "on", **dict.fromkeys(tokens, "end")}
    return Automaton.from_edges({"on": moves, "end": moves}, start="on", accept=["end"], over="tokens")


def _verdict(sequences: Sequences) -> Tensor:
    return as_log(sequences.finished.cpu())
