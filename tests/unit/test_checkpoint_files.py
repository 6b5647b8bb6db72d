"""Files are written whole or not at all, and their hash is that of the bytes on disk."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from mamba_trainer.checkpoint import files


def test_what_torch_saves_has_the_size_and_hash_that_were_counted(tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    state = {"large": torch.arange(3_000_000, dtype=torch.float32), "small": torch.ones(3), "text": "x" * 10}
    written = files.write_file(path, lambda sink: torch.save(state, sink))
    assert written == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert torch.equal(torch.load(path, weights_only=True)["large"], state["large"])


def test_hash_file_reads_blocks_and_reports_every_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = os.urandom(files.BLOCK_BYTES * 2 + 17)
    path.write_bytes(content)
    lengths: list[int] = []
    assert files.hash_file(path, lengths.append) == (len(content), hashlib.sha256(content).hexdigest())
    assert lengths == [files.BLOCK_BYTES, files.BLOCK_BYTES, 17]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_bytes(path, b"old")

    def fail(sink: files.Sink) -> None:
        sink.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_inside_torch_save_is_an_os_error_not_a_crash(tmp_path: Path) -> None:
    """In a child, as the limit on file sizes cannot be raised again."""
    state = [torch.zeros(500_000), torch.zeros(500_000)]
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        try:
            files.write_file(tmp_path / "x", lambda sink: torch.save(state, sink))
        except OSError as error:
            os._exit(10 if error.errno == errno.EFBIG and not list(tmp_path.iterdir()) else 11)
        finally:
            os._exit(12)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 10
