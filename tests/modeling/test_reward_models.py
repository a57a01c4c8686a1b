"""Reward models that people have: sequence classifiers, pipelines, fitted classifiers, functions as TRL takes them."""

from __future__ import annotations

import asyncio
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import lmppl
from lmppl.errors import FactorError, ModelError
from lmppl.modeling.label_scores import BATCH_SIZE
from lmppl.testing import check_factor
from tests.lm.random_models import random_lm

LM = lmppl.TabularLM.random(3, 3, context=["", "b"])
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "very", "a"]
SENTENCES = ["good film", "a very very bad film", "bad", "a good good film", "unknown", "very"]


def reading(texts: list[str]) -> lmppl.Sequences:
    """Sequences that read as `texts`."""
    rows = LM.enumerate_sequences(0).sequences.select(list(range(len(texts))))
    return lmppl.Sequences(rows.ids, rows.lengths, rows.finished, rows.context, LM.prompts, lambda _: texts)


def values(factor: lmppl.Factor, texts: list[str] = SENTENCES) -> torch.Tensor:
    """log φ of texts, by way of a target."""
    return lmppl.Target(LM * factor).log_factors(reading(texts))[factor.name]


def close(got: torch.Tensor, expected: torch.Tensor, atol: float = 1e-10) -> bool:
    return torch.allclose(got, expected, atol=atol, rtol=0)


def tokenizer(side: str = "right", pad: str | None = "[PAD]") -> Any:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, unk_token="[UNK]", model_max_length=8, padding_side=side
    )


@functools.cache
def network(kind: str, num_labels: int = 3, **options: Any) -> Any:
    """A random classifier in float64; GPT-2 and Llama read the last token, which they find by the pad id."""
    torch.manual_seed(num_labels)
    common = {
        "vocab_size": len(WORDS),
        "id2label": {i: f"L{i}" for i in range(num_labels)},
        "label2id": {f"L{i}": i for i in range(num_labels)},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 1.0,
    } | options
    size = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
    }
    if kind == "bert":
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**size, **common))
    elif kind == "gpt2":
        shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
        model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**shape, **common))
    else:
        config = transformers.LlamaConfig(**size, num_key_value_heads=2, **common)
        model = transformers.LlamaForSequenceClassification(config)
    return model.double().eval()


KINDS = ("bert", "gpt2", "llama")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """One sentence after the other, so that nothing is padded: what every batch must give."""
    read = tokenizer()
    return torch.stack([model(**read(s, return_tensors="pt")).logits[0] for s in SENTENCES])


# Reward.from_pretrained.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_the_rows_alone(kind: str, side: str) -> None:
    model = network(kind)
    expected = logits(model).log_softmax(-1)[:, 1]
    for batch_size in (1, 2, 4, 32):
        reward = lmppl.Reward.from_pretrained(model, tokenizer(side), label="L1", batch_size=batch_size)
        assert close(values(reward), expected), batch_size
    assert expected.std() > 0.1


@torch.no_grad()
def test_padding_on_the_left_would_be_wrong() -> None:
    """The mutant that this guards against: positions of GPT-2 that count the padding."""
    model = network("gpt2")
    batch = tokenizer("left")(SENTENCES, padding=True, return_tensors="pt")
    assert not close(model(**batch).logits, logits(model), atol=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_batches_are_batches(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("llama")
    forward, shapes = model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    values(lmppl.Reward.from_pretrained(model, tokenizer(), label="L1", batch_size=batch_size))
    assert [rows for rows, _ in shapes] == {1: [1] * 6, 2: [2, 2, 2], 4: [4, 2], 32: [6]}[batch_size]
    widths = [width for _, width in shapes]
    assert widths == sorted(widths), "texts of similar length go together"


def test_padding_that_cannot_be_told_is_refused() -> None:
    without = network("gpt2", pad_token_id=None)
    other = network("gpt2", pad_token_id=1)
    for model, read, words in [
        (without, tokenizer(), "no padding token"),
        (network("gpt2"), tokenizer(pad=None), "no padding token"),
        (other, tokenizer(), "the tokenizer pads with 0, but model.config.pad_token_id=1"),
    ]:
        with pytest.raises(ModelError, match=f"{words}.*one by one with batch_size=1"):
            lmppl.Reward.from_pretrained(model, read, label="L1")
        reward = lmppl.Reward.from_pretrained(model, read, label="L1", batch_size=1)
        assert close(values(reward, SENTENCES[:4]), logits(model).log_softmax(-1)[:4, 1])


@pytest.mark.parametrize(
    ("dtype", "expected", "atol"),
    [
        (None, torch.float32, 1e-4),
        ("float64", torch.float64, 1e-10),
        (torch.bfloat16, torch.bfloat16, 0.2),
        ("float16", torch.float16, 0.02),
    ],
)
def test_the_dtype_of_a_model_that_is_loaded_here(
    dtype: Any, expected: torch.dtype, atol: float, tmp_path: Any
) -> None:
    model = network("bert")
    model.save_pretrained(tmp_path / "tone")
    tokenizer().save_pretrained(tmp_path / "tone")
    reward = lmppl.Reward.from_pretrained(str(tmp_path / "tone"), label="L2", dtype=dtype, device="cpu")
    loaded = reward.features[0].fn.model
    assert (loaded.dtype, loaded.device.type, loaded.training) == (expected, "cpu", False)
    got = values(reward)
    assert got.dtype == torch.float64
    assert close(got, logits(loaded).double().log_softmax(-1)[:, 2], atol)
    if expected.itemsize > 2:
        assert close(got, logits(model).log_softmax(-1)[:, 2], atol)


def test_dtypes_that_cannot_be() -> None:
    for dtype in ("float31", "int64", torch.int64, "nn"):
        with pytest.raises(ModelError, match=r"got dtype=.*expected float32, bfloat16, float16 or float64"):
            lmppl.Reward.from_pretrained("nowhere", dtype=dtype)
    with pytest.raises(ModelError, match=r"dtype= or device= with a loaded model; move it yourself"):
        lmppl.Reward.from_pretrained(network("bert"), tokenizer(), label="L1", dtype="float64")


def test_the_declaration_of_a_classifier_goes_through_data() -> None:
    model = LM * lmppl.Reward.from_pretrained(network("bert"), tokenizer(), beta=0.5, label="L1")
    again = model.graph.to_model(LM, {name: feature.fn for name, feature in model.features.items()})
    assert again.spec_hash == model.spec_hash
    other = LM * lmppl.Reward.from_pretrained(network("bert", 4), tokenizer(), beta=0.5, label="L1")
    assert other.spec_hash != model.spec_hash, "its weights count"


# Pipelines.


def pipeline(kind: str = "bert", num_labels: int = 3, side: str = "right", **options: Any) -> Any:
    of_model = {name: options.pop(name) for name in ("pad_token_id", "problem_type") if name in options}
    model = network(kind, num_labels, **of_model)
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer(side), **options)


def probabilities(num_labels: int, kind: str = "bert") -> torch.Tensor:
    raw = logits(network(kind, num_labels))
    return raw.sigmoid() if num_labels == 1 else raw.softmax(-1)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_the_score_of_each_label(num_labels: int) -> None:
    expected = probabilities(num_labels)
    pipe = pipeline(num_labels=num_labels)
    for i in range(num_labels):
        reward = lmppl.Reward(pipe, 0.5, label=f"L{i}", upper=1.0)
        assert close(values(reward), expected[:, i] / 0.5, 1e-6)
        assert (reward.name, reward.upper) == (f"L{i}", 2.0)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_the_log_of_the_score_is_a_log_probability(num_labels: int) -> None:
    expected = probabilities(num_labels)[:, 0].log()
    pipe = pipeline(num_labels=num_labels)
    reward = lmppl.Reward(pipe, 0.5, label="L0", log_prob=True)
    assert close(values(reward), expected / 0.5, 1e-5)
    optimality = lmppl.Optimality(pipe, label="L0")
    assert close(values(optimality), expected, 1e-5)
    assert (reward.upper, optimality.upper) == (0.0, 0.0), "so that rejection runs"
    assert lmppl.Reward(pipe, label="L0", log_prob=True, upper=-0.5).upper == -0.5
    assert not close(values(lmppl.Reward(pipe, 0.5, label="L0")), expected / 0.5, 0.1), "the score is another reward"
    exact = lmppl.Reward.from_pretrained(network("bert", num_labels), tokenizer(), label="L0", log_prob=True)
    assert close(values(optimality), values(exact), 1e-5)


def test_functions_that_a_pipeline_applies() -> None:
    raw = logits(network("bert"))
    plain = pipeline(function_to_apply="none")
    assert close(values(lmppl.Reward(plain, label="L1")), raw[:, 1], 1e-5)
    each = pipeline(function_to_apply="sigmoid")
    assert close(values(lmppl.Optimality(each, label="L1")), raw[:, 1].sigmoid().log(), 1e-5)
    with pytest.raises(FactorError, match=r"factor 'L1'.* is no probability.*leave the pipeline's function_to_apply"):
        values(lmppl.Optimality(plain, label="L1"))
    many = pipeline(problem_type="multi_label_classification")
    assert close(values(lmppl.Reward(many, label="L1")), logits(many.model)[:, 1].sigmoid(), 1e-6)


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_the_top_k_of_a_pipeline_does_not_hide_a_label(top_k: int | None) -> None:
    pipe = pipeline(top_k=top_k)
    for i in range(3):
        assert close(values(lmppl.Reward(pipe, label=f"L{i}")), probabilities(3)[:, i], 1e-6)


def test_labels_that_a_pipeline_does_not_have() -> None:
    with pytest.raises(ModelError, match=re.escape("Reward: got label='GOOD', expected one of the pipeline's ['L0', ")):
        lmppl.Reward(pipeline(), label="GOOD")
    with pytest.raises(FactorError, match=r"choose the score that is meant with label=, one of \['L0', 'L1', 'L2'\]"):
        values(lmppl.Reward(pipeline(), name="tone"))
    with pytest.raises(ModelError, match="log_prob=True without label="):
        lmppl.Reward(pipeline(), log_prob=True)


@pytest.mark.parametrize(
    ("kind", "options", "rows"),
    [
        ("bert", {}, [6]),
        ("bert", {"batch_size": 4}, [4, 2]),
        ("llama", {}, [6]),
        ("gpt2", {"side": "left"}, [1] * 6),
        ("gpt2", {"side": "left", "batch_size": 4}, [1] * 6),
        ("gpt2", {"pad_token_id": None}, [1] * 6),
        ("gpt2", {"pad_token_id": 1}, [1] * 6),
    ],
)
def test_a_whole_batch_goes_into_a_pipeline_at_once(
    kind: str, options: dict[str, Any], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one where rows that are padded together would change each other: then the values are right, if slow."""
    pipe = pipeline(kind, **options)
    expected = logits(pipe.model).softmax(-1)[:, 1]
    forward, shapes = pipe.model.forward, []

    def counted(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(pipe.model, "forward", counted)
    assert close(values(lmppl.Reward(pipe, label="L1")), expected, 1e-6)
    assert shapes == rows
    assert BATCH_SIZE >= 6


def test_weights_of_a_pipeline_count_in_the_hash() -> None:
    pipes = [pipeline(), pipeline(), pipeline("gpt2")]
    hashes = [(LM * lmppl.Reward(pipe, label="L1")).spec_hash for pipe in pipes]
    assert hashes[0] == hashes[1] != hashes[2]
    model = LM * lmppl.Reward(pipes[0], label="L1", log_prob=True)
    assert model.spec_hash != hashes[0]
    values(model.factors[0])
    assert (LM * model.factors[0]).spec_hash == model.spec_hash
    again = model.graph.to_model(LM, {name: feature.fn for name, feature in model.features.items()})
    assert (again.spec_hash, again.factors[0].upper) == (model.spec_hash, 0.0)


# Fitted classifiers, as scikit-learn has them.

CORPUS = ["good film", "a good good film", "very good", "bad film", "a very very bad film", "bad", "a film", "film"]
CLASSES = ["pos", "pos", "pos", "neg", "neg", "neg", "mid", "mid"]


def fitted(classifier: Any) -> Any:
    return make_pipeline(TfidfVectorizer(), classifier).fit(CORPUS, CLASSES)


CLASSIFIERS = {
    "logistic regression": LogisticRegression,
    "naive Bayes": MultinomialNB,
    "tree, which is certain": lambda: DecisionTreeClassifier(max_depth=2, random_state=0),
    "neighbours, by predict_proba alone": lambda: KNeighborsClassifier(3),
    "calibrated, by predict_proba alone": lambda: CalibratedClassifierCV(LinearSVC(), cv=2),
}


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_the_log_probability_of_a_class(make: Any) -> None:
    model = fitted(make())
    with np.errstate(divide="ignore"):
        expected = torch.from_numpy(np.log(model.predict_proba(SENTENCES)))
    assert list(model.classes_) == ["mid", "neg", "pos"]
    for column, label in enumerate(model.classes_):
        optimality = lmppl.Optimality(model, label=str(label))
        assert close(values(optimality), expected[:, column], 1e-12)
        assert (optimality.name, optimality.upper, optimality.hard) == (label, 0.0, None)
    assert len(set(map(tuple, expected.T.tolist()))) == 3, "a wrong column would be seen"


def test_a_reward_by_a_fitted_classifier_has_the_bound_of_a_log_probability() -> None:
    model = fitted(LogisticRegression())
    expected = torch.from_numpy(model.predict_log_proba(SENTENCES))[:, 2]
    reward = lmppl.Reward(model, 0.25, label="pos")
    assert close(values(reward), expected / 0.25, 1e-12)
    assert (reward.upper, reward.reward_upper, reward.formula) == (0.0, 0.0, "exp(pos(x)/0.25)")
    assert lmppl.Reward(model, 0.5, label="pos", upper=-0.1).upper == -0.2
    assert reward.with_beta(0.5).upper == 0.0
    assert lmppl.infer(LM * reward, "rejection", num_draws=5).status == "complete"


def test_a_constraint_and_a_reward_share_a_classifier() -> None:
    model, asked = fitted(LogisticRegression()), []

    class Counting(BaseEstimator, ClassifierMixin):
        classes_ = model.classes_

        def predict(self, texts: list[str]) -> Any:
            return model.predict(texts)

        def predict_log_proba(self, texts: list[str]) -> Any:
            asked.extend(texts)
            return model.predict_log_proba(texts)

    classifier = Counting()
    sure = lmppl.Constraint(classifier, label="pos", where=lambda log_p: log_p > math.log(0.4), name="sure")
    declared = LM * lmppl.Reward(classifier, label="pos") * sure * lmppl.Optimality(classifier, label="neg")
    factors = lmppl.Target(declared).log_factors(reading(SENTENCES))
    assert (factors["sure"] == 0).tolist() == (model.predict_proba(SENTENCES)[:, 2] > 0.4).tolist()
    assert asked == SENTENCES * 2, "once for each class"


@pytest.mark.parametrize(("labels", "label", "column"), [([0, 1], 1, 1), ([False, True], True, 1), ([3, 7], 3, 0)])
def test_classes_that_are_no_strings(labels: list[Any], label: Any, column: int) -> None:
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(CORPUS, [labels[c == "pos"] for c in CLASSES])
    factor = lmppl.Optimality(model, label=label)
    assert close(values(factor), torch.from_numpy(model.predict_log_proba(SENTENCES))[:, column], 1e-12)
    assert factor.name == str(label)


def test_a_search_over_parameters_is_a_classifier() -> None:
    search = GridSearchCV(
        make_pipeline(TfidfVectorizer(), LogisticRegression()), {"logisticregression__C": [1.0]}, cv=2
    )
    with pytest.raises(ModelError, match="GridSearchCV is not fitted"):
        lmppl.Optimality(search, label="pos")
    search.fit(CORPUS, CLASSES)
    assert close(
        values(lmppl.Optimality(search, label="pos")),
        torch.from_numpy(search.predict_log_proba(SENTENCES))[:, 2],
        1e-12,
    )


class Odd(BaseEstimator, ClassifierMixin):
    """Gives back what it is told to."""

    classes_ = np.array(["neg", "pos"])

    def __init__(self, probabilities: Any = None, log_probabilities: Any = None) -> None:
        self.probabilities = probabilities
        if log_probabilities is not None:
            self.predict_log_proba = lambda texts: log_probabilities

    def predict(self, texts: list[str]) -> Any:
        raise AssertionError

    def predict_proba(self, texts: list[str]) -> Any:
        return self.probabilities


def test_a_probability_of_one_is_not_above_its_bound_by_rounding() -> None:
    rounded = Odd([[np.float32(1e-8), np.float32(1.0000001)]] * 6)
    assert 0 >= values(lmppl.Optimality(rounded, label="pos")).max() > -1e-6
    both = Odd([[0.9, 0.8]] * 6)  # each label by itself: they need not add up to 1
    assert values(lmppl.Optimality(both, label="pos")).tolist() == pytest.approx([math.log(0.8)] * 6)
    none = Odd(log_probabilities=np.array([[0.0, -math.inf]] * 6))
    assert values(lmppl.Optimality(none, label="pos")).tolist() == [-math.inf] * 6
    assert values(lmppl.Optimality(none, label="neg")).tolist() == [0.0] * 6
    with pytest.raises(FactorError, match="a log-probability cannot be positive"):
        values(lmppl.Optimality(Odd([[0.2, 1.2]] * 6), label="pos"))
    with pytest.raises(FactorError, match=r"'pos'.*−inf, although this Reward"):
        values(lmppl.Reward(none, label="pos"))


def test_one_text_does_not_change_another() -> None:
    """Normalisation is row by row: a row that does not add up leaves the others alone."""
    log_p = np.log([[0.25, 0.75], [0.9, 0.8], [0.5, 0.5], [0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])
    got = values(lmppl.Optimality(Odd(log_probabilities=log_p), label="pos"))
    assert close(got, torch.from_numpy(log_p)[:, 1], 1e-15)


@pytest.mark.parametrize(
    ("make", "label", "words"),
    [
        (
            lambda: fitted(LogisticRegression()),
            None,
            "label= is needed, expected one of the classes of Pipeline: ['mid',",
        ),
        (lambda: fitted(LogisticRegression()), "POS", "got label='POS', expected one of the classes of Pipeline"),
        (lambda: make_pipeline(TfidfVectorizer(), LogisticRegression()), "pos", "Pipeline is not fitted (it has no"),
        (lambda: LogisticRegression(), "pos", "LogisticRegression is not fitted"),
        (
            lambda: LogisticRegression().fit(np.eye(8), CLASSES),
            "pos",
            "LogisticRegression reads rows of 8 numbers, expected a classifier of texts, such as make_pipeline(",
        ),
        (lambda: fitted(LinearSVC()), "pos", "Pipeline gives no probabilities (it has no predict_log_proba); pass the"),
        (lambda: TfidfVectorizer().fit(CORPUS), "pos", "got TfidfVectorizer, expected a function of a list of texts"),
        (
            lambda: make_pipeline(TfidfVectorizer(), DecisionTreeClassifier()).fit(CORPUS, [[0, 1]] * 8),
            0,
            "Pipeline has 2 outputs, expected one",
        ),
    ],
)
@pytest.mark.parametrize("kind", [lmppl.Reward, lmppl.Optimality, lmppl.Constraint])
def test_what_is_no_fitted_classifier_of_texts(kind: Any, make: Any, label: Any, words: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"{kind.__name__}: {words}")):
        kind(make(), label=label)


def test_answers_that_are_none() -> None:
    for odd, words in [
        (Odd([[0.5, 0.5]]), r"Odd returned probabilities of shape \(1, 2\), expected \(6, 2\)"),
        (Odd([[1.0]] * 6), r"shape \(6, 1\), expected \(6, 2\)"),
        (Odd([[0.5, math.nan]] * 6), r"returned nan, expected a finite number, for the text 'good film'"),
        (Odd([[1.5, -0.5]] * 6), r"returned nan"),
    ]:
        with pytest.raises(ModelError, match=f"factor 'pos': .*{words}"):
            values(lmppl.Optimality(odd, label="pos"))
    half = make_pipeline(TfidfVectorizer(), LogisticRegression().fit(np.eye(8), CLASSES))
    with pytest.raises(FactorError, match=r"factor 'pos'.*NotFittedError"):
        values(lmppl.Optimality(half, label="pos"))


def test_methods_of_other_estimators_are_functions_of_texts() -> None:
    regression = make_pipeline(TfidfVectorizer(), Ridge()).fit(CORPUS, [len(t) for t in CORPUS])
    assert values(lmppl.Reward(regression.predict)).tolist() == regression.predict(SENTENCES).tolist()
    margin = make_pipeline(TfidfVectorizer(), LinearSVC()).fit(CORPUS, [c == "pos" for c in CLASSES])
    assert values(lmppl.Reward(margin.decision_function)).tolist() == margin.decision_function(SENTENCES).tolist()


def test_the_declaration_of_a_fitted_classifier_goes_through_data() -> None:
    model = LM * lmppl.Reward(fitted(LogisticRegression()), 0.5, label="pos")
    again = model.graph.to_model(LM, {name: feature.fn for name, feature in model.features.items()})
    assert (again.spec_hash, again.factors[0].upper) == (model.spec_hash, 0.0)
    assert (LM * lmppl.Reward(fitted(LogisticRegression()), 0.5, label="pos")).spec_hash == model.spec_hash
    for other in (
        lmppl.Reward(fitted(LogisticRegression(C=2.0)), 0.5, label="pos"),
        lmppl.Reward(fitted(LogisticRegression()), 0.5, label="neg"),
    ):
        assert (LM * other).spec_hash != model.spec_hash


@pytest.mark.parametrize("kind", ["table", "llama", "mistral"])
def test_the_laws_of_a_factor(kind: str) -> None:
    """On language models with two contexts of different length, too."""
    letters = make_pipeline(TfidfVectorizer(analyzer="char"), LogisticRegression())
    letters.fit(["aab", "ab", "bbc", "cc"], ["x", "x", "y", "y"])
    check_factor(lmppl.Optimality(letters, label="x", on="full"), LM if kind == "table" else random_lm(kind))


# The TRL convention.

ROWS = lmppl.Sequences(
    LM.enumerate_sequences(0).sequences.ids[:3],
    LM.enumerate_sequences(0).sequences.lengths[:3],
    LM.enumerate_sequences(0).sequences.finished[:3],
    torch.tensor([0, 1, 1]),
    LM.prompts,
    lambda _: ["a", "bb", "abc"],
)


def trl_values(fn: Any) -> list[float]:
    factor = lmppl.Reward(fn, name="r")
    return lmppl.Target(LM * factor).log_factors(ROWS)["r"].tolist()


def given(**kwargs: Any) -> list[float]:
    assert sorted(kwargs) == ["completion_ids", "completions", "prompts"]
    assert kwargs["completion_ids"] == ROWS.token_lists()
    return [len(c) + 10.0 * len(p) for p, c in zip(kwargs["prompts"], kwargs["completions"], strict=True)]


@pytest.mark.parametrize(
    "fn",
    [
        lambda **kwargs: given(**kwargs),
        lambda completions, **kwargs: given(completions=completions, **kwargs),
        lambda prompts, **kwargs: given(prompts=prompts, **kwargs),
        lambda prompts, completions, **kwargs: given(prompts=prompts, completions=completions, **kwargs),
        lambda *, completion_ids, completions, prompts: given(
            completion_ids=completion_ids, completions=completions, prompts=prompts
        ),
        lambda completions, answer="x", **kwargs: given(completions=completions, **kwargs),
        functools.partial(lambda completions, answer, **kwargs: given(completions=completions, **kwargs), answer=["x"]),
    ],
)
def test_what_a_function_in_the_trl_convention_gets(fn: Any) -> None:
    assert trl_values(fn) == [1.0, 12.0, 13.0]


def test_parts_of_the_convention() -> None:
    assert trl_values(lambda completions: [len(c) for c in completions]) == [1.0, 2.0, 3.0]
    assert trl_values(lambda completions, completion_ids: [len(i) for i in completion_ids]) == [
        len(i) for i in ROWS.token_lists()
    ]
    assert trl_values(lambda texts, *args, **kwargs: [len(t) for t in texts]) == [1.0, 2.0, 3.0]


def test_a_column_of_the_data_set_is_bound_or_an_error() -> None:
    def matches(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer * len(completions), strict=False)]

    with pytest.raises(ModelError, match=r"matches needs answer besides .*functools.partial\(matches, answer=...\)"):
        lmppl.Reward(matches)
    assert trl_values(functools.partial(matches, answer=["bb"])) == [0.0, 1.0, 0.0]


def test_not_applicable_is_no_reward() -> None:
    def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if c == "bb" else 1.0 for c in completions]

    with pytest.raises(FactorError, match=r"factor 'r': .* returned None, expected a number, for the text 'bb'"):
        trl_values(sometimes)


def test_async_functions_are_refused() -> None:
    async def slow(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 for _ in completions]

    async def plain(texts: list[str]) -> list[float]:
        return [2.0 for _ in texts]

    for fn in (slow, plain):
        with pytest.raises(ModelError, match=rf"{fn.__name__} is an async function.*asyncio.run"):
            lmppl.Reward(fn)
    assert trl_values(lambda texts: asyncio.run(plain(texts))) == [2.0] * 3


def of_messages(completions: list[Any], **kwargs: Any) -> list[float]:
    """As TRL's functions of conversational data: a completion is a list of messages."""
    return [float(len(messages[0]["content"])) for messages in completions]


def test_functions_of_messages_are_told_what_they_get() -> None:
    with pytest.raises(FactorError, match=r"prompts and completions are strings here.*\"role\": \"assistant\""):
        trl_values(of_messages)

    def wrapped(completions: list[str], **kwargs: Any) -> list[float]:
        return of_messages([[{"role": "assistant", "content": c}] for c in completions], **kwargs)

    assert trl_values(wrapped) == [1.0, 2.0, 3.0]


TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}{% if add_generation_prompt %}b{% endif %}"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_chat_turns_are_given_as_the_template_writes_them(kind: str) -> None:
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "ca"}, {"role": "user", "content": "b"}]]
    lm = random_lm(kind, context=chats, chat_template=TEMPLATE)
    seen: dict[str, list[Any]] = {"prompts": [], "completions": [], "completion_ids": []}

    def reward(**kwargs: Any) -> list[float]:
        for name, column in kwargs.items():
            seen[name] += column
        return [len(p) + len(c) / 4 for p, c in zip(kwargs["prompts"], kwargs["completions"], strict=True)]

    for context, prompt in enumerate(("ab", "cabb")):
        rows = lm.enumerate_sequences(context).sequences
        for column in seen.values():
            column.clear()
        got = lmppl.Target(lm * lmppl.Reward(reward)).log_factors(rows)["reward"]
        assert seen == {
            "prompts": [prompt] * len(rows),
            "completions": list(rows.text),
            "completion_ids": rows.token_lists(),
        }
        assert got.tolist() == [len(prompt) + len(text) / 4 for text in rows.text]
