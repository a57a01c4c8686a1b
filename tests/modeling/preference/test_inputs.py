"""Pairs and features that no reward can be learned from: one clear error each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lmppl
from lmppl import BayesianRewardModel, Preference, PreferenceDistribution
from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.modeling.evidence.preference.pairs import read_pairs

TEXTS = ["a", "bb", "ccc!", "dddd", "e!", "ffffff"]
PAIRS: list[Any] = [("a", "bb"), ("ccc!", "dddd"), ("e!", "ffffff"), ("bb", "dddd"), ("e!", "bb"), ("dddd", "a")]


def shape(texts: list[str]) -> list[list[float]]:
    return [[len(t), t.count("!")] for t in texts]


def test_pairs_come_in_three_forms() -> None:
    one = Preference("a", "bb", context="c: ", annotator=None, tie=False)
    rows = [one, ("a", "bb"), {"prompt": "c: ", "chosen": "a", "rejected": "bb", "label": 0}, ["a", "bb"]]
    assert read_pairs(rows, "who", "full").chosen == ["c: a", "a", "c: a", "a"]
    assert read_pairs(rows, "who", "text").rejected == ["bb"] * 4
    named = read_pairs([Preference("a", "b", annotator=n) for n in ("z", "y", "z")], "who", "text")
    assert named.annotators == ("y", "z")
    assert named.annotator.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "got no pairs, expected a list"),
        ([("a", "bb")], "got a single pair"),
        ([*PAIRS, ("a", "a")], "pair 6 has the text 'a' on both sides"),
        ([Preference(*p, tie=True) for p in PAIRS], "all 6 pairs are ties"),
        ([Preference(*p, annotator="ann") for p in PAIRS], "every pair has the annotator 'ann'"),
        ([Preference("a", "bb", annotator="ann"), ("bb", "a")], "pair 1 names no annotator and others do"),
        ([{"chosen": "a"}, ("a", "bb")], "pair 0 lacks 'rejected'"),
        ([("a", "bb", "c")], "pair 0 is a tuple of 3, expected"),
        (["ab"], "pair 0 is a str, expected"),
        ([({"role": "user"}, "bb")], "pair 0 has chosen=a dict, expected a string; make one of chat turns"),
        ([{"chosen": "a", "rejected": "b", "tie": 1}], "pair 0 has tie=1, expected True or False"),
        ([{"chosen": "a", "rejected": "b", "annotator": 3}], "pair 0 has annotator=3, expected a name"),
    ],
)
def test_pairs_that_say_nothing(pairs: list[Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        BayesianRewardModel.fit(pairs, shape)


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        (lambda ts: [[1.0, len(t)] for t in ts], ModelError, "feature column 0 is constant over the training texts"),
        (lambda ts: [[len(t), 7.0, -7.0] for t in ts], ModelError, "feature column 1, 2 is constant"),
        (lambda ts: [[math.nan if t == "e!" else len(t)] for t in ts], FactorError, "column 0 is nan.* the text 'e!'"),
        (lambda ts: [[len(t), math.inf] for t in ts], FactorError, "feature column 1 is inf, expected a finite number"),
        (lambda ts: [len(t) for t in ts], ShapeError, r"features returned shape \(6,\), expected \(6, D\)"),
        (
            lambda ts: [[1.0] * (i + 1) for i in range(len(ts))],
            ShapeError,
            r"list that is no matrix.*expected \(6, D\)",
        ),
        (lambda ts: [["long"] for _ in ts], ShapeError, "no matrix of numbers"),
        (lambda ts: torch.zeros(2, 3), ShapeError, r"features returned shape \(2, 3\), expected \(6, D\)"),
        ("length", ModelError, "got features=str, expected a function"),
    ],
)
def test_features_that_bear_no_weight(features: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        BayesianRewardModel.fit(PAIRS, features)


def test_a_feature_of_the_context_alone_is_named() -> None:
    """It differs between pairs and never within one."""
    rows = [Preference(a, b, context="long " * (i % 2)) for i, (a, b) in enumerate(PAIRS)]

    def features(texts: list[str]) -> list[list[float]]:
        return [[float(t.startswith("long")), len(t)] for t in texts]

    with pytest.raises(ModelError, match="feature column 0 is the same on both sides of every pair"):
        BayesianRewardModel.fit(rows, features, on="full")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"posterior": "vb"}, "got posterior='vb', expected one of 'laplace', 'nuts', 'autoguide'"),
        ({"prior_scale": 0.0}, "got prior_scale=0.0, expected a positive number"),
        ({"prior_scale": "big"}, "got prior_scale='big'"),
        ({"noise": 0.5}, "got noise=0.5, expected a share of choices"),
        ({"num_draws": 1}, "got num_draws=1"),
        ({"on": "ids"}, "got on='ids', expected 'text' or 'full'"),
        ({"num_references": -1}, "got num_references=-1"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        BayesianRewardModel.fit(PAIRS, shape, **{"prior_scale": 1.0} | options)


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda: PreferenceDistribution.fit(PAIRS, shape, kind="beta"), "got kind='beta'"),
        (lambda: PreferenceDistribution.fit(PAIRS, shape, kind="categorical", num_levels=1), "got num_levels=1"),
        (lambda: PreferenceDistribution.fit(PAIRS, shape, prior_scale=-1.0), "prior_scale"),
        (lambda: PreferenceDistribution.fit([*PAIRS, Preference("a", "e!", tie=True)], shape), "1 of 7 pairs are ties"),
        (lambda: PreferenceDistribution(shape), "got function, expected what PreferenceDistribution.fit"),
        (lambda: BayesianRewardModel(shape), "got function, expected what BayesianRewardModel.fit"),
        (lambda: lmppl.LMFeatures(lmppl.TabularLM.random(2, 2, order=1, seed=0)), "TabularLM, which has no hidden"),
    ],
)
def test_what_else_is_refused(fit: Callable[[], Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        fit()


def test_errors_after_the_fit_name_the_factor() -> None:
    width = [2]

    def features(texts: list[str]) -> torch.Tensor:
        return torch.tensor(shape(texts), dtype=torch.float64)[:, : width[0]]

    reward = BayesianRewardModel.fit(PAIRS, features, prior_scale=1.0, name="helpful")
    width[0] = 1
    model = lmppl.TabularLM.random(3, 2, order=1, seed=0) * reward
    with pytest.raises(ShapeError, match=r"factor 'helpful': helpful: the features have 1 columns, expected 2"):
        lmppl.infer(model, lmppl.Importance(4))
    width[0] = 2
    with pytest.raises(ModelError, match="got ties, and the model was fitted to pairs without"):
        reward.evaluate([Preference("a", "bb", tie=True), ("e!", "a")])
