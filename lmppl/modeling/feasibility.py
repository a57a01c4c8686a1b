"""Constraints that no completion can meet, found before anything is drawn, where automata and grammars show it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import and_

import torch

from lmppl.errors import InfeasibleModel
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.factors import Factor

__all__ = ["refuse_infeasible"]

MAX_STATES = 100_000  # of the product of automata that is looked at


def refuse_infeasible(prior: LanguageModel, factors: Sequence[Factor]) -> None:
    """Raise where a factor's own form, or the automata of all factors together, leave no completion.

    What is asked is which tokens there are, not how probable they are. A form that reads hidden states is not asked.

    Parameters
    ----------
    prior : LanguageModel
    factors : sequence of Factor
        Bound to the prior.

    Raises
    ------
    InfeasibleModel
        Naming the factor, or the factors, and the context.
    """
    predicates = [f for f in factors if f.is_predicate and f.incremental is not None]
    contexts = torch.arange(prior.num_contexts, device=prior.device)
    for factor in predicates:
        form = factor.incremental
        assert form is not None
        if set(form.needs) != {"ids"}:
            continue
        lost = torch.nonzero(form.potential(form.start(contexts)) == -torch.inf)
        if len(lost):
            context = prior.prompts[int(lost[0, 0])]
            also = f" (and for {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise InfeasibleModel(
                f"Z = 0 for context {context!r}{also}: factor {factor.name!r} alone excludes every outcome of at most "
                f"{prior.max_new_tokens} tokens; raise max_new_tokens, loosen it, or check whether the tokenizer has "
                "its characters (completions often begin with a space)"
            )
    together = [f for f in predicates if f.automaton is not None and f.automaton.over == "characters"]
    automata = [f.automaton for f in together if f.automaton is not None]
    size = 1
    for one in automata:
        size *= one.num_states
    if len(automata) > 1 and size <= MAX_STATES:
        _refuse_together(prior, [f.name for f in together], reduce(and_, automata))


def _refuse_together(prior: LanguageModel, names: Sequence[str], product: Automaton) -> None:
    shortest = product.shortest()
    listed = " and ".join(map(repr, names))
    if shortest is None:
        raise InfeasibleModel(
            f"Z = 0: no factor alone excludes every outcome, but {listed} together allow no text; loosen one"
        )
    longest = max(len(piece) for piece in (*prior.spelling.pieces, *prior.spelling.first))
    if prior.spelling.additive and len(shortest) > longest * prior.max_new_tokens:
        raise InfeasibleModel(
            f"Z = 0: no factor alone excludes every outcome, but the shortest text that {listed} allow together has "
            f"{len(shortest)} characters, which {prior.max_new_tokens} tokens cannot write; raise max_new_tokens, or "
            "loosen one"
        )
