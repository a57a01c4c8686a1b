"""The documentation says what is so: names, tables, links, sources, and every block of code that it shows.

Conventions of the pages, seen in their source: a ```python block runs, in one namespace a page and in the page's own
folder; one whose first line is `# name.py` is also written there under that name; ```python no-run does not run. An
```output block is exactly what the Python block before it prints. The `lmppl` commands of a ```sh run block run in that
folder too, and end with exit code 0 or with the one that a comment `# exit N` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
import typer.main
from typer.testing import CliRunner

import lmppl
from lmppl import errors
from lmppl.cli import app
from lmppl.inference.citations import bibtex
from lmppl.modeling import evidence
from lmppl.modeling.target import Target

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NEEDS = {
    "save_and_reload_draws.md": ("pandas", "pyarrow", "datasets"),
    "use_your_reward_model.md": ("sklearn",),
}
FEW = 20  # draws per context in the runs of the README


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
    code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
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
        pytest.importorskip(module, reason=f"{page.name} needs {module}: pip install 'lmppl[data,dev]'")
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


# Tables agree with the code and with one another.


def table_rows(page: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of all tables of a page whose header begins with these columns."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif tuple(header[: len(columns)]) == columns and not set("".join(cells)) <= set("-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def code_of(cell: str) -> str:
    found = re.match(r"`([^`]+)`", cell)
    assert found, cell
    return found[1]


def guarantees() -> dict[str, str]:
    return {kind.__name__: kind.guarantee.value for kind in lmppl.ENGINES}


@pytest.mark.parametrize("page", [README, DOCS / "reference" / "engines.md"], ids=short)
def test_the_engines_and_their_guarantees_are_those_of_the_code(page: Path) -> None:
    rows = table_rows(page, "engine", "guarantee")
    assert {code_of(row["engine"]): row["guarantee"] for row in rows} == guarantees()
    assert [code_of(row["engine"]) for row in rows] == [kind.__name__ for kind in lmppl.ENGINES]


def test_the_readme_says_which_engines_take_estimated_factors() -> None:
    estimated = lmppl.Reward(lambda texts: [0.0] * len(texts), name="estimated", stochastic=True)
    form = Target(lmppl.TabularLM.random(2, 2, order=1, seed=0) * estimated).form
    takers = [kind.__name__ for kind in lmppl.ENGINES if kind().unsupported_reason(form) is None]
    named = " and ".join(f"`{name}`" for name in takers)
    assert f"(`stochastic=True`) are for {named}; the others refuse them." in README.read_text(encoding="utf-8")


def test_the_arguments_of_engines_are_those_of_the_code() -> None:
    listed = {code_of(row["argument"]) for row in table_rows(DOCS / "reference" / "engines.md", "argument", "default")}
    assert listed == {f"{k.__name__}.{f.name}" for k in lmppl.ENGINES for f in dataclasses.fields(k) if f.init}


def test_the_paper_index_has_every_engine_with_its_file_and_sources() -> None:
    rows = {code_of(row["engine"]): row for row in table_rows(DOCS / "paper_index.md", "engine", "paper", "where")}
    assert set(rows) == set(guarantees())
    for kind in lmppl.ENGINES:
        row = rows[kind.__name__]
        assert code_of(row["where"]) == kind.__module__.replace(".", "/") + ".py"
        assert set(kind.references) <= set(re.findall(r"`([^`]+)`", row["paper"])), kind


def evidence_classes() -> set[str]:
    return {name for name in evidence.__all__ if issubclass(getattr(evidence, name), lmppl.Factor)}


@pytest.mark.parametrize("page", [README, DOCS / "reference" / "evidence.md"], ids=short)
def test_the_evidence_is_that_of_the_code(page: Path) -> None:
    cells = [row["declaration"] for row in table_rows(page, "declaration", "log φ(x)")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)\(", cell)} - {"Factor"}
    assert named == evidence_classes()


def test_the_paper_index_has_every_kind_of_evidence() -> None:
    rows = table_rows(DOCS / "paper_index.md", "factor", "paper", "where")
    assert evidence_classes() <= {code_of(row["factor"]) for row in rows}
    for row in rows:
        assert (ROOT / code_of(row["where"])).exists(), row


def test_the_names_are_those_of_the_package() -> None:
    rows = table_rows(DOCS / "reference" / "api.md", "name", "signature")
    listed = [code_of(row["name"]) for row in rows]
    assert sorted(listed) == sorted(lmppl.__all__)
    for row in rows:
        name, signature = code_of(row["name"]), code_of(row["signature"]) if row["signature"].startswith("`") else ""
        if not signature.startswith("(") or name in ("Cost", "Part"):
            continue
        shown = re.findall(r"(\w+)(?==|,|\)|$)", re.sub(r"=(\(.*?\)|\"[^\"]*\"|[^,()]+)", "=", signature))
        assert shown == list(inspect.signature(getattr(lmppl, name)).parameters), name


def test_the_errors_are_those_of_the_code() -> None:
    rows = table_rows(DOCS / "reference" / "errors.md", "class", "also a")
    assert {code_of(row["class"]) for row in rows} == set(errors.__all__)
    for row in rows:
        kind = getattr(errors, code_of(row["class"]))
        assert code_of(row["also a"]) in {base.__name__ for base in kind.__bases__}


def test_the_options_are_those_of_the_command_line() -> None:
    group = typer.main.get_command(app)
    there = {(name, o) for name, c in group.commands.items() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    wanted = {(command, option) for command, option in there if option.startswith("-")}
    listed: set[tuple[str, str]] = set()
    for row in table_rows(DOCS / "reference" / "command_line.md", "option", "commands"):
        for cell in re.findall(r"`([^`]+)`", row["option"]):
            listed |= {(command.strip(), cell.split()[0]) for command in row["commands"].split(",")}
    assert {pair for pair in wanted if pair[1] not in ("--help", "-h")} == listed
    shown = [code_of(row["command"]) for row in table_rows(DOCS / "reference" / "command_line.md", "command", "does")]
    assert [text.split()[1] for text in shown] == list(group.commands)


# Links and sources.


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    outside_code = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = not re.match(r"https?:", link)
        if inside and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


def test_every_page_is_reached_from_the_index() -> None:
    seen, ahead = set(), [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        ahead += [(page.parent / link).resolve() for link in links]
    assert set(DOCS.rglob("*.md")) <= seen


def bibliography() -> set[str]:
    return set(re.findall(r"^@\w+\{([^,\s]+),", (DOCS / "refs.bib").read_text(encoding="utf-8"), re.MULTILINE))


def test_every_source_that_is_cited_has_an_entry() -> None:
    files = [*PAGES, *sorted((ROOT / "lmppl").rglob("*.py"))]
    key = re.compile(r"`([a-z]+(?:1[89]|20)\d\d[a-z]*)`")
    cited = {(short(file), found) for file in files for found in key.findall(file.read_text(encoding="utf-8"))}
    assert cited
    assert {(file, found) for file, found in cited if found not in bibliography()} == set()


@pytest.mark.parametrize("kind", lmppl.ENGINES, ids=lambda kind: kind.__name__)
def test_every_engine_cites_papers_of_the_bibliography(kind: type[lmppl.Engine]) -> None:
    assert kind.references
    assert set(kind.references) <= bibliography()
    assert kind().cite() == bibtex(kind.references)
