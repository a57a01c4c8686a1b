"""The laws of a factor, as a check that anybody can run on their own."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.lm.base import LanguageModel
from lmppl.lm.decoder import Step
from lmppl.modeling.factors import Factor, Incremental, start_incremental
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.modeling.user_functions import evaluate, evaluate_log_factor
from lmppl.sequences import Sequences
from lmppl.testing.reports import CheckFailed, Report
from lmppl.testing.soft_laws import check_soft
from lmppl.testing.text_laws import check_automaton_on_texts

__all__ = ["check_factor"]

NUM_TEXTS = 300  # random texts on which an automaton is held against the predicate


def check_factor(
    factor: Factor,
    sequences: Sequences | LanguageModel,
    *,
    num_sequences: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> Report:
    """Check that log φ is a function of (x, c), and that what the factor declares about itself is true.

    Parameters
    ----------
    factor : Factor
    sequences : Sequences or LanguageModel
        Where it is tried: rows of yours, or draws of an LM. With an LM, incremental forms that read hidden states can
        be checked too.
    num_sequences : int
        Draws per context, for an LM.
    seed : int
        Seed of these draws.
    tolerance : float, optional
        Nats by which two evaluations of one text may differ, since a batch changes the rounding of networks; by default
        1e-6, and 1e-3 with an LM in less than float64.

    Returns
    -------
    Report

    Raises
    ------
    CheckFailed
        Naming the first law that does not hold, with the text that shows it.
    """
    if not isinstance(factor, Factor) or not isinstance(sequences, LanguageModel | Sequences):
        raise ModelError(
            f"check_factor: got {type(factor).__name__} and {type(sequences).__name__}, expected a factor, and "
            "sequences or the LM to draw them from"
        )
    lm = sequences if isinstance(sequences, LanguageModel) else None
    if tolerance is None:
        tolerance = 1e-6 if lm is None or lm.dtype == torch.float64 else 1e-3
    if isinstance(sequences, LanguageModel):
        factor = factor.bind(sequences)
        sequences = sequences.draw(num_sequences, generator=torch.Generator().manual_seed(seed)).sequences
    report = Report(f"factor {factor.name!r}")
    values = _log_phi(report, factor, sequences, lm)
    _check_declarations(report, factor, sequences, values, tolerance)
    if factor.stochastic:
        report.skip("log φ is a function of the row", "a feature is declared stochastic=True")
    else:
        _check_function(report, factor, sequences, values, lm, tolerance)
    if factor.automaton is None:
        report.skip("the automaton accepts exactly where φ > 0", "none is given")
    else:
        _check_automaton(report, factor, sequences, values)
        check_automaton_on_texts(report, factor, sequences, NUM_TEXTS, seed)
    if factor.incremental is None:
        report.skip("the incremental form adds up to log φ", "none is given")
    else:
        _check_incremental(report, factor.incremental, sequences, values, lm, tolerance)
    check_soft(report, factor, lm, seed)
    return report


def _log_phi(report: Report, factor: Factor, rows: Sequences, lm: LanguageModel | None) -> Tensor:
    """(B,) log φ, computed afresh: no cache stands between this and the user's function."""
    try:
        if lm is not None and any(f.on in ("log_prior", "hidden") for f in factor.features):
            columns = Target(Model(lm, (factor,))).features(rows)
        else:
            columns = {f.name: evaluate(f, rows, factor=factor.name) for f in factor.features}
        values = evaluate_log_factor(factor, columns, rows)
    except (FactorError, ShapeError) as error:
        raise CheckFailed(f"{report.subject}: log φ is defined on every row does not hold: {error}") from error
    report.require(
        isinstance(values, Tensor) and values.shape == (len(rows),), "log φ is one number a row",
        tuple(getattr(values, "shape", (type(values).__name__,))), (len(rows),),
    )  # fmt: skip
    bad = torch.isnan(values) | (values == math.inf)
    report.require(~bad.any(), "log φ is finite or −inf", *_shown(rows, values, bad, "a finite number or −inf"))
    return values.double()


def _shown(rows: Sequences, values: Tensor, bad: Tensor, expected: str) -> tuple[str, str]:
    """What the first bad row got, and what was expected."""
    row = int(bad.int().argmax())
    return f"{float(values[row]):.6g} for the text {rows.text[row]!r}", expected


def _check_declarations(report: Report, factor: Factor, rows: Sequences, values: Tensor, tolerance: float) -> None:
    if math.isfinite(factor.upper):
        above = values > factor.upper + tolerance
        law = "log φ is at most `upper`"
        report.require(~above.any(), law, *_shown(rows, values, above, f"≤ {factor.upper:g}"), _times(rows))
    else:
        report.skip("log φ is at most `upper`", "no bound is declared")
    if factor.hard is False:
        zero = values == -math.inf
        report.require(~zero.any(), "φ > 0, as hard=False says", *_shown(rows, values, zero, "a finite number"))
    elif not bool((values == -math.inf).any()):
        report.skip("φ = 0 somewhere, as `hard` allows", f"φ > 0 on all {len(rows)} rows; give it rows that it forbids")


def _times(rows: Sequences) -> str:
    return f"on {len(rows)} rows"


def _check_function(
    report: Report, factor: Factor, rows: Sequences, values: Tensor, lm: LanguageModel | None, tolerance: float
) -> None:
    def compare(other: Tensor, at: Tensor, law: str) -> None:
        gap = torch.where(other == values[at], 0.0, (other - values[at]).abs()).nan_to_num(math.inf)
        bad = gap > tolerance
        row = int(bad.int().argmax())
        first = float(values[at][row])
        report.require(
            ~bad.any(), law, *_shown(rows.select(at), other, bad, f"{first:.6g}, as in the first batch"), _times(rows)
        )

    everything = torch.arange(len(rows))
    compare(_log_phi(report, factor, rows, lm), everything, "log φ is the same when computed again")
    backwards = everything.flip(0)
    compare(
        _log_phi(report, factor, rows.select(backwards), lm), backwards, "log φ does not depend on the order of a batch"
    )
    some = everything[:: max(1, len(rows) // 16)]
    alone = torch.cat([_log_phi(report, factor, rows.select(i[None]), lm) for i in some])
    compare(alone, some, "log φ does not depend on the batch")
    repeated = everything.repeat_interleave(2)
    compare(_log_phi(report, factor, rows.select(repeated), lm), repeated, "log φ of equal rows is equal")


def _check_automaton(report: Report, factor: Factor, rows: Sequences, values: Tensor) -> None:
    automaton = factor.automaton
    assert automaton is not None
    over_text = automaton.over == "characters"
    accepted = automaton.accepts_texts(rows.text) if over_text else automaton.accepts_sequences(rows)
    expected = torch.where(accepted.to(values.device), 0.0, -math.inf)
    bad = values != expected
    law = "the automaton accepts exactly where φ = 1, and φ = 0 elsewhere"
    row = int(bad.int().argmax())
    verdict = "accepts" if bool(accepted[row]) else "rejects"
    report.require(~bad.any(), law, *_shown(rows, values, bad, f"{float(expected[row])}: it {verdict}"), _times(rows))


def _check_incremental(
    report: Report,
    form: Incremental,
    rows: Sequences,
    values: Tensor,
    lm: LanguageModel | None,
    tolerance: float,
) -> None:
    """potential(start) + Σ weigh = potential(final) = log φ, and −inf sticks; rows of one length go together."""
    if lm is None and "hidden" in form.needs:
        report.skip("the incremental form adds up to log φ", "it reads hidden states: give an LM in place of sequences")
        return
    for length in rows.lengths.unique().tolist():
        if length == 0:
            continue
        index = torch.nonzero(rows.lengths == length).squeeze(1)
        same, wanted = rows.select(index), values[index]
        law = "potential(start) + Σ weigh = potential(final) = log φ"
        try:
            total, before = _walk(report, form, same, int(length), lm, tolerance)
        except FactorError as error:
            raise CheckFailed(f"{report.subject}: {law} does not hold: {error}") from error
        report.require_close(before, wanted, law, tolerance=tolerance * 10, how=_times(rows))
        report.require_close(total, wanted, law, tolerance=tolerance * 10, how=_times(rows))


def _walk(
    report: Report, form: Incremental, rows: Sequences, length: int, lm: LanguageModel | None, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Read rows of one length token by token: (B,) potential(start) + Σ weigh, and potential(final)."""
    decoder = None if lm is None else lm.decoder()
    step, cache = (None, None) if decoder is None else decoder.prefill(rows.context)
    state = start_incremental(form, rows.context, step)
    potential = form.potential(state).double()
    total = potential.clone()
    for t in range(length):
        tokens = rows.ids[:, t]
        if decoder is not None:
            step, cache = decoder.extend(cache, tokens[:, None])
        weight = form.weigh(state, tokens[:, None])[:, 0].double()
        every = form.weigh(state, None).double().gather(1, tokens[:, None])[:, 0]
        report.require_close(every, weight, "weigh of all tokens agrees with weigh of one", tolerance=tolerance)
        state = form.advance(state, tokens, cast(Step, step))  # forms that read text or ids never look at it
        after = form.potential(state).double()
        was_zero = potential == -math.inf
        report.require(
            (after[was_zero] == -math.inf).all(),
            "a potential of −inf stays −inf",
            "a finite potential after it",
            "−inf",
        )
        # −inf − (−inf) has no value: once the potential is −inf, its total is too, whatever weigh says.
        total = torch.where(was_zero, -math.inf, total + weight)
        potential = after
    kept = torch.arange(len(rows), device=rows.ids.device).flip(0)
    law = "select reorders the incremental form"
    report.require_close(form.potential(form.select(state, kept)).double(), potential[kept], law, tolerance=tolerance)
    return total, potential
