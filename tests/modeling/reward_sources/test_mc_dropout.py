"""Dropout with fixed masks: members by hand, in every batch the same; the model stays as it was."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lmppl
from lmppl.errors import ModelError
from lmppl.modeling.function_contents import content_digest
from tests.modeling.reward_sources.small_models import SENTENCES, Perceptron, bert, features_by_hand, tokenizer


def test_a_member_is_one_thinned_network() -> None:
    """r_m(x) = w·(mask_m ⊙ h(x)) + a, of every member and text; mutant: masks that are not divided by 1 − p."""
    model = Perceptron(0.4)
    source = lmppl.MCDropout(model, tokenizer(), num_masks=12)
    h = features_by_hand(model, SENTENCES)
    masks = torch.stack([source.masks(m)["dropout"] for m in range(12)])
    assert set(masks.flatten().tolist()) == {0.0, 1 / 0.6}
    wanted = (h[:, None, :] * masks) @ model.score.weight[0].detach() + model.score.bias.detach()
    found = source(SENTENCES)
    assert found.shape == (len(SENTENCES), 12)
    assert float((found - wanted).abs().max()) < 1e-12
    mutant = (h[:, None, :] * (masks > 0)) @ model.score.weight[0].detach() + model.score.bias.detach()
    assert float((found - mutant).abs().max()) > 0.1


def test_mean_and_variance_over_masks() -> None:
    """E = w·h + a and Var = p/(1−p) Σ w²h² over all masks: z-tests over 1,000 of them, at 4.5 standard errors."""
    model = Perceptron(0.4)
    found = lmppl.MCDropout(model, tokenizer(), num_masks=1000, seed=3)(SENTENCES)
    weight = model.score.weight[0].detach()
    h = features_by_hand(model, SENTENCES)
    mean, variance = h @ weight + model.score.bias.detach(), 0.4 / 0.6 * (h * weight).square().sum(1)
    assert bool(((found.mean(1) - mean).abs() < 4.5 * (variance / 1000).sqrt()).all())
    spread = (found - found.mean(1, keepdim=True)).square()
    assert bool(((spread.mean(1) - variance).abs() < 4.5 * spread.std(1) / 1000**0.5).all())


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_belief_does_not_depend_on_the_batch(batch_size: int) -> None:
    """Of a BERT, whose layers see (B, T, H) with padding; mutant: torch's own dropout."""
    model = bert(hidden_dropout_prob=0.3)
    source = lmppl.MCDropout(model, tokenizer(), num_masks=4, batch_size=batch_size)
    together = source(SENTENCES)
    assert {width for width, _ in source.layers.values()} == {8}
    assert len(source.layers) == 1 + 2 * 2 + 1  # embeddings, two in each of two blocks, the head
    alone = torch.cat([source([text]) for text in SENTENCES])
    backwards = source(SENTENCES[::-1]).flip(0)
    repeated = source([text for text in SENTENCES for _ in range(3)])[::3]
    for other in (alone, backwards, repeated, source(SENTENCES)):
        assert float((together - other).abs().max()) < 1e-12
    assert float(together.std(1).min()) > 1e-2  # the masks do something
    reader = lmppl.Reward.from_pretrained(model, tokenizer()).features[0].fn
    model.train()
    assert float((reader(SENTENCES) - reader(SENTENCES)).abs().max()) > 1e-2


def test_the_model_and_the_generators_stay_as_they_were() -> None:
    model = bert(hidden_dropout_prob=0.3)
    before = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    reward = lmppl.Reward.from_pretrained(model, tokenizer()).features[0].fn
    logits, state = reward(SENTENCES), torch.get_rng_state()
    source = lmppl.MCDropout(model, tokenizer(), num_masks=3)
    source(SENTENCES)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()] == before
    assert torch.equal(reward(SENTENCES), logits)
    with pytest.raises(ModelError, match="more than the 8"):
        source(["good " * 9])
    assert [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()] == before


def test_seeds_and_layers_and_contents() -> None:
    model = bert(hidden_dropout_prob=0.3)
    first, second = (lmppl.MCDropout(model, tokenizer(), num_masks=3, seed=seed) for seed in (0, 1))
    again = pickle.loads(pickle.dumps(first))
    assert torch.equal(first(SENTENCES), again(SENTENCES))
    assert float((first(SENTENCES) - second(SENTENCES)).abs().max()) > 1e-2
    assert content_digest(first) == content_digest(again) != content_digest(second)
    head = lmppl.MCDropout(model, tokenizer(), num_masks=3, layers=["dropout"])
    assert list(head.layers) == ["dropout"]
    assert torch.equal(head.masks(1)["dropout"], first.masks(1)["dropout"])


class Attentive(Perceptron):
    """Drops entries of a (B, 1, T, T) table of attention weights, too."""

    def __init__(self) -> None:
        super().__init__(0.4)
        self.attention = nn.Dropout(0.1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        self.attention(torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1]))
        return super().forward(input_ids, attention_mask)


class Channels(Perceptron):
    """Drops whole channels."""

    def __init__(self) -> None:
        super().__init__(0.4)
        self.dropout = nn.Dropout1d(0.4)  # type: ignore[assignment]


def make(model: Any, **options: Any) -> Any:
    return lmppl.MCDropout(model, tokenizer(), **options)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: make(Perceptron(0.0)), r"no dropout layer with p > 0.*DeepEnsemble or LaplaceLastLayer"),
        (lambda: make(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), "no dropout layer with p > 0"),
        (lambda: make(Perceptron(0.4).train()), "MCDropout: the model is in training mode"),
        (lambda: make(Perceptron(0.4), num_masks=1), "num_masks=1"),
        (lambda: make(Perceptron(0.4), layers=["head"]), r"layers=\['head'\], expected some of \['dropout'\]"),
        (lambda: make(Perceptron(1.0)), "expected torch.nn.Dropout with p < 1"),
        (lambda: make(Channels()), "layer 'dropout' is Dropout1d"),
        (lambda: make(Attentive()), r"'attention' sees .*attention weights\): leave it out with layers=\['dropout'\]"),
    ],
    ids=["none", "none in bert", "training", "one mask", "name", "all", "channels", "attention"],
)
def test_what_cannot_be_thinned(build: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build()
