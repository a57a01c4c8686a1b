"""The documentation says what is so: names, tables, links, sources, and every block of code that it shows.

Conventions of the pages, seen in their source: a ```python block runs, in one namespace a page and in the page's own
folder; one whose first line is `# name.py` is also written there under that name; ```python no-run does not run. An
```output block is exactly what the Python block before it prints. The `lmppl` commands of a ```sh run block run in that
folder too, and end with exit code 0 or with the one that a comment `# exit N` names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

import lmppl
from lmppl import errors
from lmppl.cli import app
from lmppl.inference.citations import bibtex
from lmppl.modeling import evidence

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NEEDS = {"save_and_reload_draws.md": ("pandas", "pyarrow", "datasets")}
FEW = 40  # draws per context in the runs of the README


class Block(NamedTuple):
    """A fenced block: its first line after the fence, its text, and the line of the page where it begins."""

    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    info, lines, start = None, [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif info is None:
            info, lines, start = line.removeprefix("```").strip(), [], number
        else:
            found.append(Block(info, "".join(f"{line}\n" for line in lines), start))
            info = None
    assert info is None, f"{page}: the block at line {start} is not closed"
    return found


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# What the pages show runs.

RUNNABLE = [page for page in PAGES if any(b.info in ("python", "sh run") for b in blocks(page))]


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of one page; modules that its blocks import from there are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)) or name == "lmppl_spec":
            del sys.modules[name]
    importlib.invalidate_caches()


def run_python(block: Block, page: Path, folder: Path, namespace: dict[str, object]) -> str:
    """What the block prints; a name in its first line makes it a file, too."""
    if name := re.match(r"# (\w+\.py)\n", block.text):
        (folder / name[1]).write_text(block.text, encoding="utf-8")
    code = compile("\n" * block.line + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def run_commands(block: Block) -> None:
    for line in block.text.splitlines():
        command, _, comment = line.partition("  #")
        if not command.startswith("lmppl "):
            continue
        wanted = int(comment.split()[1]) if comment.strip().startswith("exit") else 0
        result = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(app, shlex.split(command)[1:])
        assert result.exit_code == wanted, f"{line}\n{result.output}\n{result.exception!r}"


def namespace_of(page: Path) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "a_page"}
    if page == README:  # it says that these two are the reader's own
        from lmppl.cli.sentiment import is_impersonal, sentiment

        namespace |= {"sentiment": sentiment, "is_clean": is_impersonal}
    return namespace


@pytest.mark.parametrize("page", RUNNABLE, ids=short)
def test_blocks_run_and_print_what_the_page_says(
    page: Path, page_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module, reason=f"{page.name} needs {module}: pip install 'lmppl[data]'")
    if page == README:
        monkeypatch.setattr(lmppl, "compare", functools.partial(lmppl.compare, num_draws=FEW))
    namespace, printed = namespace_of(page), ""
    for block in blocks(page):
        if block.info == "python":
            printed = run_python(block, page, page_folder, namespace)
        elif block.info == "output":
            assert printed.strip() == block.text.strip(), f"{short(page)}, line {block.line}: it prints\n{printed}"
        elif block.info == "sh run":
            run_commands(block)


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_blocks_are_of_a_known_kind(page: Path) -> None:
    known = {"", "python", "python no-run", "output", "sh", "sh run", "text", "mermaid", "json"}
    assert {b.info for b in blocks(page)} <= known
