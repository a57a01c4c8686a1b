"""Grammars: texts of a context-free grammar, and JSON documents of a schema."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark
from torch import Tensor

from lmppl.errors import ModelError
from lmppl.lm.base import LanguageModel
from lmppl.modeling.evidence.constraint import Constraint
from lmppl.modeling.evidence.languages.grammar_engine import GrammarText, whole_grammar
from lmppl.modeling.evidence.languages.grammar_prefixes import GrammarPrefixes
from lmppl.modeling.evidence.languages.language import Language, snake_case
from lmppl.modeling.evidence.prefix_reader import LogFactor, PrefixReader, as_log
from lmppl.modeling.evidence.prefixes import LazyForm
from lmppl.modeling.evidence.token_bytes import token_bytes
from lmppl.modeling.factors import Factor, Feature, Incremental
from lmppl.sequences import Sequences

__all__ = ["Grammar", "JsonSchema"]

SPACE = "/[ \\t\\r\\n]*/"  # what JSON allows around a document


class Grammar(Language):
    r"""Texts of a context-free grammar, as llguidance reads it: a variant of Lark, or GBNF.

    A grammar has no finite automaton: sums over it are by enumeration or by draws, and masks look ahead as far as some
    text of the grammar goes on, whether or not it fits before the cap.

    Parameters
    ----------
    source : str
        Rules `name: ...` (Lark) with the rule `start`, or `name ::= ...` (GBNF) with the rule `root`.
    name : str, optional
        By default "grammar".

    Raises
    ------
    ModelError
        Where llguidance cannot read the grammar; with its message.

    Examples
    --------
    >>> sums = Grammar('start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/')
    >>> sums.accepts(["1+2", "1+"]).tolist()
    [True, False]

    References
    ----------
    geng2023, park2024
    """

    text: GrammarText

    def __init__(self, source: str, *, name: str | None = None) -> None:
        if not isinstance(source, str) or not source.strip():
            raise ModelError(f'Grammar: got {source!r}, expected rules as text, such as \'start: "yes" | "no"\'')
        lark = gbnf_to_lark(source) if "::=" in source else source
        grammar = whole_grammar("@inner", [{"name": "inner", "lark_grammar": lark}])
        self._declare_grammar(grammar, {"source": source}, name, "1[x ∈ grammar]")

    def _declare_grammar(self, grammar: str, arguments: Mapping[str, Any], name: str | None, formula: str) -> None:
        kind = type(self).__name__
        trouble = LLMatcher.validate_grammar(grammar)
        if trouble:
            raise ModelError(f"{kind}: {self.trouble(trouble.strip())}")
        text = GrammarText(grammar)
        label = snake_case(kind)
        Constraint.__init__(self, Feature(label, text), name=name or label)
        self._set(arguments=dict(arguments), formula=formula, named=name is not None, text=text)

    @staticmethod
    def trouble(message: str) -> str:
        """What to say where llguidance refuses the grammar."""
        return f"llguidance cannot read the grammar: {message}"

    def accepts(self, texts: Sequence[str]) -> Tensor:
        """As `Language.accepts`; a text with U+FFFD belongs to no grammar."""
        if isinstance(texts, str):
            raise ModelError(f"{self.kind}: got the single text {texts!r}, expected a list of texts")
        return self.text(texts)

    def bind(self, lm: LanguageModel, log_factor: LogFactor | None = None) -> Factor:
        """As `Factor.bind`: with masks over the tokens of `lm`."""
        bound = copy.copy(self)
        object.__setattr__(bound, "incremental", self.forms.get(lm, lambda: _GrammarForm(self.text, lm)))
        return bound


class JsonSchema(Grammar):
    """JSON documents that are valid under a JSON Schema, as llguidance writes them.

    Every text of the language is valid JSON (white space around it allowed) and valid under the schema. Not every
    valid document is in it: the members of an object stand in the order of the schema's `properties`, others after
    them, integers have no decimal point, and strings no raw delete character (U+007F). Keywords of JSON Schema that
    llguidance does not implement are an error that names them; words that are no keywords say nothing, as JSON Schema
    wants it.

    Parameters
    ----------
    schema : dict or str
        A JSON Schema, as data or as text.
    name : str, optional
        By default "json_schema".

    Raises
    ------
    ModelError
        Where the schema is no JSON, uses an unsupported keyword, or allows nothing.

    Examples
    --------
    >>> person = JsonSchema({"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}})
    >>> person.accepts(['{"age": 3}', '{"age": -3}']).tolist()
    [True, False]
    """

    def __init__(self, schema: Mapping[str, Any] | str | bool, *, name: str | None = None) -> None:
        data = _read_schema(schema)
        value = {"name": "value", "json_schema": _with_options(data)}
        grammar = whole_grammar(f"{SPACE} @value {SPACE}", [value])
        self._declare_grammar(grammar, {"schema": data}, name, "1[x is JSON of the schema]")

    @staticmethod
    def trouble(message: str) -> str:
        """As `Grammar.trouble`."""
        if message.startswith("Unsatisfiable"):
            return f"no document is allowed: {message}"
        return f"llguidance does not support it: {message}; leave it out, or check it with Constraint(fn)"


class _GrammarForm(LazyForm):
    """Masks where tokens are bytes of text, else a reader of settled texts."""

    def __init__(self, text: GrammarText, lm: LanguageModel) -> None:
        self.text, self.lm = text, lm

    def _chosen(self) -> Incremental:
        tokens = token_bytes(self.lm) if self.lm.ends_by_eos_alone else None
        if tokens is not None:
            return GrammarPrefixes(self.text.grammar, tokens, self.lm)
        return PrefixReader(self.lm, self._going, self._ending, lambda: self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """Of the grammar."""
        return hashlib.sha256(self.text.grammar.encode()).hexdigest()[:16]

    def _going(self, rows: Sequences) -> Tensor:
        return as_log(self.text.begins(rows.text))

    def _ending(self, rows: Sequences) -> Tensor:
        return as_log(self.text(rows.text))


def _read_schema(schema: Any) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ModelError(f"JsonSchema: the schema is no JSON: {error}") from error
    if not isinstance(schema, Mapping | bool):
        raise ModelError(f"JsonSchema: got {type(schema).__name__}, expected a schema as a dict or as JSON text")
    try:
        return json.loads(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise ModelError(f"JsonSchema: the schema is no JSON data: {error}") from error


def _with_options(schema: Any) -> Any:
    """The schema with llguidance's option that lets strings hold any escaped character, as JSON does."""
    if not isinstance(schema, dict):
        return schema
    return schema | {"x-guidance": {"json_allow_general_unicode_escapes": True}}
