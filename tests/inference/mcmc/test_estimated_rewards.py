"""An unbiased estimate of a *reward*, exponentiated, is no unbiased estimate of φ: chains keep another posterior."""

import pytest
import torch

from lmppl.inference.mcmc import Restart, SuffixResample
from lmppl.modeling.evidence.reward import Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.target import Target
from lmppl.testing.enumeration import every_outcome
from tests.inference.mcmc.kernel_matrices import CONTEXT, EXACT, VISIBLE, draws_at, law_at, tiny_lm
from tests.models import brute_force, wavy

BETA = 0.4
SIGNS = (1.0, -1.0)


def spread(texts):
    """The standard deviation of the estimate, larger where there is an a."""
    return torch.tensor([0.5 if "a" in t else 0.1 for t in texts], dtype=torch.float64)


def estimated(lm, current):
    """r̂ = wavy ± spread, each sign with probability 1/2: E r̂ = wavy."""

    def fn(texts):
        signs = torch.tensor(SIGNS, dtype=torch.float64)[current["source"].integers(torch.full((len(texts),), 2))]
        return torch.tensor(wavy(texts), dtype=torch.float64) + signs * spread(texts)

    return lm * Reward(Feature("r", fn, stochastic=True), beta=BETA, name="r")


@pytest.mark.parametrize("kernel", [Restart(), SuffixResample()], ids=lambda k: k.name)
def test_chains_keep_the_posterior_of_the_marginal_reward(kernel):
    lm, current = tiny_lm("tabular", horizon=2), {}
    model, mean = estimated(lm, current), lm * Reward(wavy, beta=BETA)
    target, brute = Target(model), brute_force(mean, CONTEXT)
    wide = spread(brute.sequences.text)
    number = {key: i for i, key in enumerate(brute.sequences.keys())}
    matrix = torch.zeros(2 * len(number), 2 * len(number), dtype=torch.float64)
    for i in range(len(number)):
        for k, sign in enumerate(SIGNS):
            reward = (BETA * brute.log_phi + sign * wide)[i : i + 1]
            columns = {"features": {"r": reward}, "log_factors": {"r": reward / BETA}}
            start = draws_at(model, brute, [i]).with_columns(**columns)

            def run(source, start=start):
                current["source"] = source
                state, _ = kernel.step(kernel.start(target, start), source)
                return state.draws.keys()[0], float(state.draws.log_factors["r"][0])

            for probability, (key, log_phi) in every_outcome(run):
                to = number[key]
                matrix[2 * i + k, 2 * to + int(log_phi < float(brute.log_phi[to]))] += probability
    both = torch.stack([brute.log_gamma + s * wide / BETA for s in SIGNS], 1)  # γ̂ of each row and sign
    law = torch.softmax(both.flatten(), 0)
    assert float((matrix.sum(1) - 1).abs().max()) < EXACT
    assert float((law @ matrix - law).abs().max()) < EXACT
    rows = law.view(-1, 2).sum(1)
    marginal = torch.softmax(brute.log_gamma + torch.cosh(wide / BETA).log(), 0)  # log E e^{r̂/β}
    assert float((rows - marginal).abs().max()) < EXACT
    assert float((rows - law_at(brute)).abs().max()) > VISIBLE  # mutant: not that of the mean reward
    assert float(marginal[wide == 0.5].sum()) > float(law_at(brute)[wide == 0.5].sum())  # it seeks what is uncertain
