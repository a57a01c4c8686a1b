"""The laws of a language model, as a check that anybody can run on their own.

Where V^T is small, everything is compared with brute force over all token rows; beyond that, what remains are the laws
of single draws and next tokens, and the report says what was left out. The decoder's own laws stand in `decoder_laws`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lmppl.lm.base import LanguageModel
from lmppl.sequences import Draws, Sequences
from lmppl.testing.decoder_laws import check_decoder
from lmppl.testing.reports import Report
from lmppl.testing.statistics import chi_square_p_value

__all__ = ["check_language_model"]


def check_language_model(
    lm: LanguageModel,
    *,
    num_draws: int = 2000,
    max_rows: int = 20_000,
    seed: int = 0,
    tolerance: float | None = None,
    error_rate: float = 1e-6,
) -> Report:
    """Check that `lm` is the law that it says: probabilities, draws, shapes and decoder.

    Parameters
    ----------
    lm : LanguageModel
        Small ones (V^T ≤ `max_rows`) are compared with brute force over all rows of tokens.
    num_draws : int
        Draws per context for the statistical laws.
    max_rows : int
        Rows of tokens that brute force may score.
    seed : int
        Seed of the draws.
    tolerance : float, optional
        Nats by which two computations of one log-probability may differ; 1e-8 for float64 and 2e-3 otherwise.
    error_rate : float
        Probability, for each statistical law and context, that a correct LM fails it.

    Returns
    -------
    Report

    Raises
    ------
    CheckFailed
        Naming the first law that does not hold.
    """
    report = Report(repr(lm))
    exact = tolerance if tolerance is not None else (1e-8 if lm.dtype == torch.float64 else 2e-3)
    with torch.no_grad():
        draws = lm.draw(num_draws, generator=torch.Generator().manual_seed(seed))
        _check_draws(report, lm, draws, num_draws, seed)
        _check_scores(report, lm, draws, exact)
        _check_distribution(report, lm, exact)
        if lm.vocab_size**lm.max_new_tokens <= max_rows:
            _check_by_brute_force(report, lm, draws, exact, error_rate)
        else:
            _check_first_tokens(report, lm, draws, exact, error_rate)
        check_decoder(report, lm, draws, exact)
    return report


def _check_draws(report: Report, lm: LanguageModel, draws: Draws, num_draws: int, seed: int) -> None:
    expected = torch.arange(lm.num_contexts).repeat_interleave(num_draws)
    shape = (len(expected), lm.max_new_tokens)
    report.require(tuple(draws.ids.shape) == shape, "draws have one id for each step", tuple(draws.ids.shape), shape)
    report.require(draws.ids.dtype == torch.int64, "ids are int64", draws.ids.dtype, torch.int64)
    report.require(
        draws.context.cpu().equal(expected), "draws are ordered by context", "another order", "num_draws rows a context"
    )
    outcome = lm.is_outcome(draws)
    broken = draws.token_lists()[int((~outcome).int().argmax())]
    report.require(outcome.all(), "every draw is an outcome", f"{broken}", "rows that end at EOS or the cap")
    after = draws.ids[~draws.mask]
    report.require((after == lm.pad_id).all(), "the pad id stands after the end", after.unique().tolist(), [lm.pad_id])
    again = lm.draw(num_draws, generator=torch.Generator().manual_seed(seed))
    report.require(again.ids.equal(draws.ids), "equal seeds give equal draws", "different ids", "equal ids")


def _check_scores(report: Report, lm: LanguageModel, draws: Draws, exact: float) -> None:
    some = draws.select(torch.linspace(0, len(draws) - 1, min(len(draws), 256)).long())
    scores, tokens = lm.score(some), lm.token_log_probs(some)
    assert some.log_prior is not None
    report.require_close(some.log_prior, scores, "a draw's log_prior is its score", tolerance=exact)
    report.require_close(tokens.sum(-1), scores, "token_log_probs sum to the score", tolerance=exact)
    report.require((tokens[~some.mask] == 0).all(), "token_log_probs are 0 after the end", "others", 0)
    report.require((tokens <= exact).all(), "log-probabilities are at most 0", f"{float(tokens.max()):.4g}", "≤ 0")
    few = some.select(slice(0, 16))
    alone = torch.cat([lm.score(few.select([i])) for i in range(len(few))])
    report.require_close(alone, scores[: len(few)], "scores do not depend on the batch", tolerance=exact)
    backwards = lm.score(some.select(torch.arange(len(some)).flip(0))).flip(0)
    report.require_close(backwards, scores, "scores do not depend on the order", tolerance=exact)
    longer = _too_long(lm)
    if longer is not None:
        report.require(
            lm.score(longer) == -torch.inf, "what no run can produce has probability 0", "a finite score", "−inf"
        )


def _too_long(lm: LanguageModel) -> Sequences | None:
    """A row that goes on after EOS."""
    if not lm.eos_ids or lm.max_new_tokens < 2:
        return None
    row = [lm.eos_ids[0], lm.eos_ids[0]]
    return lm.sequences([row]) if len(row) <= lm.max_new_tokens else None


def _check_distribution(report: Report, lm: LanguageModel, exact: float) -> None:
    contexts, cap = lm.num_contexts, lm.max_new_tokens
    values = lm.sample((2, 3))
    shape = (2, 3, contexts, cap)
    report.require(tuple(values.shape) == shape, "sample has shape sample + (C, T)", tuple(values.shape), shape)
    log_probs = lm.log_prob(values)
    report.require(
        tuple(log_probs.shape) == shape[:-1], "log_prob has shape sample + (C,)", tuple(log_probs.shape), shape[:-1]
    )
    rows = values.reshape(-1, cap)
    where = torch.arange(contexts, device=rows.device).expand(shape[:-1]).reshape(-1)
    scores = lm.score(lm.parse(rows, where)).view(shape[:-1])
    report.require_close(log_probs, scores, "log_prob is score", tolerance=exact)


def _check_by_brute_force(report: Report, lm: LanguageModel, draws: Draws, exact: float, error_rate: float) -> None:
    how = f"all {lm.vocab_size}^{lm.max_new_tokens} rows of tokens"
    for c in range(lm.num_contexts):
        outcomes = _all_outcomes(lm, c)
        log_p = lm.score(outcomes).double()
        total = float(log_p.exp().sum())
        report.require(
            abs(total - 1) <= 10 * exact, "the probabilities of all outcomes sum to 1", f"{total:.6g}", 1, how
        )
        table = dict(zip(outcomes.keys(), log_p.tolist(), strict=True))
        _check_enumeration(report, lm, c, table, exact)
        counts = Counter(draws.select(draws.context == c).keys())
        p_value = chi_square_p_value([counts[key] for key in table], [2.718281828459045**v for v in table.values()])
        law = "draws have the probabilities that score says"
        report.require_likely(p_value, error_rate, law, f"counts that differ for context {c}", "chi-square agreement")
    support = lm.enumerate_support()
    totals = lm.log_prob(support).double().exp().sum(0)
    off = float((totals - 1).abs().max())
    report.require(off <= 10 * exact, "the probabilities of enumerate_support sum to 1", totals.tolist(), 1)


def _all_outcomes(lm: LanguageModel, context: int) -> Sequences:
    tokens = torch.arange(lm.vocab_size, device=lm.device)
    rows = torch.cartesian_prod(*[tokens] * lm.max_new_tokens).view(-1, lm.max_new_tokens)
    parsed = lm.parse(rows, torch.full((len(rows),), context, device=lm.device))
    first = {key: i for i, key in reversed(list(enumerate(parsed.keys())))}
    return parsed.select(sorted(first.values()))


def _check_enumeration(
    report: Report, lm: LanguageModel, context: int, table: dict[tuple[int, bool, tuple[int, ...]], float], exact: float
) -> None:
    listed = lm.enumerate_sequences(context)
    assert listed.log_prior is not None
    keys = listed.keys()
    missing = {key for key, value in table.items() if value > -torch.inf} - set(keys)
    once = not missing and len(set(keys)) == len(keys)
    law = "enumerate_sequences lists every outcome of positive probability once"
    report.require(once, law, f"{len(keys)} rows, {len(missing)} missing", "all of them")
    expected = torch.tensor([table.get(key, -torch.inf) for key in keys], dtype=torch.float64)
    report.require_close(
        listed.log_prior.cpu(), expected, "enumerate_sequences gives the log-probabilities of score", tolerance=exact
    )


def _check_first_tokens(report: Report, lm: LanguageModel, draws: Draws, exact: float, error_rate: float) -> None:
    """Sums and counts at the first token and after the most frequent one, for an LM that is too large for more."""
    size = f"{lm.vocab_size}^{lm.max_new_tokens} rows of tokens are too many"
    report.skip("the probabilities of all outcomes sum to 1", f"{size}; next tokens are checked instead")
    for c in range(lm.num_contexts):
        mine = draws.select(draws.context == c)
        _check_next_tokens(report, lm, c, [], mine.ids[:, 0], exact, error_rate)
        counts = Counter(row[0] for row in mine.token_lists() if len(row) > 1)
        if counts and lm.max_new_tokens > 1:
            ((favourite, _),) = counts.most_common(1)
            follows = (mine.ids[:, 0] == favourite) & (mine.lengths > 1)
            _check_next_tokens(report, lm, c, [favourite], mine.ids[follows, 1], exact, error_rate)


def _check_next_tokens(
    report: Report, lm: LanguageModel, context: int, prefix: list[int], drawn: Tensor, exact: float, error_rate: float
) -> None:
    position = len(prefix)
    rows = torch.tensor([[*prefix, v] for v in range(lm.vocab_size)], device=lm.device)
    lengths = torch.full((lm.vocab_size,), position + 1, device=lm.device)
    unfinished = torch.zeros(lm.vocab_size, dtype=torch.bool, device=lm.device)
    where = torch.full((lm.vocab_size,), context, device=lm.device)
    log_p = lm.token_log_probs(Sequences(rows, lengths, unfinished, where, lm.prompts, lm.decode))[:, position].double()
    total = float(log_p.exp().sum())
    nth = f"token {position + 1}"
    report.require(abs(total - 1) <= 10 * exact, f"the probabilities of {nth} sum to 1", f"{total:.6g}", 1)
    counts = torch.bincount(drawn, minlength=lm.vocab_size).tolist()
    p_value = chi_square_p_value(counts, log_p.exp().tolist())
    law = f"{nth} of draws has the probabilities that token_log_probs says"
    report.require_likely(p_value, error_rate, law, f"counts that differ for context {context}", "chi-square agreement")
