"""Grammars and JSON schemas: against `jsonschema`, and token by token against the text."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch

import lmppl
from lmppl.errors import ModelError
from lmppl.lm import LM
from lmppl.lm.tabular import TabularLM
from lmppl.modeling.evidence import Finished, Grammar, JsonSchema
from lmppl.modeling.evidence.languages.grammar_engine import TokenMasks
from lmppl.modeling.evidence.languages.grammar_prefixes import GrammarPrefixes
from lmppl.modeling.evidence.token_bytes import TokenBytes, token_bytes
from lmppl.testing import check_factor
from tests.modeling.test_prefixes import build

NUM_DOCUMENTS = 10_000
SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "numbers": {"type": "array", "items": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 10}, "minItems": 1},
    "either": {
        "anyOf": [{"type": "boolean"}, {"const": "x"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]+$"}]
    },
    "tree": {
        "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
        "$ref": "#/$defs/node",
    },
}


class Documents:
    """Random documents: near what a schema allows, and far from it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        kinds = ["text", "int", "float", "bool", "null"] + (["list", "tree"] if depth < 2 else [])
        match self.random.choice(kinds):
            case "text":
                return "".join(self.random.choices('abcx "é\\', k=self.random.randrange(8)))
            case "int":
                return self.random.randrange(-3, 130)
            case "float":
                return round(self.random.uniform(-3, 12), 2) + 0.001
            case "bool":
                return self.random.random() < 0.5
            case "list":
                return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
            case "tree":
                return self.tree(2)
        return None

    def tree(self, depth: int) -> Any:
        return [self.tree(depth - 1) for _ in range(self.random.randrange(4))] if depth else []

    def person(self) -> Any:
        found: dict[str, Any] = {"name": "".join(self.random.choices("abc é", k=self.random.randrange(8)))}
        found["age"] = self.random.randrange(-5, 130)
        if self.random.random() < 0.5:
            found["tags"] = self.random.choices(["a", "b", "c"], weights=[4, 4, 1], k=self.random.randrange(5))
        if self.random.random() < 0.2:
            found.pop(self.random.choice(list(found)))
        if self.random.random() < 0.1:
            found["more"] = 1
        if self.random.random() < 0.1:
            found[self.random.choice(["name", "age"])] = self.value()
        return found

    def text(self, schema: str) -> str:
        makers = {
            "person": self.person,
            "numbers": lambda: [
                self.random.choice([self.value(), 3, 4.25, -1]) for _ in range(self.random.randrange(4))
            ],
            "either": lambda: self.random.choice([self.value(), "abc", "x", True, None]),
            "tree": lambda: self.tree(3),
        }
        separators = self.random.choice([(",", ":"), (", ", ": "), (" ,\n", " :\t")])
        written = json.dumps(makers[schema](), ensure_ascii=False, separators=separators)
        if self.random.random() < 0.2:  # a broken one
            at = self.random.randrange(len(written))
            written = written[:at] + self.random.choice('{}[],:"x1 ') + written[at + self.random.randrange(2) :]
        return self.random.choice(["", "", " ", "\n"]) + written + self.random.choice(["", " "])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_agrees_with_jsonschema(name: str) -> None:
    schema, documents = SCHEMAS[name], Documents(5)
    validator = jsonschema.Draft202012Validator(schema)

    def valid(text: str) -> bool:
        try:
            return validator.is_valid(json.loads(text))
        except json.JSONDecodeError:
            return False

    texts = [documents.text(name) for _ in range(NUM_DOCUMENTS // len(SCHEMAS))]
    expected = [valid(text) for text in texts]
    got = JsonSchema(schema).accepts(texts).tolist()
    wrong = [(t, g) for t, g, e in zip(texts, got, expected, strict=True) if g != e]
    assert wrong == []
    assert 0.05 < sum(expected) / len(texts) < 0.95


def test_what_of_the_valid_documents_is_left_out() -> None:
    person = JsonSchema(SCHEMAS["person"])
    assert person.accepts(
        ['{"name": "a", "age": 3}', '{"age": 3, "name": "a"}', '{"name": "a", "age": 3.0}']
    ).tolist() == [
        True,
        False,
        False,
    ]
    assert person.accepts(['{"name": "\\u0041\\n", "age": 3}', '{"name": "\ufffd", "age": 3}']).tolist() == [
        True,
        False,
    ]


def test_masks_hold_every_spelling_of_what_is_forced() -> None:
    """With forcing, llguidance's mask holds the one token that its tokenizer writes, and mass is lost."""
    pieces = [b"t", b"ti", b"title", b"tle", b'{"', b'"', b'":', b":", b"1", b"}"]
    masks = TokenMasks(JsonSchema({"properties": {"title": {"const": 1}}, "required": ["title"],
                                   "additionalProperties": False, "type": "object"}).text.grammar,
                       TokenBytes(pieces, pieces, False))  # fmt: skip
    allowed, _ = masks.allowed([[4], [4, 1], [4, 2]])
    listed = [[pieces[i] for i in torch.nonzero(row).squeeze(1).tolist()] for row in allowed]
    assert listed == [[b"t", b"ti", b"title"], [b"t", b"tle"], [b'"', b'":']]


def test_masks_do_not_depend_on_what_was_asked_before() -> None:
    pieces = [b"a", b"b", b" ", b".", b"ab", b"."]
    tokens = TokenBytes(pieces, pieces, False)
    grammar = Grammar('start: " "? WORD (" " WORD)* "."?\nWORD: /[ab]+/').text.grammar
    masks, source = TokenMasks(grammar, tokens), random.Random(3)
    for _ in range(60):
        prefix = source.choices(range(6), weights=[4, 4, 3, 1, 2, 1], k=source.randrange(6))
        fresh = TokenMasks(grammar, tokens)
        assert masks.begins(prefix) == fresh.begins(prefix)
        if fresh.begins(prefix):
            assert torch.equal(masks.completing([prefix]), fresh.completing([prefix]))
            assert all(map(torch.equal, masks.allowed([prefix]), fresh.allowed([prefix])))


def test_tokens_are_masked_where_they_are_bytes_of_text() -> None:
    grammar = Grammar('start: ("a" | "b" | "é")*')
    for kind in ("tabular", "llama", "bytes", "sentencepiece"):
        assert isinstance(grammar.bind(build(kind)).incremental.form, GrammarPrefixes)
    assert not isinstance(grammar.bind(build("stop string")).incremental.form, GrammarPrefixes)


@pytest.mark.parametrize("engine", [lmppl.SMC(256), lmppl.MCMC(num_steps=300), lmppl.Importance(4000)])
def test_engines_draw_from_the_posterior(engine: lmppl.Engine) -> None:
    lm = TabularLM.random(4, 5, seed=2)
    model = lm * Grammar('start: "a" start "b" | "c"?')
    exact = lmppl.infer(model, "exact")
    truth = {t: float(v.exp()) for t, v in zip(exact.draws.text, exact.draws.log_q, strict=True)}
    best = max(truth, key=truth.__getitem__)
    found = lmppl.infer(model, engine, num_draws=2000, seed=4)
    estimate = found.expectation(lambda texts: [float(t == best) for t in texts])
    assert abs(float(estimate.value[0]) - truth[best]) < 0.06
    for one in found.log_normalizer[:1]:
        assert float((one.log_value - exact.log_normalizer[0].log_value).abs().max()) < 0.15


def test_the_embedded_lm_writes_documents() -> None:
    lm = LM("tiny", context="The film was ", max_new_tokens=40)
    review = JsonSchema(
        {
            "type": "object",
            "properties": {"film": {"enum": ["good", "bad"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
            "required": ["film", "stars"],
            "additionalProperties": False,
        }
    )
    posterior = lmppl.infer(lm * review * Finished(), lmppl.SMC(32, num_sweeps=2), seed=1)
    for text in posterior.draw(20).text:
        assert json.loads(text)["film"] in ("good", "bad")
    tokens = token_bytes(lm)
    assert tokens is not None
    assert b"\xff" in tokens.inside  # a byte that llguidance takes for a mark of its own


def test_gbnf_is_read_too() -> None:
    assert Grammar('root ::= "a" [0-9]+').accepts(["a12", "a"]).tolist() == [True, False]


@pytest.mark.shared
@pytest.mark.parametrize("folder", ["stories260K", "glassllm-en"])
def test_the_law_holds_on_real_tokenizers(shared, folder: str) -> None:
    lm = LM(shared / "models" / folder, context=["Once upon"], max_new_tokens=6)
    words = Grammar('start: " "? WORD (" " WORD)* "."?\nWORD: /[A-Za-z\']+/')
    posterior = lmppl.infer(lm * words, lmppl.SMC(16), num_draws=1, seed=1)
    assert words.accepts(posterior.draws.text).all()
    check_factor(words, lm, num_sequences=16)


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: JsonSchema({"type": "object", "not": {}}), 'JsonSchema: .*Unimplemented keys: \\["not"\\]'),
        (lambda: JsonSchema({"type": "foo"}), "Invalid type: foo"),
        (lambda: JsonSchema({"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable schema"),
        (lambda: JsonSchema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (lambda: JsonSchema("{"), "the schema is no JSON"),
        (lambda: JsonSchema(3), "got int, expected a schema"),
        (lambda: JsonSchema({"const": {1, 2}}), "the schema is no JSON data"),
        (lambda: Grammar("start: foo"), 'Grammar: .*unknown name: "foo"'),
        (lambda: Grammar(""), "Grammar: got ''"),
    ],
)
def test_what_is_refused(declare, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        declare()
