"""content_digest: equal for functions of equal content, in every process, and for no others that it can see."""

import dataclasses
import enum
import functools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from lmppl.lm.tabular import TabularLM
from lmppl.modeling.declared_functions import LabelScore
from lmppl.modeling.evidence import RemoteJudge
from lmppl.modeling.function_contents import content_digest
from lmppl.modeling.label_scores import fitted_score


class Tone(enum.Enum):
    GOOD = 1
    BAD = 2


@dataclasses.dataclass
class Options:
    weight: float
    words: tuple[str, ...] = ()


class Scorer:
    scale = 1.0

    def __init__(self, weight):
        self.weight = weight
        self.own = self.score  # a cycle

    def __call__(self, texts):
        return [self.weight * self.scale * len(t) for t in texts]

    def score(self, texts):
        return self(texts)

    @functools.cached_property
    def twice(self):
        return 2 * self.weight


class Doubled(Scorer):
    scale = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    weight: float

    def __call__(self, texts):
        return [self.weight] * len(texts)


class Net(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def forward(self, texts):
        return self.weight.expand(len(texts))


def closing_over(value):
    def score(texts):
        return [value for _ in texts]

    return score


def written(source):
    """A module-level function of this source: equal names, other bodies."""
    space = {"__name__": "user"}
    exec(source, space)
    return space["score"]


def scaled(texts, weight=1.0, *, power=1):
    return [weight * len(t) ** power for t in texts]


def recursive(depth):
    def score(texts):
        return [depth] if depth == 0 else score(texts)

    return score


def fitted(classifier, weight=1.0):
    """A classifier of texts, fitted; the first text has a weight."""
    texts = ["good film", "bad film", "a very good play", "a dull play"]
    pipeline = make_pipeline(TfidfVectorizer(), classifier)
    name = pipeline.steps[-1][0]
    return pipeline.fit(texts, ["pos", "neg", "pos", "neg"], **{f"{name}__sample_weight": [weight, 1, 1, 1]})


def score_of(classifier, label="pos"):
    return fitted_score(classifier, label, "Reward")


def linear(weight=1.0):
    return fitted(LogisticRegression(), weight)


class Around:
    """An object around a network, as a pipeline is."""

    def __init__(self, weight):
        self.model, self.calls = Net(weight), 0

    def __call__(self, texts):
        self.calls += 1
        return [{"label": "good", "score": 0.5}] * len(texts)


SOURCE = "def score(texts):\n    return [{} for t in texts]"

PAIRS = {
    "body": [lambda v=v: written(SOURCE.format(v)) for v in (1, 2)],
    "default": [lambda v=v: written(f"def score(texts, a={v}):\n    return a") for v in (1, 2)],
    "keyword default": [lambda v=v: written(f"def score(texts, *, a={v}):\n    return a") for v in (1, 2)],
    "type": [lambda v=v: closing_over(v) for v in (1, 1.0)],
    "string": [lambda v=v: closing_over(v) for v in ("a", "b")],
    "list": [lambda v=v: closing_over([1, v]) for v in (1, 2)],
    "tuple or list": [lambda: closing_over((1,)), lambda: closing_over([1])],
    "set": [lambda v=v: closing_over({"a", v}) for v in ("b", "c")],
    "dict": [lambda v=v: closing_over({"a": {"b": v}}) for v in (1, 2)],
    "tensor": [lambda v=v: closing_over(torch.tensor([0.0, v])) for v in (1, 2)],
    "shape": [lambda v=v: closing_over(torch.zeros(v)) for v in ((2, 3), (3, 2))],
    "array": [lambda v=v: closing_over(np.arange(v)) for v in (3, 4)],
    "array of objects": [lambda v=v: closing_over(np.array(["a", v], dtype=object)) for v in ("a", "b")],
    "regular expression": [lambda v=v: closing_over(re.compile(v)) for v in ("a+", "b+")],
    "method of a built-in": [lambda v=v: closing_over(re.compile(v).search) for v in ("a+", "b+")],
    "enum": [lambda v=v: closing_over(v) for v in Tone],
    "dataclass": [lambda v=v: closing_over(Options(v)) for v in (1, 2)],
    "function": [lambda v=v: closing_over(closing_over(v)) for v in (1, 2)],
    "recursive": [lambda v=v: recursive(v) for v in (1, 2)],
    "language model": [lambda v=v: closing_over(TabularLM.random(2, 2, seed=v)) for v in (1, 2)],
    "network": [lambda v=v: closing_over(Net(v)) for v in (1.0, 2.0)],
    "other objects": [lambda v=v: closing_over(v()) for v in (object, Exception)],
    "partial": [lambda v=v: functools.partial(scaled, weight=v) for v in (1, 2)],
    "partial of an object": [lambda v=v: functools.partial(Scorer(v)) for v in (1, 2)],
    "callable object": [lambda v=v: Scorer(v) for v in (1, 2)],
    "class constant": [lambda v=v: v(1) for v in (Scorer, Doubled)],
    "slots": [lambda v=v: Slotted(v) for v in (1.0, 2.0)],
    "bound method": [lambda v=v: Scorer(v).score for v in (1, 2)],
    "called network": [lambda v=v: Net(v) for v in (1.0, 2.0)],
    "label": [lambda v=v: LabelScore(scaled, v) for v in ("good", "bad")],
    "fingerprint": [lambda v=v: closing_over(types.SimpleNamespace(fingerprint=v)) for v in ("a", "b")],
    "judge": [lambda v=v: RemoteJudge(v) for v in ("http://a/", "http://b/")],
    "judge that is used": [lambda v=v: closing_over(RemoteJudge(v)) for v in ("http://a/", "http://b/")],
    "adapter of a judge": [lambda v=v: RemoteJudge("http://a/", response=closing_over(v)) for v in (1, 2)],
    "pipeline": [lambda v=v: LabelScore(Around(v), "good") for v in (1.0, 2.0)],
    "log of a score": [lambda v=v: LabelScore(scaled, "good", v) for v in (False, True)],
    "linear classifier": [lambda v=v: score_of(linear(v)) for v in (1.0, 2.0)],
    "its column": [lambda v=v: score_of(linear(), v) for v in ("pos", "neg")],
    "its method": [lambda v=v: linear(v).decision_function for v in (1.0, 2.0)],
    "tree": [lambda v=v: score_of(fitted(DecisionTreeClassifier(random_state=0), v)) for v in (1.0, 2.0)],
    "forest": [lambda v=v: score_of(fitted(RandomForestClassifier(3, random_state=0), v)) for v in (1.0, 2.0)],
    "support vectors": [lambda v=v: fitted(SVC(), v).decision_function for v in (1.0, 4.0)],
    "wrapped": [lambda v=v: functools.lru_cache(closing_over(v)) for v in (1, 2)],
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_another_content_is_another_digest(make):
    first, second = make
    assert content_digest(first()) == content_digest(first())
    assert content_digest(first()) != content_digest(second())


def test_what_is_not_seen():
    one, other = (written(f"SIZE = {v}\ndef score(texts):\n    return SIZE") for v in (1, 2))
    assert content_digest(one) == content_digest(other), "global variables"
    assert content_digest(closing_over(Scorer(1))) == content_digest(closing_over(Scorer(2))), "insides of objects"


def test_a_pipeline_that_has_run_is_the_same():
    score = LabelScore(Around(1.0), "good")
    before = content_digest(score)
    assert score(["a"]) == [0.5]
    assert score.pipeline.calls == 1
    assert content_digest(score) == before


def test_what_is_remembered_on_the_way_changes_nothing():
    scorer = Scorer(1)
    before = content_digest(scorer)
    assert scorer.twice == 2
    assert content_digest(scorer) == before


def test_a_name_without_a_value_yet():
    def outer():
        def score(texts):
            return later

        digest = content_digest(score)
        later = 1
        return digest, content_digest(score), later

    before, after, _ = outer()
    assert before != after


def test_digests_agree_between_processes():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_function_contents import PAIRS, content_digest\n"
        "print(*(content_digest(make()) for pair in PAIRS.values() for make in pair))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    outputs = [
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 2 * len(PAIRS)
