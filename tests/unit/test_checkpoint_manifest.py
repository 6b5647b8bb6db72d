"""Manifests come from disks that lie: parsing gives a manifest or a `ManifestError`, never anything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_trainer.checkpoint.manifest import FileEntry, Manifest, ManifestError, parse

SHA = "0" * 64


def make(**changes: object) -> Manifest:
    facts = {
        "step": 7,
        "attempt": 1,
        "world_size": 2,
        "zero_stage": 2,
        "data_position": 56,
        "config_hash": "c0ffee",
        "files": [FileEntry(path="a.pt", size=3, sha256=SHA, rank=0)],
    }
    return Manifest.model_validate(facts | changes)


def test_a_manifest_reads_back_as_it_was_written() -> None:
    written = make(extra={"shardLayout": {"sub_group_size": 10}})
    assert parse(written.encode()) == written


def test_unknown_keys_of_a_newer_writer_are_ignored() -> None:
    raw = json.loads(make().encode()) | {"schemaVersion": 2, "novelty": [1, 2]}
    assert parse(json.dumps(raw).encode()).schema_version == 2


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a", "a/../b", "", ".", "a//b", "./a", "a/", "manifest.json", "a\0b"]
)
def test_paths_that_leave_the_folder_or_have_two_spellings_are_refused(path: str) -> None:
    raw = json.loads(make().encode())
    raw["files"][0]["path"] = path
    with pytest.raises(ManifestError):
        parse(json.dumps(raw).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", "x"),
        ("worldSize", 0),
        ("zeroStage", 4),
        ("files", []),
        ("files", None),
        ("files", [{"path": "a", "size": -1, "sha256": SHA, "rank": 0}]),
        ("files", [{"path": "a", "size": 1, "sha256": "zz", "rank": 0}]),
        ("files", [{"path": "a", "size": 1, "sha256": SHA, "rank": 0}] * 2),
    ],
)
def test_impossible_values_are_refused_with_the_place_in_one_line(key: str, value: object) -> None:
    raw = json.loads(make().encode()) | {key: value}
    with pytest.raises(ManifestError) as refused:
        parse(json.dumps(raw).encode())
    assert key.rstrip("s") in str(refused.value) and "\n" not in str(refused.value)


@given(st.binary(max_size=200))
def test_garbage_is_a_manifest_error(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse(raw)


def test_nesting_that_would_exhaust_the_stack_is_a_manifest_error() -> None:
    with pytest.raises(ManifestError):
        parse(b'{"extra":' + b"[" * 200_000)


@given(st.data())
def test_a_damaged_manifest_is_refused_or_still_a_manifest(data: st.DataObject) -> None:
    raw = bytearray(make().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        assert isinstance(parse(bytes(raw)), Manifest)
    except ManifestError as error:
        assert "\n" not in str(error)
