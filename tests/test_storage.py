"""Draws on disk: what is loaded is what was saved, and a failed write leaves what stood there."""

import dataclasses
import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

import lmppl.storage
from lmppl.errors import MissingDependency, StorageError
from lmppl.lm.tabular import TabularLM
from lmppl.sequences import Draws
from lmppl.storage import atomic_write, hash_tensors, versions

SUFFIXES = [".jsonl", ".safetensors", ".parquet"]
INF = math.inf


@pytest.fixture
def draws() -> Draws:
    lm = TabularLM.random(4, 5, context=["", "ab"])
    table = lm.draw(3, generator=torch.Generator().manual_seed(2))
    return dataclasses.replace(
        table,
        log_weight=torch.tensor([0.1, -INF, 1e-300, -1e5, 3.0, -INF], dtype=torch.float64),
        log_q=table.log_prior.float(),
        features={
            "sentiment.score": torch.tensor([0.1, -0.0, 1e-45, -INF, 3.4e38, 1 / 3]),
            "votes": torch.arange(12).view(6, 2),
            "spoken": torch.tensor([True, False, True, True, False, False]),
            "half": torch.tensor([0.1] * 6, dtype=torch.bfloat16),
        },
        log_factors={"clean": torch.tensor([0.0, -INF, 0.0, 0.0, math.pi, -INF], dtype=torch.float64)},
        columns={"chain": torch.arange(6, dtype=torch.int32)},
        meta={"seed": 7, "engine": "rejection", "note": "β ≤ 1", "bounds": [0.5, INF], "versions": versions()},
    )


def everything(draws):
    found = {name: getattr(draws, name) for name in ("ids", "lengths", "finished", "context")}
    found |= {name: getattr(draws, name) for name in ("log_weight", "log_prior", "log_q")}
    for group in ("features", "log_factors", "columns"):
        found |= {f"{group}/{name}": value for name, value in getattr(draws, group).items()}
    return found


def assert_same(a, b):
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if value is None:
            assert right[name] is None
            continue
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.contiguous().view(-1).tolist() == right[name].view(-1).tolist(), name
    assert a.text == b.text
    assert a.prompts == b.prompts


# Round trips.


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_loaded_is_what_was_saved(draws, suffix, tmp_path):
    path = draws.save(tmp_path / f"draws{suffix}")
    loaded = Draws.load(path)
    assert path == tmp_path / f"draws{suffix}"
    assert_same(draws, loaded)
    assert loaded.decoder is None
    assert loaded.meta == {**draws.meta, "bounds": [0.5, "inf"]}
    torch.testing.assert_close(loaded.weights, draws.weights)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts_survive_what_is_done_with_loaded_draws(draws, suffix, tmp_path):
    loaded = Draws.load(draws.save(tmp_path / f"draws{suffix}"))
    assert loaded.select([4, 0]).text == [draws.text[4], draws.text[0]]
    assert set(loaded.resample(5).text) <= set(draws.text)
    assert loaded.full_text == draws.full_text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bare_and_empty_draws(draws, suffix, tmp_path):
    bare = dataclasses.replace(
        draws, log_weight=None, log_prior=None, log_q=None, features={}, log_factors={}, columns={}, meta={}
    )
    assert_same(bare, Draws.load(bare.save(tmp_path / f"bare{suffix}")))
    none = draws.select([])
    assert_same(none, Draws.load(none.save(tmp_path / f"none{suffix}")))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("text", ["", "a\nb\r\n\u2028c", '"quoted" \\', "日本語 🙂", "\x00"])
def test_any_text(draws, suffix, text, tmp_path):
    one = draws.select([0])
    one.__dict__["text"] = [text]
    assert Draws.load(one.save(tmp_path / f"one{suffix}")).text == [text]


@pytest.mark.parametrize("suffix", [".jsonl", ".safetensors"])
def test_half_a_surrogate_pair_is_kept(draws, suffix, tmp_path):
    one = draws.select([0])
    one.__dict__["text"] = ["\ud83d"]
    assert Draws.load(one.save(tmp_path / f"one{suffix}")).text == ["\ud83d"]


def test_safetensors_keep_every_bit_even_after_the_end_of_rows(draws, tmp_path):
    odd = draws.ids.clone()
    odd[~draws.mask] = torch.arange(int((~draws.mask).sum()))
    loaded = Draws.load(dataclasses.replace(draws, ids=odd).save(tmp_path / "odd.safetensors"))
    assert loaded.ids.equal(odd)
    score = draws.features["sentiment.score"]
    assert loaded.features["sentiment.score"].view(torch.int32).equal(score.view(torch.int32)), "−0.0 stays −0.0"


def test_jsonl_is_valid_json_that_people_can_read(draws, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = draws.save(tmp_path / "draws.jsonl").read_text(encoding="utf-8").splitlines()
    header, *rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert header["format"] == "lmppl.draws"
    assert header["prompts"] == ["", "ab"]
    assert header["meta"]["seed"] == 7
    assert len(rows) == 6
    assert rows[1]["log_weight"] == "-inf"
    assert rows[1]["weight"] == 0
    assert rows[4]["prompt"] == "ab"
    assert rows[4]["ids"] == draws.token_lists()[4]
    assert rows[3]["features"]["sentiment.score"] == "-inf"
    assert rows[3]["columns"] == {"chain": 3}
    assert "β ≤ 1" in lines[0]


# Tables of other libraries.


def test_pandas(draws):
    frame = draws.to_pandas()
    assert len(frame) == 6
    assert frame["text"].tolist() == draws.text
    assert frame["log_weight"].tolist() == draws.log_weight.tolist()
    assert frame["features.votes"].tolist() == draws.features["votes"].tolist()


def test_arrow(draws):
    table = draws.to_arrow()
    assert table.num_rows == 6
    assert table.column("log_factors.clean").to_pylist() == draws.log_factors["clean"].tolist()
    assert str(table.schema.field("features.votes").type).startswith("list")


def test_hugging_face_dataset(draws):
    dataset = draws.to_dataset()
    assert dataset.num_rows == 6
    assert dataset[1]["log_weight"] == -INF
    assert dataset["text"][:] == draws.text
    assert dataset.filter(lambda row: row["finished"]).num_rows == int(draws.finished.sum())


@pytest.mark.parametrize(
    ("module", "call"), [("pandas", "to_pandas"), ("pyarrow", "to_arrow"), ("datasets", "to_dataset")]
)
def test_a_missing_package_is_named_with_its_extra(draws, module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"needs {module}: pip install 'lmppl\[data\]'"):
        getattr(draws, call)()


def test_parquet_without_pyarrow(draws, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pyarrow"):
        draws.save(tmp_path / "draws.parquet")
    assert list(tmp_path.iterdir()) == []


# Atomic writes.


def test_a_write_replaces_the_file_at_once(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        temporary.write_text("new")

    assert atomic_write(path, write) == path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_full(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        Path("/dev/full").write_text("x" * 10_000)

    with pytest.raises(StorageError, match=r"cannot write .*file: No space left on device; what stood there is"):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match=r"No space left on device$"):
        atomic_write(tmp_path / "new", write)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_disk_full_while_draws_are_saved(draws, suffix, tmp_path, monkeypatch):
    path = draws.save(tmp_path / f"draws{suffix}")
    before = path.read_bytes()

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="No space left on device"):
        draws.select([0]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_nothing_behind(raised, tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise raised

    with pytest.raises(raised):
        atomic_write(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_no_folder_and_no_regular_file(tmp_path):
    with pytest.raises(StorageError, match="No such file or directory"):
        atomic_write(tmp_path / "absent" / "file", lambda temporary: temporary.write_text("x"))
    with pytest.raises(StorageError, match="no regular file"):
        atomic_write(tmp_path, lambda temporary: temporary.write_text("x"))
    with pytest.raises(StorageError, match="/dev/full: it exists and is no regular file"):
        atomic_write("/dev/full", lambda temporary: temporary.write_text("x"))


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    atomic_write(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink()
    assert real.read_text() == "new"


# Files that are no draws.


def test_unknown_suffix(draws, tmp_path):
    for action in (lambda path: draws.save(path), Draws.load):
        with pytest.raises(StorageError, match=r"got the suffix '.csv', expected one of .jsonl .*.safetensors "):
            action(tmp_path / "draws.csv")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_not_there(suffix, tmp_path):
    with pytest.raises(StorageError, match="there is no such file"):
        Draws.load(tmp_path / f"absent{suffix}")


FOREIGN = [b"", b"{}\n", b"hello", b"\xff\xfe\x00", b'{"format": "other"}\n', b"[1]\n", b"null"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file(suffix, content, tmp_path):
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"cannot read {path}"):
        Draws.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut(draws, suffix, tmp_path):
    path = draws.save(tmp_path / f"draws{suffix}")
    whole = path.read_bytes()
    for part in (0.3, 0.6, 0.9, 0.98):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(StorageError, match="cannot read"):
            Draws.load(path)


def test_a_line_that_is_missing_or_damaged(draws, tmp_path):
    path = draws.save(tmp_path / "draws.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(StorageError, match="got 5 draws, expected 6: the file was cut"):
        Draws.load(path)
    path.write_text("".join([*lines[:3], lines[3].replace('"chain"', '"train"'), *lines[4:]]))
    with pytest.raises(StorageError, match=r"line 4 has no 'columns.chain'"):
        Draws.load(path)
    path.write_text("".join([*lines[:3], lines[3][:-10] + "\n", *lines[4:]]))
    with pytest.raises(StorageError, match="line 4 is no JSON"):
        Draws.load(path)


def test_a_file_of_a_later_version(draws, tmp_path):
    path = draws.save(tmp_path / "draws.jsonl")
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(StorageError, match="format version 2, expected at most 1; update lmppl"):
        Draws.load(path)


def test_meta_that_json_cannot_hold(draws, tmp_path):
    for suffix in SUFFIXES:
        with pytest.raises(StorageError, match=r"draws.meta cannot be saved as JSON: .*Tensor"):
            dataclasses.replace(draws, meta={"x": torch.ones(1)}).save(tmp_path / f"draws{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_versions_import_nothing():
    found = versions()
    assert set(found) == {"python", "lmppl", "torch", "transformers", "pyro", "numpy"}
    assert found["torch"] == torch.__version__


def test_nothing_is_unpickled():
    source = "".join(path.read_text() for path in Path(lmppl.storage.__file__).parent.glob("*.py"))
    for word in ("import pickle", " torch.load", " torch.save", "eval("):
        assert word not in source


def test_a_hash_of_tensors_is_of_names_shapes_dtypes_and_entries_alone() -> None:
    grid = torch.arange(6).view(2, 3)
    known = hash_tensors({"a": grid, "b": torch.zeros(0, 2)})
    assert hash_tensors({"b": torch.zeros(0, 2), "a": grid.t().contiguous().t()}) == known  # other order, other strides
    others = [
        {"c": grid, "b": torch.zeros(0, 2)},
        {"a": grid.view(3, 2), "b": torch.zeros(0, 2)},
        {"a": grid.int(), "b": torch.zeros(0, 2)},
        {"a": grid + 1, "b": torch.zeros(0, 2)},
        {"a": grid, "b": torch.zeros(2, 0)},
        {"a": grid},
    ]
    assert len({known, *map(hash_tensors, others)}) == 7
    for column in (torch.zeros(3, 128)[:1, 0], torch.zeros(3, 128)[:, :1].t()):  # strides that nothing is read by
        assert hash_tensors({"x": column}) == hash_tensors({"x": torch.zeros(column.shape)})
    assert len(hash_tensors({"x": torch.tensor(True), "y": torch.ones(2, dtype=torch.bfloat16)})) == 64
