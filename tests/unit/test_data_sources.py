"""Sources: every document is read exactly once, however the source is cut into units of work."""

import json
import os
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_trainer.contract import UserError
from mamba_trainer.data import sources
from mamba_trainer.data.encode import read_documents
from mamba_trainer.data.sources import open_source
from mamba_trainer.data.units import Block, JsonLinesUnit

RECORDS = [f"document {i}: " + "wörds " * (i % 40) for i in range(300)]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Small sources are cut as finely as large ones would be."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 1_000)


def read(source, **options) -> list[str]:
    return [raw.decode() for unit in open_source(source, **options).units for raw in read_documents(unit)]


@settings(max_examples=200)
@given(st.text(alphabet="ab\né日🐍", max_size=200), st.integers(4, 40))
def test_the_blocks_of_a_text_file_are_the_file_and_each_is_whole_characters(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(raw := text.encode())
    blocks = [Block(path, index, size).read() for index in range(-(-len(raw) // size))]
    assert "".join(block.decode() for block in blocks) == text
    assert all(len(block) <= 2 * size for block in blocks)


def test_a_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TEXT_DOCUMENT_BYTES", 500)
    path = tmp_path / "book.txt"
    path.write_text("\n".join(RECORDS) + "\n")
    documents = read(path)
    assert "".join(documents) == path.read_text()
    assert len(documents) > 50
    assert all(document.endswith("\n") for document in documents)


@settings(max_examples=100)
@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 50), st.booleans())
def test_every_json_line_is_read_once_wherever_the_file_is_cut(tmp_path_factory, texts, step, last_end):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    raw = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    path.write_bytes(raw + b"\n" * last_end)
    size = path.stat().st_size
    units = [JsonLinesUnit(path, at, min(at + step, size), "text") for at in range(0, size, step)]
    found = [document.decode() for unit in units for document in unit.documents()]
    assert found == texts


def test_jsonl_parquet_and_a_saved_dataset_give_the_same_documents_in_order(tmp_path):
    rows = {"id": list(range(len(RECORDS))), "body": RECORDS}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n\n" for text in RECORDS))
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", row_group_size=70)
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.parquet", "saved"):
        source = open_source(tmp_path / name, text_field="body")
        assert len(source.units) > 3
        assert read(tmp_path / name, text_field="body") == RECORDS, name


def test_rows_without_text_are_left_out(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "", "two"]}), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}')
    assert read(tmp_path / "rows.parquet") == read(tmp_path / "rows.jsonl") == ["one", "two"]


def test_a_folder_is_read_recursively_in_order_without_what_is_hidden_or_not_included(tmp_path):
    for name in (
        "b/deep/z.py",
        "b/a.py",
        "a.py",
        "notes.md",
        ".git/x.py",
        "site-packages/x.py",
        ".hidden.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.py", "notes.md", "b/a.py", "b/deep/z.py"]
    assert read(tmp_path, include=["*.py"]) == ["a.py", "b/a.py", "b/deep/z.py"]
    assert read(tmp_path, include=["b/*", "*.md"]) == ["notes.md", "b/a.py", "b/deep/z.py"]


def test_a_folder_may_hold_shards_of_records_beside_text(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}')
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("last")
    assert read(tmp_path) == ["plain", "line", "row", "last"]


def test_the_standard_library_is_tens_of_megabytes_of_source_and_nothing_installed():
    source = open_source("python-stdlib")
    assert source.size > 10e6
    paths = [block.path for unit in source.units for block in unit.blocks]
    assert {path.suffix for path in paths} == {".py"}
    assert not any("site-packages" in path.parts for path in paths)
    assert any(path.name == "argparse.py" for path in paths)
    assert open_source("python-stdlib") == source


def test_a_changed_file_changes_the_fingerprint_and_a_moved_folder_does_not(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    before = open_source(folder).sha256
    folder = folder.rename(tmp_path / "moved")
    assert open_source(folder).sha256 == before
    status = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("two")
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_source(folder).sha256 != before


@pytest.mark.parametrize(("name", "module"), [("rows.parquet", "pyarrow"), ("saved", "datasets")])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch, name, module):
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "rows.parquet")
    datasets.Dataset.from_dict({"text": ["row"]}).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"`{module}` is needed .*pip install 'mamba-trainer\[data\]'"):
        open_source(tmp_path / name)


def write_bad_sources(folder):
    (folder / "empty.txt").touch()
    (folder / "nothing").mkdir()
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "other.jsonl").write_text('{"content": "x", "id": 1}\n')
    (folder / "number.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    (folder / "broken.parquet").write_text("PAR1 not really")
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), folder / "other.parquet")
    datasets.Dataset.from_dict({"content": ["x"]}).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(folder / "dict")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "there is no file or folder"),
        ("empty.txt", "holds no text"),
        ("nothing", "holds no text"),
        ("broken.jsonl", "byte 17: not a JSON record"),
        ("list.jsonl", "it has: list"),
        ("other.jsonl", r"no text in field 'text' \(it has: content, id\)"),
        ("number.jsonl", "byte 17: field 'text' holds 5, no text"),
        ("broken.parquet", "not a parquet file"),
        ("other.parquet", "its text columns are: content\n"),
        ("saved", "its text columns are: content\n"),
        ("dict", "name one: .*/dict/train"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_with_what_to_do(tmp_path, name, message):
    write_bad_sources(tmp_path)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
