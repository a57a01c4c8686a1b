"""The last layer's Gaussian: mode, curvature and moments by hand; features pooled as the model pools."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import lmppl
from lmppl.errors import ModelError
from lmppl.modeling.evidence.reward_sources.laplace import gaussian_head
from lmppl.modeling.function_contents import content_digest
from tests.modeling.reward_sources.small_models import SENTENCES, Perceptron, bert, features_by_hand, llama, tokenizer

PAIRS = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[2], SENTENCES[3]), (SENTENCES[0], SENTENCES[4])]
LABELS = [(text, i % 2 == 0) for i, text in enumerate(SENTENCES)]


def fit(model: Any, data: Any, **options: Any) -> lmppl.LaplaceLastLayer:
    return lmppl.LaplaceLastLayer.fit(model, tokenizer(), data, **options)


def negative_log_joint(theta: Tensor, design: Tensor, start: Tensor, scale: float) -> Tensor:
    return softplus(-(design @ theta)).sum() + (theta - start).square().sum() / (2 * scale**2)


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_the_mode_and_its_curvature(scale: float) -> None:
    """The gradient vanishes at θ̂, and Σ is the inverse of the Hessian, both by autograd; mutant: at θ0."""
    generator = torch.Generator().manual_seed(0)
    design, start = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((30, 4), (4,)))
    mean, covariance = gaussian_head(design, start, scale)

    def loss(theta: Tensor) -> Tensor:
        return negative_log_joint(theta, design, start, scale)

    at = mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    assert float(gradient.abs().max()) < 1e-6
    hessian = torch.autograd.functional.hessian(loss, mean)
    assert float((covariance @ hessian - torch.eye(4)).abs().max()) < 1e-9
    elsewhere = torch.autograd.functional.hessian(loss, start)
    assert float((covariance @ elsewhere - torch.eye(4)).abs().max()) > 1e-2


def test_pairs_are_bradley_terry_and_labels_are_logistic() -> None:
    """m and s of texts, from features computed by hand; pairs leave the bias out, labels have one."""
    model = Perceptron(0.4)
    h = features_by_hand(model, SENTENCES)
    design = torch.stack([h[SENTENCES.index(a)] - h[SENTENCES.index(b)] for a, b in PAIRS])
    mean, covariance = gaussian_head(design, torch.zeros(6, dtype=torch.float64), 2.0)
    source = fit(model, PAIRS, prior_scale=2.0)
    m, s = source(SENTENCES)
    assert float((m - h @ mean).abs().max()) < 1e-9
    assert float((s - torch.einsum("bi,ij,bj->b", h, covariance, h).sqrt()).abs().max()) < 1e-9
    with_one = torch.cat([h, torch.ones(5, 1, dtype=torch.float64)], 1)
    signs = torch.tensor([1.0 if label else -1.0 for _, label in LABELS], dtype=torch.float64)
    mean, covariance = gaussian_head(signs[:, None] * with_one, torch.zeros(7, dtype=torch.float64), 2.0)
    for data in (LABELS, [(text, int(label)) for text, label in LABELS]):
        m, s = fit(model, data, prior_scale=2.0)(SENTENCES)
        assert float((m - with_one @ mean).abs().max()) < 1e-9
        assert float((s - torch.einsum("bi,ij,bj->b", with_one, covariance, with_one).sqrt()).abs().max()) < 1e-9


def test_a_narrow_prior_around_the_model_is_the_model() -> None:
    model = Perceptron(0.4)
    (feature,) = lmppl.Reward.from_pretrained(model, tokenizer()).features
    m, s = fit(model, LABELS, prior_scale=1e-4, centre="model")(SENTENCES)
    assert float((m - feature.fn(SENTENCES)).abs().max()) < 1e-6
    assert float(s.max()) < 1e-3
    m, _ = fit(model, LABELS, prior_scale=1e-4)(SENTENCES)
    assert float(m.abs().max()) < 1e-6


def test_more_data_leave_less_spread() -> None:
    model = Perceptron(0.4)
    few, many = (fit(model, PAIRS * n, prior_scale=2.0)(SENTENCES)[1] for n in (1, 50))
    assert bool((many < few).all())


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_features_are_pooled_as_the_model_pools(build: Any, batch_size: int) -> None:
    """w·features is the model's own logit, of a BERT (first token) and a Llama (last token), in every batch."""
    model = build()
    source = fit(model, PAIRS, batch_size=batch_size)
    head = model.get_submodule(source.layer)
    features = source.features(SENTENCES)
    made = features @ head.weight[0].detach() + (0.0 if head.bias is None else float(head.bias.detach()))
    (feature,) = lmppl.Reward.from_pretrained(model, tokenizer()).features
    assert float((made - feature.fn(SENTENCES)).abs().max()) < 1e-10
    together, alone = source(SENTENCES), [source([text]) for text in SENTENCES]
    for k in range(2):
        assert float((together[k] - torch.cat([one[k] for one in alone])).abs().max()) < 1e-10
    assert all(len(module._forward_hooks) == 0 for module in model.modules())


def test_contents_and_pickles() -> None:
    source = fit(Perceptron(0.4), PAIRS)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(source(SENTENCES)[1], again(SENTENCES)[1])
    assert content_digest(source) == content_digest(again) != content_digest(fit(Perceptron(0.4), PAIRS[:2]))


def test_it_is_a_belief() -> None:
    lm = lmppl.TabularLM([0.5, 0.3, 0.2], ["good ", "bad ", "<eos>"], context="bad ", max_new_tokens=2)
    source = fit(Perceptron(0.4), PAIRS)
    found = lmppl.infer(lm * lmppl.UncertainReward(source, 1.0, lmppl.Robust(1.0), on="full"), "exact")
    m, s = source(list(found.draws.full_text))
    wanted = m - s.square() / 2
    assert float((found.draws.log_factors["Perceptron"] - wanted).abs().max()) < 1e-10


class Squashed(Perceptron):
    """What comes last is no linear layer."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = torch.tanh(output.logits)
        return output


P = Perceptron(0.4)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: fit(P, []), "got no data, expected pairs"),
        (lambda: fit(P, ["good", "bad"]), "got 'good' as item 0"),
        (lambda: fit(P, [("good", "bad"), ("good", True)]), r"got \('good', 'bad'\) as item 0"),
        (lambda: fit(P, [("good", 0.5)]), r"got \('good', 0.5\) as item 0"),
        (lambda: fit(P, PAIRS, prior_scale=0.0), "prior_scale=0.0"),
        (lambda: fit(P, PAIRS, centre="here"), "centre='here'"),
        (lambda: fit(P, PAIRS, layer="head"), r"layer='head', expected the name of a linear layer, such as \['hidden'"),
        (lambda: fit(P, PAIRS, layer="hidden"), "'hidden' has 6 outputs, not one"),
        (lambda: fit(Squashed(0.4), PAIRS), "'score' is not the model's last one"),
        (lambda: fit(Perceptron(0.4).train(), PAIRS), "LaplaceLastLayer: the model is in training mode"),
    ],
    ids=["no data", "texts", "mixed", "share", "scale", "centre", "name", "hidden", "squashed", "training"],
)
def test_what_cannot_be_fitted(build: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build()
