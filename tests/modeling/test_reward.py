"""Rewards and optimality: log φ to the last bit, bounds that are never clipped, classifiers as rewards."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lmppl.errors import FactorError, ModelError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Optimality, Reward
from lmppl.modeling.factors import Feature
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Sequences

LM = TabularLM.random(3, 3, context=["", "b"])
DRAWS = [LM.enumerate_sequences(c) for c in range(2)]


def length(texts: list[str]) -> list[float]:
    return [float(len(t)) for t in texts]


def log_factor(model: Model, name: str, context: int = 0) -> torch.Tensor:
    return Target(model).log_factors(DRAWS[context].sequences)[name]


# Reward.


@pytest.mark.parametrize("beta", [0.5, 1, 3.0, np.float32(0.25), 1e-3])
def test_beta_divides_the_reward(beta: Any) -> None:
    values = log_factor(LM * Reward(length, beta=beta), "length")
    expected = torch.tensor([len(t) / float(beta) for t in DRAWS[0].text], dtype=torch.float64)
    assert torch.equal(values, expected)
    multiplied = torch.tensor([len(t) * float(beta) for t in DRAWS[0].text], dtype=torch.float64)
    assert torch.equal(values, multiplied) == (beta == 1)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_log_z_of_a_reward_against_the_sum(beta: float) -> None:
    model = LM * Reward(length, beta=beta)
    for context, draws in enumerate(DRAWS):
        log_gamma = Target(model).log_prob_unnormalized(draws.sequences)
        z = sum(
            math.exp(float(p)) * math.exp(len(t) / beta)
            for p, t in zip(draws.log_prior, draws.text, strict=True)  # type: ignore[arg-type]
        )
        assert torch.logsumexp(log_gamma, 0).item() == pytest.approx(math.log(z), abs=1e-12), context


@pytest.mark.parametrize("beta", [0, -1, math.nan, math.inf, "0.5", None, True, [1.0]])
def test_beta_is_a_positive_number(beta: Any) -> None:
    with pytest.raises(ModelError, match="beta="):
        Reward(length, beta=beta)


@pytest.mark.parametrize("upper", [math.nan, -math.inf, "1", None])
def test_the_bound_is_a_number(upper: Any) -> None:
    with pytest.raises(ModelError, match="upper="):
        Reward(length, upper=upper)


def test_the_bound_is_in_the_units_of_the_reward() -> None:
    reward = Reward(length, beta=0.5, upper=3)
    assert (reward.upper, reward.reward_upper, reward.beta) == (6.0, 3.0, 0.5)
    assert Reward(length).upper == math.inf
    assert log_factor(LM * reward, "length").max() == reward.upper


def test_a_reward_above_its_bound_is_an_error() -> None:
    with pytest.raises(FactorError, match=r"factor 'length': Reward: got 3 for '\w\w\w', above the declared upper=2.5"):
        log_factor(LM * Reward(length, beta=0.5, upper=2.5), "length")


def test_an_infinite_reward_is_an_error() -> None:
    def score(texts: list[str]) -> list[float]:
        return [-math.inf if t == "ab" else 0.0 for t in texts]

    with pytest.raises(FactorError, match=r"'score'.*'ab'"):
        log_factor(LM * Reward(score), "score")
    assert Reward(score).hard is False


def test_a_vector_is_no_reward() -> None:
    with pytest.raises(ModelError, match=r"factor 'score'.*\(\d+, 2\)"):
        log_factor(LM * Reward(lambda texts: [[1.0, 2.0] for _ in texts], name="score"), "score")


def test_the_context_is_read_where_asked() -> None:
    full = log_factor(LM * Reward(length, on="full"), "length", context=1)
    assert full.tolist() == [len(t) + 1 for t in DRAWS[1].text]

    def overlap(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(c.startswith(p)) for p, c in zip(prompts, completions, strict=True)]

    values = log_factor(LM * Reward(overlap), "overlap", context=1)
    assert values.tolist() == [float(t.startswith("b")) for t in DRAWS[1].text]


def test_another_temperature() -> None:
    reward = Reward(length, beta=0.5, upper=3, name="long")
    other = reward.with_beta(2.0)
    assert (other.name, other.beta, other.reward_upper, other.upper, other.named) == ("long", 2.0, 3.0, 1.5, True)
    assert other.features == reward.features
    assert Reward(length).with_beta(2.0).named is False
    assert (reward.beta, reward.upper) == (0.5, 6.0)


def test_names_and_formulas() -> None:
    assert Reward(length, beta=0.5).formula == "exp(length(x)/0.5)"
    assert Reward(length).formula == "exp(length(x))"
    assert Reward(length, on="full").formula == "exp(length(c, x))"
    assert (Reward(length).name, Reward(length).named) == ("length", False)
    assert (Reward(lambda texts: [0.0 for _ in texts]).name, Reward(length, name="r").named) == ("reward", True)
    model = LM * Reward(lambda texts: [0.0 for _ in texts]) * Reward(lambda texts: [1.0 for _ in texts])
    assert [f.name for f in model.factors] == ["reward", "reward_2"]
    assert log_factor(model, "reward_2").tolist() == [1.0] * len(DRAWS[0])


def test_one_function_in_two_rewards_runs_once() -> None:
    calls = []

    def score(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return length(texts)

    model = LM * Reward(score, beta=0.5) * Reward(score, beta=2.0, name="again")
    factors = Target(model).log_factors(DRAWS[0].sequences)
    assert torch.equal(factors["score"], 4 * factors["again"])
    assert len(calls) == 1


def test_a_renamed_copy_is_whole() -> None:
    reward = copy.copy(Reward(length, beta=0.5, upper=3))
    assert (reward.beta, reward.formula) == (0.5, "exp(length(x)/0.5)")
    assert reward.describe()["beta"] == 0.5


def test_the_description_tells_temperatures_apart() -> None:
    assert Reward(length, beta=1.0).describe() != Reward(length, beta=1.0 + 1e-12).describe()


# Optimality.


def test_optimality_is_the_log_probability_itself() -> None:
    def log_clean(texts: list[str]) -> list[float]:
        return [-math.inf if "c" in t else -0.5 * len(t) for t in texts]

    factor = Optimality(log_clean)
    assert (factor.upper, factor.hard, factor.formula) == (0.0, None, "exp(log_clean(x))")
    assert log_factor(LM * factor, "log_clean").tolist() == log_clean(DRAWS[0].text)


def test_a_positive_log_probability_is_an_error() -> None:
    with pytest.raises(FactorError) as caught:
        log_factor(LM * Optimality(lambda texts: [0.3 if t == "ab" else -1.0 for t in texts], name="clean"), "clean")
    assert "factor 'clean': a log-probability cannot be positive: got 0.3 for 'ab'; use Reward" in str(caught.value)


# Sequence classifiers.

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "very", "a"]
SENTENCES = ["good film", "a very very bad film", "bad", "a good good film", "unknown"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
    )


def classifier(num_labels: int, **options: Any) -> Any:
    torch.manual_seed(num_labels)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        id2label={i: f"L{i}" for i in range(num_labels)},
        label2id={f"L{i}": i for i in range(num_labels)},
        pad_token_id=0,
        initializer_range=1.0,
        **options,
    )
    return transformers.BertForSequenceClassification(config).double().eval()


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """One sentence after the other, so that nothing is padded."""
    with torch.no_grad():
        rows = [model(**tokenizer(s, return_tensors="pt")).logits[0] for s in SENTENCES]
    return torch.stack(rows)


def reading(texts: list[str]) -> Sequences:
    """Three sequences that read as `texts`."""
    rows = LM.sequences([[0, 2], [1, 2], [2]])
    return Sequences(rows.ids, rows.lengths, rows.finished, rows.context, LM.prompts, lambda _: texts)


def score(reward: Reward, texts: list[str] = SENTENCES) -> torch.Tensor:
    values: torch.Tensor = reward.features[0].fn(texts)
    return values


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_reward_model_gives_its_logit(tokenizer: Any, batch_size: int) -> None:
    model = classifier(1)
    reward = Reward.from_pretrained(model, tokenizer, beta=0.5, batch_size=batch_size)
    expected = logits(model, tokenizer)[:, 0]
    assert torch.allclose(score(reward), expected, atol=1e-12, rtol=0)
    assert (reward.upper, reward.beta) == (math.inf, 0.5)
    probability = Reward.from_pretrained(model, tokenizer, log_prob=True, batch_size=batch_size)
    assert torch.allclose(score(probability), expected.sigmoid().log(), atol=1e-12, rtol=0)
    assert probability.upper == 0.0


def test_a_classifier_gives_the_log_probability_of_its_label(tokenizer: Any) -> None:
    model = classifier(3)
    expected = logits(model, tokenizer).softmax(-1).log()
    columns = [score(Reward.from_pretrained(model, tokenizer, label=f"L{i}", batch_size=2)) for i in range(3)]
    assert torch.allclose(torch.stack(columns, -1), expected, atol=1e-12, rtol=0)
    reward = Reward.from_pretrained(model, tokenizer, label="L1", name="tone")
    assert (reward.upper, reward.name, reward.formula) == (0.0, "tone", "exp(L1(x))")


def test_a_multi_label_classifier(tokenizer: Any) -> None:
    model = classifier(3, problem_type="multi_label_classification")
    reward = Reward.from_pretrained(model, tokenizer, label="L2")
    assert torch.allclose(score(reward), logits(model, tokenizer)[:, 2].sigmoid().log(), atol=1e-12, rtol=0)


def test_a_saved_classifier_is_loaded_by_its_path(tokenizer: Any, tmp_path: Any) -> None:
    model = classifier(2)
    model.save_pretrained(tmp_path / "tone")
    tokenizer.save_pretrained(tmp_path / "tone")
    reward = Reward.from_pretrained(str(tmp_path / "tone"), label="L0")
    assert reward.name == "tone"
    assert torch.allclose(score(reward), logits(model, tokenizer).softmax(-1)[:, 0].log(), atol=1e-5)


def test_classifiers_that_cannot_be_used(tokenizer: Any) -> None:
    model = classifier(2)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (model, tokenizer, {}, r"label=None, expected one of the model's \['L0', 'L1'\]"),
        (model, tokenizer, {"label": "POS"}, "label='POS'"),
        (classifier(1), tokenizer, {"label": "POS"}, "label='POS'"),
        (model, None, {"label": "L0"}, "tokenizer="),
        (classifier(1).train(), tokenizer, {}, "training mode"),
        (length, tokenizer, {}, "expected a name, a path or a"),
        (model, tokenizer, {"label": "L0", "device": "cpu"}, "move it yourself"),
        (model, tokenizer, {"label": "L0", "batch_size": 0}, "batch_size=0"),
    ]
    for network, reader, options, words in cases:
        with pytest.raises(ModelError, match=words):
            Reward.from_pretrained(network, reader, **options)
    with pytest.raises(ModelError, match=r"Reward.from_pretrained\(model, tokenizer\)"):
        Reward(model)


def test_texts_that_a_classifier_cannot_read(tokenizer: Any) -> None:
    model = classifier(1)
    for texts, message in [(["good", "bad", ""], "''"), (["good", "a " * 9, "bad"], "9 tokens, more than the 8")]:
        with pytest.raises(FactorError, match=message):
            Target(LM * Reward.from_pretrained(model, tokenizer)).log_factors(reading(texts))
    cut = Reward.from_pretrained(model, tokenizer, max_length=2)
    assert torch.equal(score(cut, ["a good good film"]), score(cut, ["a good"]))


def test_a_pipeline_as_reward(tokenizer: Any) -> None:
    model = classifier(2)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    reward = Reward(pipe, label="L1")
    expected = logits(model, tokenizer).softmax(-1)[:, 1]
    values = torch.tensor(score(reward), dtype=torch.float64)
    assert torch.allclose(values, expected, atol=1e-6, rtol=0)
    with pytest.raises(FactorError, match=r"label=, one of \['L0', 'L1'\]"):
        Target(LM * Reward(pipe, name="tone")).log_factors(reading(["good", "bad", "film"]))


def test_a_feature_as_reward() -> None:
    feature = Feature("tone", length, fingerprint="v1")
    reward = Reward(feature, beta=2.0)
    assert reward.features == (feature,)
    assert reward.name == "tone"
