"""Transition matrices of kernels on enumerable models, by two ways that share no code.

`suffix_matrix` is written out from a kernel's own law of positions, ratio and acceptance, with scores of uncached
forwards; `walked_matrix` runs `kernel.step` with every outcome of its choices, caches included.
"""

import math

import torch
from torch import Tensor

from lmppl.inference.mcmc.chains import log_acceptance
from lmppl.inference.mcmc.kernels import Scores
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.target import Target
from lmppl.sequences import Draws
from lmppl.testing.enumeration import every_outcome
from tests.models import brute_force, count_of, has_no, wavy

EXACT = 1e-12
VISIBLE = 1e-4  # a mutant must be wrong by this much
CONTEXT = 1  # the longer one; the other is in the same batch wherever there is more than one row

SHAPES = {
    "soft": lambda lm: lm * Reward(wavy, beta=0.4),
    "counts": lambda lm: lm * Reward(count_of("a"), beta=0.7),
    "hard": lambda lm: lm * Reward(wavy, beta=0.4) * Constraint(has_no("b")),
}


def tiny_lm(kind, seed=0, horizon=None, temperature=1.0):
    """V = 3 with EOS, T = 3 (tables) or 2 (networks), contexts of different length: 15 or 7 outcomes.

    At temperature 1 the networks give one outcome nearly all mass.
    """
    if kind == "tabular":
        return TabularLM.random(3, horizon or 3, order=2, seed=seed, context=["", "ab"])
    from lmppl.lm.transformers import TransformersLM
    from tests.lm.random_models import build, tokenizer

    options = {"context": ["ab", "bacab"], "max_new_tokens": horizon or 2, "temperature": temperature}
    return TransformersLM(build(kind, 3, seed=seed), tokenizer=tokenizer(3), **options)


def law_at(brute, power=1.0) -> Tensor:
    """(S,) π0·φ^power, normalised."""
    log_phi = torch.where(torch.tensor(power == 0.0), 0.0, power * brute.log_phi)
    return torch.softmax(torch.where(brute.log_prior > -math.inf, brute.log_prior + log_phi, -math.inf), 0)


def off_balance(matrix, law) -> tuple[float, float]:
    """max|π K − π| and max|π_x K_xy − π_y K_yx|."""
    flow = law[:, None] * matrix
    return float((law @ matrix - law).abs().max()), float((flow - flow.T).abs().max())


def draws_at(model, brute, rows) -> Draws:
    s = brute.sequences.select(rows)
    return Draws(s.ids, s.lengths, s.finished, s.context, s.prompts, model.prior.decode)


def walked_matrix(kernel, model, context=CONTEXT, power=1.0):
    """(S, S) of `kernel.step` from each row with π0·φ^power > 0; other rows stay."""
    target, brute = Target(model), brute_force(model, context)
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    matrix = torch.eye(len(number), dtype=torch.float64)
    for i in torch.nonzero(law_at(brute, power) > 0).squeeze(1).tolist():
        start = draws_at(model, brute, [i])

        def run(source, start=start):
            state = kernel.start(target, start, power=power)
            state, _ = kernel.step(state, source, power)
            return state.draws.keys()[0]

        matrix[i] = 0.0
        for probability, key in every_outcome(run):
            matrix[i, number[key]] += probability
    assert float((matrix.sum(1) - 1).abs().max()) < EXACT
    return matrix, brute


def entropies(lm, sequences) -> Tensor:
    """(S, T) entropy of the law of each token, from the scores of all outcomes."""
    scores, rows = lm.token_log_probs(sequences), sequences.token_lists()
    laws: dict[tuple, dict[int, float]] = {}
    for row, line in zip(rows, scores.tolist(), strict=True):
        for t, token in enumerate(row):
            laws.setdefault(tuple(row[:t]), {})[token] = line[t]
    result = torch.zeros(scores.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        for t in range(len(row)):
            result[i, t] = -sum(math.exp(p) * p for p in laws[tuple(row[:t])].values() if p > -math.inf)
    return result


def suffix_matrix(kernel, model, context=CONTEXT, *, log_ratio=None, accept=log_acceptance, proposed=None, power=1.0):
    """(S, S) Σ_i p(i|x) q(x'|x_<i) α, written out; the keyword arguments put a mutant's parts in the kernel's place.

    `proposed` gives the LM (another cap, say) whose scores are the probabilities of what is proposed.
    """
    brute, lm = brute_force(model, context), kernel.lm(Target(model))
    rows, horizon = brute.sequences, model.prior.max_new_tokens
    count = len(rows)
    prior, q = (m.token_log_probs(rows).double() for m in (model.prior, lm))
    drawn = q if proposed is None else proposed
    index = kernel.log_index_law(rows.lengths, horizon, entropies(lm, rows))
    old_at, new_at = (x.flatten() for x in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))

    def scores(at):
        return Scores(rows.ids[at], rows.lengths[at], prior[at], q[at], index[at])

    matrix = torch.zeros(count * count, dtype=torch.float64)
    for keep in range(horizon):
        same = (rows.ids[old_at, :keep] == rows.ids[new_at, :keep]).all(1)
        inside = same & (rows.lengths[old_at] > keep) & (rows.lengths[new_at] > keep)
        at = torch.full_like(old_at, keep)
        ratio = (log_ratio or kernel.log_ratio)(scores(old_at), scores(new_at), at)
        alpha = accept(ratio, brute.log_phi[new_at], brute.log_phi[old_at], power)
        chance = index[old_at, keep] + drawn[new_at, keep:].sum(1) + alpha
        matrix += torch.where(inside, chance.exp().nan_to_num(0.0), 0.0)
    matrix = matrix.view(count, count)
    return matrix + torch.diag(1 - matrix.sum(1)), brute
