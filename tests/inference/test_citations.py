"""What engines cite is in the package, and is what the documentation has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmppl.errors import ModelError
from lmppl.inference import ENGINES
from lmppl.inference.citations import bibtex, entries

DOCS = Path(__file__).resolve().parents[2] / "docs" / "refs.bib"


def documented() -> dict[str, str]:
    """Key → entry of docs/refs.bib, read by counting braces."""
    text, found, at = DOCS.read_text(encoding="utf-8"), {}, 0
    while (start := text.find("\n@", at)) >= 0:
        depth, at = 0, text.index("{", start)
        while True:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
            if depth == 0:
                break
        entry = text[start + 1 : at]
        found[re.match(r"@\w+\{([^,]+),", entry)[1]] = entry
    return found


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_cites_its_papers(kind: type) -> None:
    text = kind().cite()
    for key in kind.references:
        assert f"{{{key}," in text
    assert text.count("\n@") == len(kind.references) - 1


def test_entries_are_those_that_engines_name_and_equal_the_documented_ones() -> None:
    assert set(entries()) == {key for kind in ENGINES for key in kind.references}
    known = documented()
    assert {key: known.get(key) for key in entries()} == entries()


def test_no_keys_are_no_text_and_unknown_keys_are_named() -> None:
    assert bibtex(()) == ""
    with pytest.raises(ModelError, match="'nobody1999'"):
        bibtex(["nobody1999"])
