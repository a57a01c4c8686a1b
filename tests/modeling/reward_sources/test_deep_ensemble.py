"""Deep ensembles: the members' own rewards, by name where one errs."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

import lmppl
from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.function_contents import content_digest
from tests.modeling.reward_sources.small_models import SENTENCES, bert, tokenizer
from tests.models import TOLERANCE, brute_force, count_of, wavy

LM = TabularLM.random(3, 2, seed=5)


def length(texts: list[str]) -> list[int]:
    return [len(t) for t in texts]


def test_the_posterior_is_that_of_the_stacked_members() -> None:
    def stacked(texts: list[str]) -> list[list[float]]:
        return [[w, float(n)] for w, n in zip(wavy(texts), length(texts), strict=True)]

    ensemble = lmppl.DeepEnsemble([wavy, length])
    laws = [brute_force(LM * lmppl.UncertainReward(fn, 0.7, lmppl.Robust(1.0)), 0) for fn in (ensemble, stacked)]
    assert float((laws[0].log_posterior - laws[1].log_posterior).nan_to_num(0.0).abs().max()) < TOLERANCE


def test_sequence_classifiers_are_members() -> None:
    models = [bert(seed) for seed in range(3)]
    ensemble = lmppl.DeepEnsemble.from_pretrained(models, tokenizer(), batch_size=2)
    for m, model in enumerate(models):
        (feature,) = lmppl.Reward.from_pretrained(model, tokenizer()).features
        assert float((ensemble(SENTENCES)[:, m] - feature.fn(SENTENCES)).abs().max()) < 1e-12
    changed = lmppl.DeepEnsemble.from_pretrained([*models[:2], bert(7)], tokenizer(), batch_size=2)
    assert content_digest(ensemble) != content_digest(changed)  # the weights of members count
    assert content_digest(ensemble) == content_digest(pickle.loads(pickle.dumps(ensemble)))


def test_equal_members_are_one_feature() -> None:
    first, second = (lmppl.DeepEnsemble([wavy, length]) for _ in range(2))
    model = LM * lmppl.UncertainReward(first, 1.0, lmppl.Mean()) * lmppl.UncertainReward(second, 1.0, lmppl.Mean())
    assert len(model.features) == 1


def nan(texts: list[str]) -> list[float]:
    return [math.nan if t == "b" else 0.0 for t in texts]


def short(texts: list[str]) -> list[float]:
    return [0.0] * (len(texts) - 1)


def raises(texts: list[str]) -> list[float]:
    return [1.0 / (t != "b") for t in texts]


def several(texts: list[str]) -> list[list[float]]:
    return [[0.0, 1.0] for _ in texts]


@pytest.mark.parametrize(
    ("fn", "kind", "told"),
    [
        (nan, FactorError, r"member 1 \(nan\) returned nan, expected a finite number, for the text 'b'"),
        (short, ShapeError, r"member 1 \(short\) returned: got shape"),
        (several, ShapeError, r"member 1 \(several\) returned shape .*: one number a text"),
        (raises, FactorError, r"member 1 \(raises\) raised ZeroDivisionError: .* on the text 'b'"),
    ],
    ids=["nan", "short", "several", "raises"],
)
def test_errors_name_the_factor_the_member_and_the_text(fn: Any, kind: type[Exception], told: str) -> None:
    model = LM * lmppl.UncertainReward(lmppl.DeepEnsemble([wavy, fn]), 1.0, lmppl.Mean(), name="r")
    with pytest.raises(kind, match=f"factor 'r': .*{told}"):
        lmppl.infer(model, "exact")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: lmppl.DeepEnsemble([wavy]), r"got 1 member\(s\).*declare it as Reward"),
        (lambda: lmppl.DeepEnsemble([wavy, 3.0]), r"member 1: got float, expected a function"),
        (lambda: lmppl.DeepEnsemble([wavy, bert()]), "member 1: got the network BertForSequenceClassification"),
        (lambda: lmppl.DeepEnsemble([wavy, lambda prompts, completions: [0.0]]), "member 1: it takes prompts"),
        (lambda: lmppl.DeepEnsemble.from_pretrained(["a", "b"], beta=0.5), "belongs to UncertainReward"),
    ],
    ids=["one", "number", "network", "prompts", "beta"],
)
def test_wrong_ensembles(make: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        make()


def test_every_engine_sees_an_ordinary_factor() -> None:
    model = LM * lmppl.UncertainReward(lmppl.DeepEnsemble([wavy, count_of("a")]), 1.0, lmppl.LowerBound(1.0))
    exact = lmppl.infer(model, "exact").expectation(wavy)
    found = lmppl.infer(model, lmppl.Importance(2000), seed=1).expectation(wavy)
    assert abs(float(exact.value - found.value)) < 4.5 * float(found.standard_error)
