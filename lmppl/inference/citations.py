"""The papers behind the engines, as BibTeX. The wheel has no docs folder, so the entries lie beside this module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lmppl.errors import ModelError

__all__ = ["bibtex", "entries"]

BIBLIOGRAPHY = Path(__file__).with_name("references.bib")
_ENTRY = re.compile(r"^@\w+\{(?P<key>[^,\s]+),.*?^\}", re.MULTILINE | re.DOTALL)


def bibtex(keys: Iterable[str]) -> str:
    """The BibTeX entries of `keys`, in that order, separated by blank lines; "" for no keys.

    Raises
    ------
    ModelError
        Naming a key that has no entry.
    """
    known = entries()
    wanted = list(keys)
    for key in wanted:
        if key not in known:
            raise ModelError(f"no source has the key {key!r}; {BIBLIOGRAPHY.name} has {', '.join(sorted(known))}")
    return "\n\n".join(known[key] for key in wanted)


@cache
def entries() -> dict[str, str]:
    """Key → BibTeX entry, for every source that an engine names."""
    return {m["key"]: m.group() for m in _ENTRY.finditer(BIBLIOGRAPHY.read_text(encoding="utf-8"))}
