"""User functions: every accepted convention gives the same numbers, every mistake an error that shows the text."""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lmppl.errors import FactorError, ModelError, ShapeError
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.declared_functions import qualified_name, to_feature
from lmppl.modeling.factors import Factor, Feature
from lmppl.modeling.returned_values import quote
from lmppl.modeling.user_functions import RowError, evaluate, evaluate_log_factor
from lmppl.sequences import Sequences

LM = TabularLM.random(4, 3, order=0, context=["", "a"])
ROWS = LM.sequences([[0, 3], [1, 1, 3], [0, 1, 2]], context=[0, 1, 1])
TEXTS = ["a", "bb", "abc"]
LENGTHS = [1.0, 2.0, 3.0]


def run(fn: Callable[..., Any], on: Any = "text", rows: Sequences = ROWS) -> torch.Tensor:
    return evaluate(Feature("score", fn, on), rows, factor="r")


def failure(fn: Callable[..., Any], kind: type[Exception] = FactorError, on: Any = "text") -> str:
    with pytest.raises(kind) as caught:
        run(fn, on)
    assert "factor 'r'" in str(caught.value)
    assert "score" in str(caught.value)
    return str(caught.value)


class Series:
    """What a pandas column looks like from outside."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        lambda v: np.array(v, dtype=np.float32),
        lambda v: np.array(v, dtype=object),
        lambda v: np.array(v).astype(np.uint8),
        lambda v: [int(one) for one in v],
        lambda v: [np.float32(one) for one in v],
        lambda v: [np.array(one) for one in v],
        lambda v: [torch.tensor(one) for one in v],
        lambda v: torch.tensor(v),
        lambda v: torch.tensor(v).int(),
        lambda v: torch.tensor(v, dtype=torch.bfloat16, requires_grad=True),
        Series,
    ],
)
def test_every_container_of_numbers(convert: Callable[[list[float]], Any]) -> None:
    column = run(lambda texts: convert([float(len(t)) for t in texts]))
    assert column.dtype == torch.float64
    assert column.tolist() == LENGTHS
    assert not column.requires_grad


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda v: [np.bool_(one) for one in v]])
def test_booleans(convert: Callable[[list[bool]], Any]) -> None:
    assert run(lambda texts: convert([t.startswith("a") for t in texts])).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "convert", [list, np.array, torch.tensor, lambda v: [np.array(row) for row in v], lambda v: list(torch.tensor(v))]
)
def test_vectors(convert: Callable[[list[list[float]]], Any]) -> None:
    column = run(lambda texts: convert([[float(len(t)), 0.5] for t in texts]))
    assert column.tolist() == [[1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]


def test_minus_infinity_is_a_value_of_a_feature() -> None:
    assert run(lambda texts: [-np.inf] * len(texts)).tolist() == [-np.inf] * 3


def test_no_rows_call_nothing() -> None:
    assert run(lambda texts: 1 / 0, rows=ROWS.select([])).shape == (0,)


def test_what_is_read() -> None:
    seen: list[Any] = []

    def record(given: Any) -> list[float]:
        seen.append(given)
        return LENGTHS

    for on in ("text", "full", "ids"):
        run(record, on)
    assert seen[0] == TEXTS
    assert seen[1] == ["a", "abb", "aabc"]
    assert seen[2] is ROWS
    with pytest.raises(FactorError, match="hidden states"):
        run(record, "hidden")


def test_a_function_may_change_its_list() -> None:
    def emptying(texts: list[str]) -> list[float]:
        values = [float(len(t)) for t in texts]
        texts.clear()
        return values

    assert run(emptying).tolist() == LENGTHS
    assert ROWS.text == TEXTS


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    tracked = []

    def score(texts: list[str]) -> torch.Tensor:
        values = torch.tensor([float(len(t)) for t in texts]) * weight
        tracked.append(values.requires_grad)
        return values

    run(score)
    assert tracked == [False]


# The Hugging Face reward convention.


def test_prompts_and_completions_by_keyword() -> None:
    def reward(
        *, completions: list[str], prompts: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        assert kwargs == {}
        assert completion_ids == [[0, 3], [1, 1, 3], [0, 1, 2]]
        return [float(c.startswith(p)) + len(p) for p, c in zip(prompts, completions, strict=True)]

    assert run(reward).tolist() == [1.0, 1.0, 2.0]


def test_only_what_is_named_is_passed() -> None:
    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(p + c)) for p, c in zip(prompts, completions, strict=True)]

    assert run(reward).tolist() == [1.0, 3.0, 4.0]


def test_completions_alone_are_a_list_of_texts() -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    assert run(reward).tolist() == LENGTHS


def test_a_skipped_completion_is_an_error() -> None:
    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if c == "bb" else 1.0 for c in completions]

    assert "returned None, expected a number, for the text 'bb'" in failure(reward)


# Mistakes.


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda texts: [1.0], "got shape (1,), expected (3,)"),
        (lambda texts: torch.ones(4), "got shape (4,), expected (3,)"),
        (
            lambda texts: torch.ones(3, 1),
            "got shape (3, 1), expected (3,), one number for each text; return values.squeeze(-1)",
        ),
        (lambda texts: np.ones((3, 1)), "return values.squeeze(-1)"),
        (lambda texts: [[1.0]] * 3, "return values.squeeze(-1)"),
        (lambda texts: [np.ones(1)] * 3, "return values.squeeze(-1)"),
        (
            lambda texts: torch.ones(1, 3),
            "got shape (1, 3), expected (3,), one number for each text; return values.squeeze(0)",
        ),
        (lambda texts: torch.ones(3, 2, 2), "got shape (3, 2, 2), expected (3,)"),
        (lambda texts: [[]] * 3, "got shape (3, 0), expected (3,)"),
        (lambda texts: [1.0, [1.0, 2.0], 1.0], "a number for the first text but a list of 2 for 'bb'"),
        (lambda texts: [[1.0, 2.0], [1.0], [1.0]], "a list of 2 for the first text but a list of 1 for 'bb'"),
        (lambda texts: [[], 1.0, 1.0], "a list of 0 for the first text but a number for 'bb'"),
        (lambda texts: 0.5, "the single number 0.5, expected (3,); the function gets a list of texts"),
        (lambda texts: len(texts), "the function gets a list of texts"),
        (lambda texts: "a" in texts, "the function gets a list of texts"),
        (lambda texts: np.float64(0.5), "the function gets a list of texts"),
        (lambda texts: torch.tensor(0.5), "the function gets a list of texts"),
    ],
)
def test_wrong_shapes(fn: Callable[[list[str]], Any], words: str) -> None:
    assert words in failure(fn, ShapeError)


def test_squeezing_a_batch_of_one() -> None:
    with pytest.raises(ShapeError, match=r"squeeze\(-1\) in place of values.squeeze\(\)"):
        run(lambda texts: torch.ones(len(texts), 1).squeeze(), rows=ROWS.select([0]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "returned nan, expected a finite number, for the text 'bb'"),
        (float("inf"), "returned inf, expected a finite number, for the text 'bb'"),
        (None, "returned None, expected a number, for the text 'bb'"),
        ("0.5", "returned '0.5', expected a number, for the text 'bb'"),
        (1 + 1j, "returned (1+1j), expected a number, for the text 'bb'"),
        (10**400, "too large for a float, expected a number, for the text 'bb'"),
        ([0.5, None], "returned None"),
    ],
)
def test_wrong_values(value: Any, words: str) -> None:
    assert words in failure(lambda texts: [value if t == "bb" else 1.0 for t in texts])


def test_wrong_values_in_vectors_and_tensors() -> None:
    assert "returned nan" in failure(lambda texts: [[1.0, float("nan") if t == "bb" else 1.0] for t in texts])
    assert "for the text 'abc'" in failure(lambda texts: torch.tensor([1.0, 2.0, torch.inf]))
    assert "complex" in failure(lambda texts: torch.ones(3, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("result", "words"), [("abc", "a str"), (None, "a NoneType"), ({1: 2}, "a dict"), (iter([1.0]), "a list_iterator")]
)
def test_wrong_types(result: Any, words: str) -> None:
    assert f"returned {words}, expected a list" in failure(lambda texts: result)


def test_the_text_that_raises_is_found() -> None:
    def score(texts: list[str]) -> list[float]:
        return [1 / (len(t) - 2) for t in texts]

    message = failure(score)
    where = r"\(test_user_functions.py, line \d+\)"
    assert re.search(rf"raised ZeroDivisionError: .*division by zero {where} on the text .bb.", message)
    with pytest.raises(FactorError) as caught:
        run(score)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "on the text 'abb'" in failure(lambda texts: [1 / (len(t) - 3) for t in texts], on="full")
    assert "on the text 'bb'" in failure(lambda rows: [1 / (n - 3) for n in rows.lengths[:2].tolist()], on="ids")


def test_an_error_that_no_single_text_causes() -> None:
    def score(texts: list[str]) -> list[float]:
        if len(texts) > 1:
            raise ValueError("too many")
        return [0.0]

    message = failure(score)
    assert "raised ValueError: too many" in message
    assert "on a batch of 3 texts but on none of them alone" in message


def test_out_of_memory_and_interrupts_pass_through() -> None:
    calls = []

    def raising(error: BaseException) -> Callable[[list[str]], list[float]]:
        def score(texts: list[str]) -> list[float]:
            calls.append(len(texts))
            raise error

        return score

    for error in (MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run(raising(error))
    assert calls == [3, 3, 3]


@pytest.mark.parametrize("fn", [lambda text: [float(len(text.lower()))], lambda text: re.findall("a", text)])
def test_a_function_of_one_text_gets_a_hint(fn: Callable[[Any], Any]) -> None:
    assert "the function gets a list of texts and returns one number for each" in failure(fn)


def test_texts_are_cut_in_messages() -> None:
    assert quote("short") == "'short'"
    assert len(quote("x" * 500)) == 80
    long = Sequences(
        ROWS.ids, ROWS.lengths, ROWS.finished, ROWS.context, LM.prompts, lambda rows: ["y" * 999] * len(rows)
    )
    with pytest.raises(FactorError) as caught:
        run(lambda texts: [float("nan")] * len(texts), rows=long)
    assert len(str(caught.value)) < 200


# Pipelines.


class Pipeline:
    """A text-classification pipeline seen from outside: the best label only, unless asked for all."""

    task = "text-classification"

    def __call__(self, texts: list[str], top_k: int | None = 1) -> list[Any]:
        both = [[{"label": "POS", "score": len(t) / 4}, {"label": "NEG", "score": 1 - len(t) / 4}] for t in texts]
        return both if top_k is None else [row[0] for row in both]


def test_a_pipeline_needs_a_label() -> None:
    assert "label=, one of ['POS']" in failure(Pipeline())
    assert "label=, one of ['POS', 'NEG']" in failure(lambda texts: Pipeline()(texts, top_k=None))
    feature = to_feature(Pipeline(), kind="Reward", label="NEG")
    assert feature.name == "NEG"
    assert evaluate(feature, ROWS, factor="r").tolist() == [0.75, 0.5, 0.25]
    with pytest.raises(FactorError, match=r"label 'GOOD' is not among .*\['NEG', 'POS'\]"):
        evaluate(to_feature(Pipeline(), kind="Reward", label="GOOD"), ROWS, factor="r")


def test_two_factors_share_a_pipeline_and_its_label() -> None:
    pipeline = Pipeline()
    features = [to_feature(pipeline, kind="Reward", label=label) for label in ("POS", "POS", "NEG")]
    assert features[0].identity == features[1].identity != features[2].identity


# Declaring.


def scorer(texts: list[str]) -> list[float]:
    return [0.0 for _ in texts]


class Scorer:
    def __call__(self, texts: list[str]) -> list[float]:
        return [0.0 for _ in texts]

    def method(self, texts: list[str]) -> list[float]:
        return [0.0 for _ in texts]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (scorer, "scorer"),
        (functools.partial(scorer), "scorer"),
        (Scorer(), "Scorer"),
        (Scorer().method, "method"),
        (lambda texts: [0.0 for _ in texts], "reward"),
    ],
)
def test_names(fn: Callable[..., Any], name: str) -> None:
    assert to_feature(fn, kind="Reward").name == name


def test_a_feature_passes_through() -> None:
    feature = Feature("f", scorer)
    assert to_feature(feature, kind="Reward") is feature
    with pytest.raises(ModelError, match="set them in the Feature"):
        to_feature(feature, kind="Reward", on="full")


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, texts: list[str]) -> list[float]:
        return [0.0]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (0.5, "got float, expected a function of a list of texts"),
        (LM, "got the distribution TabularLM"),
        (Unhashable(), "cannot be hashed"),
        (lambda text, context: 0.0, r"functools.partial"),
        (lambda: 0.0, "cannot be called with one list of texts"),
        (lambda prompts, completions, answer: [0.0], "needs answer besides prompts and completions"),
    ],
)
def test_what_is_no_function_of_texts(fn: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        to_feature(fn, kind="Reward")


def test_options_are_checked() -> None:
    with pytest.raises(ModelError, match="on='texts'"):
        to_feature(scorer, kind="Reward", on="texts")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="contradicts on='full'"):
        to_feature(lambda prompts, completions: [0.0], kind="Reward", on="full")


def test_qualified_names_tell_functions_apart() -> None:
    assert qualified_name(scorer).endswith("test_user_functions:scorer")
    assert qualified_name(Scorer()).endswith(":Scorer")
    assert qualified_name(Scorer().method).endswith(":Scorer.method")
    first, second = (lambda texts: [1.0]), (lambda texts: [2.0])
    assert qualified_name(first) != qualified_name(second)
    assert qualified_name(first) == qualified_name(first)
    assert qualified_name(functools.partial(scorer, texts=[])) != qualified_name(scorer)
    # Neither the address of an object nor the order of a set is part of a name.
    assert qualified_name(functools.partial(scorer, object())) == qualified_name(functools.partial(scorer, object()))
    one, other = eval("lambda texts: texts in {0, 8}"), eval("lambda texts: texts in {8, 0}")
    assert repr(one.__code__.co_consts) != repr(other.__code__.co_consts)
    assert qualified_name(one) == qualified_name(other)


def test_the_text_of_a_row_that_a_factor_refuses() -> None:
    def refuse(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RowError(1, "got 7 for", ", which is odd")

    def broken(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        return columns["nothing"]

    def own(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        raise ShapeError("too wide")

    columns = {"score": torch.zeros(3)}
    for fn, kind, words in [
        (refuse, FactorError, "factor 'f': got 7 for 'bb', which is odd"),
        (broken, FactorError, "factor 'f': log_factor raised KeyError: 'nothing'"),
        (own, ShapeError, "factor 'f': too wide"),
    ]:
        with pytest.raises(kind, match=words):
            evaluate_log_factor(Factor("f", (Feature("score", scorer),), fn), columns, ROWS)
