"""Exact: the posterior itself, by enumeration or by dynamic programming.

The first tool for debugging a declaration: where π* can be computed, what it looks like says whether the *model* is
wrong, before any engine's error comes in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmppl.errors import FactorError, InfeasibleModel, ModelError
from lmppl.inference.approximation import ExactTable
from lmppl.inference.dynamic_programming import AutomatonLM
from lmppl.inference.engine import Engine, Guarantee, Part, Request, Shard, make_shard, shard_generator
from lmppl.inference.posterior_lm import PosteriorLM
from lmppl.inference.prefix_tree import PrefixTreeLM
from lmppl.inference.refusals import first_context
from lmppl.lm.base import ENUMERATION_GUARD
from lmppl.lm.decoding import draw
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.target import Target, TargetForm, log_evidence
from lmppl.sequences import Cost, Draws, Estimate, concatenate

__all__ = ["Exact"]

Route = Literal["enumeration", "dynamic programming"]


@dataclass(frozen=True)
class Exact(Engine):
    """π*(x|c) = γ(x|c) / Z(c), Z(c) = Σ_x γ(x|c), computed.

    Two routes, chosen by the form of the declaration and recorded in `info["route"]`:

    - "dynamic programming", where the prior is a `TabularLM` and every factor is given by a finite automaton (or there
      is none): soft values over the product machine, exact at any horizon. `draws` are `num_draws` independent exact
      draws per context, equally weighted.
    - "enumeration" otherwise: every outcome of positive prior probability is scored. `draws` is then the whole table,
      ordered by context, with `log_weight` = log γ, so that the normalised weights are the posterior probabilities;
      outcomes with γ = 0 stay in it. `num_draws` is not used.

    In both, `log_q` = log π* in nats, and the result's `law` is π* as a language model: it draws, scores, and can be a
    proposal or the next model's prior.

    Parameters
    ----------
    max_sequences : int
        Enumeration stops with an error where a context has more outcomes than this.

    Raises
    ------
    InfeasibleModel
        Where Z(c) = 0; names the context, and a factor that alone excludes everything.
    SupportTooLarge
        Where the outcomes, or the states of the product machine, are too many.
    FactorError
        Where a factor's function contradicts its automaton on a draw of the law or of the prior (a check by draws, no
        proof: `lmppl.testing.check_factor` tries more).

    References
    ----------
    `korbak2022bayesian` for the posterior, `rabiner1989` and `mohri1997` for the dynamic programming.
    """

    max_sequences: int = field(default=ENUMERATION_GUARD, kw_only=True)

    name: ClassVar[str] = "exact"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    references: ClassVar[tuple[str, ...]] = ("korbak2022bayesian", "rabiner1989", "mohri1997")

    def route(self, form: TargetForm) -> Route:
        """How this engine would compute a target of that form."""
        return "dynamic programming" if form.tabular and not form.without_automaton else "enumeration"

    def unsupported_reason(self, form: TargetForm) -> str | None:
        """As `Engine.unsupported_reason`."""
        reason = super().unsupported_reason(form)
        if reason is not None or self.route(form) != "enumeration" or form.max_outcomes <= self.max_sequences:
            return reason
        if self.max_sequences < 1:
            return None  # a wrong argument, which `plan` refuses
        count = f"about {form.max_outcomes:.0e}" if form.max_outcomes < float("inf") else "far too many"
        return (
            f"exact enumeration: {form.vocab_size:,} tokens and a horizon of {form.horizon} make {count} outcomes, "
            f"more than max_sequences = {self.max_sequences:,}; use a smaller horizon or vocabulary, or the engine "
            "'rejection' or 'importance'"
        )

    def plan(self, target: Target, request: Request) -> list[Shard]:
        """One shard: a posterior is whole or it is none."""
        if self.max_sequences < 1:
            raise ModelError(f"Exact: got max_sequences = {self.max_sequences}, expected at least 1")
        wanted = self.default_draws if request.num_draws is None else request.num_draws
        if wanted < 1:
            raise ModelError(f"num_draws: got {wanted}, expected at least 1")
        return [make_shard(target, 0, wanted, request.seed, tuple(range(target.form.num_contexts)))]

    def replan(self, target: Target, request: Request, parts: Sequence[Part]) -> list[Shard]:
        """Nothing follows."""
        return []

    def run_shard(self, target: Target, shard: Shard, *, state: Any = None) -> Part:
        """As `Engine.run_shard`; set-up is everything but the draws."""
        before, start = target.cost.copy(), time.perf_counter()
        law: PosteriorLM
        if self.route(target.form) == "enumeration":
            table, log_gamma = self._table(target, shard.contexts)
            law = _law_of_table(target, table, log_gamma)
            setup = replace(target.cost - before, seconds=time.perf_counter() - start)
            log_posterior = log_gamma - law.log_normalizer[table.context]
            draws = table.with_columns(log_weight=log_gamma, log_q=log_posterior)
        else:
            law = _law_of_machine(target)
            setup = replace(target.cost - before, seconds=time.perf_counter() - start)
            draws = _drawn(target, law, shard)
        return Part(shard, draws, info={"setup": setup.as_dict()}, law=law)

    def restored(self, target: Target, part: Part) -> Part:
        """As `Engine.restored`: the law comes from the table, or from the automata, without the LM."""
        if self.route(target.form) == "enumeration":
            assert part.draws.log_weight is not None
            return replace(part, law=_law_of_table(target, part.draws, part.draws.log_weight))
        return replace(part, law=_law_of_machine(target))

    def merge(self, parts: Sequence[Part]) -> ExactTable:
        """As `Engine.merge`."""
        (part,) = parts
        law = part.law
        assert isinstance(law, PrefixTreeLM | AutomatonLM)
        enumerated = isinstance(law, PrefixTreeLM)
        log_z: Tensor = law.log_normalizer
        estimate = Estimate(log_z, torch.stack([log_z, log_z], -1), 1.0, "exact", torch.zeros_like(log_z))
        info: dict[str, Any] = {"route": "enumeration" if enumerated else "dynamic programming"}
        if isinstance(law, PrefixTreeLM):
            info["outcomes"] = torch.bincount(part.draws.context, minlength=len(log_z))
        else:
            info["product_states"] = law.num_states
        setup = Cost(**part.info["setup"])
        return ExactTable(part.draws, (estimate,), self.guarantee, info, setup=setup, law=law, enumerated=enumerated)

    def _table(self, target: Target, contexts: Sequence[int]) -> tuple[Draws, Tensor]:
        """Every outcome of positive prior probability, scored and ordered by context, and its log γ."""
        parts, log_gammas = [], []
        for c in contexts:
            outcomes = target.prior.enumerate_sequences(c, max_sequences=self.max_sequences, cost=target.cost)
            log_prior = outcomes.log_weight  # an enumeration is weighted by its own law
            assert log_prior is not None
            parts.append(target.evaluate(outcomes))
            log_gammas.append(log_prior.double() + log_evidence(parts[-1]))
        return concatenate(parts, pad_id=target.prior.pad_id), torch.cat(log_gammas)


def _law_of_table(target: Target, table: Draws, log_gamma: Tensor) -> PrefixTreeLM:
    law = PrefixTreeLM(target.prior, table, log_gamma)
    found = _infeasible(law.log_normalizer)
    if found is not None:
        c, also = found
        excluding = [n for n, v in table.log_factors.items() if not bool((v[table.context == c] > -torch.inf).any())]
        raise _no_posterior(target, c, also, excluding)
    return law


def _law_of_machine(target: Target) -> AutomatonLM:
    prior = target.prior
    assert isinstance(prior, TabularLM)
    automata = {f.name: f.automaton for f in target.factors if f.automaton is not None}
    law = AutomatonLM(prior, list(automata.values()))
    found = _infeasible(law.log_normalizer)
    if found is not None:
        c, also = found
        alone = {name: AutomatonLM(prior, [automaton]).log_normalizer[c] for name, automaton in automata.items()}
        raise _no_posterior(target, c, also, [name for name, log_z in alone.items() if log_z == -torch.inf])
    return law


def _infeasible(log_normalizer: Tensor) -> tuple[int, str] | None:
    return first_context(log_normalizer == -torch.inf)


def _no_posterior(target: Target, context: int, also: str, excluding: Sequence[str]) -> InfeasibleModel:
    where = f"context {target.contexts[context]!r}{also}"
    if excluding:
        why = f"factor {excluding[0]!r} alone excludes every outcome"
    else:
        why = "no factor alone excludes every outcome, but together they do"
    return InfeasibleModel(f"exact: Z = 0 for {where}: {why} of at most {target.form.horizon} tokens")


def _drawn(target: Target, law: AutomatonLM, shard: Shard) -> Draws:
    """Exact draws from the law, scored under the prior and by the factors.

    Where a factor has a function of its own beside the automaton, the two are compared on these draws, and on as many
    of the prior, which see texts that the automaton wrongly rejects.
    """
    generator = shard_generator(shard)
    drawn = draw(law, shard.num_draws, generator=generator, cost=target.cost, batch_size=shard.batch_size)
    draws = target.evaluate(drawn.with_columns(log_prior=target.log_prior(drawn)))
    _compare_automata(target, draws)
    if not all(isinstance(f, Constraint) and f.is_automaton for f in target.factors):
        before = draw(target.prior, shard.num_draws, generator=generator, cost=target.cost, batch_size=shard.batch_size)
        _compare_automata(target, target.evaluate(before))
    return draws


def _compare_automata(target: Target, draws: Draws) -> None:
    """Refuse a factor whose log φ is not that of its automaton: 0 where it accepts, −inf elsewhere."""
    for factor in target.factors:
        automaton = factor.automaton
        assert automaton is not None
        over_text = automaton.over == "characters"
        accepted = automaton.accepts_texts(draws.text) if over_text else automaton.accepts_sequences(draws)
        values = draws.log_factors[factor.name]
        wrong = torch.nonzero(values != torch.where(accepted, 0.0, -torch.inf))
        if len(wrong):
            row = int(wrong[0, 0])
            verdict = "accepts" if bool(accepted[row]) else "rejects"
            raise FactorError(
                f"factor {factor.name!r}: log φ = {float(values[row]):g} for the text {draws.text[row]!r}, which its "
                f"automaton {verdict}; an automaton must accept exactly the completions with φ = 1, and φ = 0 elsewhere"
            )
