"""Languages of words: texts that contain, avoid, are, or have at most so many of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache, reduce
from operator import and_
from typing import Any, Literal

from lmppl.errors import ModelError
from lmppl.modeling.evidence.automata import Automaton
from lmppl.modeling.evidence.languages.language import Language
from lmppl.modeling.evidence.languages.regex_machine import containing_automaton, regex_automaton

__all__ = ["Banned", "Contains", "MaxWords", "OneOf"]

MAX_ALL = 8  # words that must all occur: the automaton remembers which have


class Contains(Language):
    """Texts in which words occur: any of them, or all.

    Parameters
    ----------
    words : str or collection of str
        Letters as they stand in the text; `"Paris"` occurs in "Parisian".
    how : {"any", "all"}
        Whether one is enough; the functions `any` and `all` will do.
    whole_words : bool
        Only where neither a letter, a digit nor an underscore stands before or after the word.
    ignore_case : bool
        As `re.IGNORECASE`.
    name : str, optional
        By default "contains".

    Raises
    ------
    ModelError
        Where there is no word, an empty one, or more than 8 that must all occur.

    References
    ----------
    aho1975
    """

    def __init__(
        self,
        words: str | Collection[str],
        how: Literal["any", "all"] | Callable[..., bool] = "any",
        *,
        whole_words: bool = False,
        ignore_case: bool = False,
        name: str | None = None,
    ) -> None:
        listed = _words(words, "Contains")
        how = getattr(how, "__name__", how)  # the built-in functions any and all
        if how not in ("any", "all"):
            raise ModelError(f"Contains: got how={how!r}, expected 'any' or 'all'")
        if how == "all" and len(listed) > MAX_ALL:
            raise ModelError(
                f"Contains: got {len(listed)} words that must all occur, expected at most {MAX_ALL}; multiply several "
                "Contains"
            )
        groups = [listed] if how == "any" else [(word,) for word in listed]
        automaton = reduce(and_, [_containing(group, whole_words, ignore_case) for group in groups])
        arguments = {"words": list(listed), "how": how, "whole_words": whole_words, "ignore_case": ignore_case}
        self._declare(automaton, arguments, name, f"1[x contains {how} of {_shown(listed)}]")


class Banned(Language):
    """Texts in which none of the words occurs.

    Parameters
    ----------
    words, whole_words, ignore_case
        As in `Contains`.
    name : str, optional
        By default "banned".
    """

    def __init__(
        self,
        words: str | Collection[str],
        *,
        whole_words: bool = False,
        ignore_case: bool = False,
        name: str | None = None,
    ) -> None:
        listed = _words(words, "Banned")
        automaton = (~_containing(listed, whole_words, ignore_case)).minimize()
        arguments = {"words": list(listed), "whole_words": whole_words, "ignore_case": ignore_case}
        self._declare(automaton, arguments, name, f"1[x contains none of {_shown(listed)}]")


class OneOf(Language):
    """The texts that are listed, and no other.

    Parameters
    ----------
    strings : collection of str
    strip : bool
        White space around a text does not count: completions often begin with a space.
    name : str, optional
        By default "one_of".
    """

    def __init__(self, strings: Collection[str], *, strip: bool = False, name: str | None = None) -> None:
        if isinstance(strings, str):
            raise ModelError(f"OneOf: got the single text {strings!r}, expected a list of texts")
        listed = list(dict.fromkeys(strings))
        wrong = next((one for one in listed if not isinstance(one, str)), None)
        if not listed or wrong is not None:
            raise ModelError(f"OneOf: got {'no text' if not listed else repr(wrong)}, expected texts")
        if strip:
            automaton = regex_automaton(rf"\s*(?:{'|'.join(re.escape(one.strip()) for one in listed)})\s*")
        else:
            automaton = Automaton.exactly(listed)
        self._declare(automaton, {"strings": listed, "strip": strip}, name, f"1[x is one of {_shown(listed)}]")


class MaxWords(Language):
    """Texts of at most n words, as `len(text.split())` counts them: between white space.

    Parameters
    ----------
    num_words : int
        n ≥ 0.
    name : str, optional
        By default "max_words".
    """

    def __init__(self, num_words: int, *, name: str | None = None) -> None:
        if isinstance(num_words, bool) or not isinstance(num_words, int) or num_words < 0:
            raise ModelError(f"MaxWords: got {num_words!r}, expected a number of words, at least 0")
        pattern = rf"\s*(?:\S+\s+){{0,{num_words - 1}}}(?:\S+\s*)?" if num_words else r"\s*"
        self._declare(regex_automaton(pattern), {"num_words": num_words}, name, f"1[x has ≤ {num_words} words]")


def _words(words: str | Collection[str], kind: str) -> tuple[str, ...]:
    listed = (words,) if isinstance(words, str) else tuple(dict.fromkeys(words))
    wrong: Any = next((word for word in listed if not isinstance(word, str) or not word), None)
    if not listed or wrong is not None:
        got = "no word" if not listed else repr(wrong)
        raise ModelError(f"{kind}: got {got}, expected words: texts that are not empty")
    return listed


@lru_cache(64)
def _containing(words: tuple[str, ...], whole_words: bool, ignore_case: bool) -> Automaton:
    return containing_automaton(words, whole_words=whole_words, ignore_case=ignore_case)


def _shown(texts: Collection[str]) -> str:
    first = [repr(text) for text in list(texts)[:3]]
    return f"({', '.join(first)}{', ...' if len(texts) > 3 else ''})"
