"""Regex: texts that a regular expression matches as a whole."""

from __future__ import annotations

from functools import lru_cache

from lmppl.errors import ModelError
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.languages.language import Language
from lmppl.modeling.evidence.languages.regex_machine import regex_automaton

__all__ = ["Regex"]


class Regex(Language):
    r"""Texts that a regular expression matches as a whole, as Python's `re.fullmatch` does: a finite automaton.

    Classes are Unicode's, flags are `re`'s, look-ahead, look-behind and word boundaries work. To find something
    anywhere, say so: `.*London.*`. Completions often begin with a space: ` ?(yes|no)`.

    Parameters
    ----------
    pattern : str
        In the syntax of `re`.
    flags : int
        Of `re`, such as `re.IGNORECASE | re.DOTALL`.
    name : str, optional
        By default "regex".

    Raises
    ------
    ModelError
        Where `re` cannot parse the pattern, no text matches it, it is not regular (back-references, atomic groups,
        possessive quantifiers), or its automaton is too large.

    Examples
    --------
    >>> Regex(r"\d{4}-\d{2}").accepts(["2026-11", "2026-1"]).tolist()
    [True, False]
    """

    def __init__(self, pattern: str, flags: int = 0, *, name: str | None = None) -> None:
        if not isinstance(pattern, str):
            raise ModelError(f"Regex: got {pattern!r}, expected a pattern as text")
        if isinstance(flags, bool) or not isinstance(flags, int):
            raise ModelError(f"Regex: got flags={flags!r}, expected flags of re, such as re.IGNORECASE | re.DOTALL")
        arguments = {"pattern": pattern, "flags": int(flags)}
        self._declare(_automaton(pattern, int(flags)), arguments, name, f"1[x matches /{pattern}/]")


@lru_cache(64)
def _automaton(pattern: str, flags: int) -> Automaton:
    return regex_automaton(pattern, flags)
