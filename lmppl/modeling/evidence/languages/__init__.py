"""Languages: sets of texts that engines can see inside."""

from lmppl.modeling.evidence.languages.finished import Finished
from lmppl.modeling.evidence.languages.grammar import Grammar, JsonSchema
from lmppl.modeling.evidence.languages.language import Language
from lmppl.modeling.evidence.languages.regex import Regex
from lmppl.modeling.evidence.languages.words import Banned, Contains, MaxWords, OneOf

__all__ = [
    "Banned",
    "Contains",
    "Finished",
    "Grammar",
    "JsonSchema",
    "Language",
    "MaxWords",
    "OneOf",
    "Regex",
]
