"""The manifest: the file whose presence makes a folder a checkpoint.

It names every file with size and SHA-256, and the facts a resume must know before it unpickles anything. What
is read here may come from a damaged disk or a stranger: parsing it raises `ManifestError` and nothing else.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1
#: Thousands of ranks fit in a few MiB. A larger file is no manifest and is not read into memory.
MAX_BYTES = 64 * 2**20


class ManifestError(ValueError):
    """The bytes are not a manifest. The message says why in one line."""


def _inside_folder(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path != str(PurePosixPath(*parts)) or parts[0] == "/" or ".." in parts or "\0" in path:
        raise ValueError("must be a plain relative path inside the checkpoint")
    if path == FILE_NAME:
        raise ValueError("the manifest cannot list itself")
    return path


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")


class FileEntry(_Part):
    """One file, and the rank that wrote it (the same rank verifies it on resume)."""

    path: Annotated[str, AfterValidator(_inside_folder)]
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rank: int = Field(ge=0)


def _distinct(files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    if len({entry.path for entry in files}) != len(files):
        raise ValueError("a file is listed twice")
    return files


class Manifest(_Part):
    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)
    step: int = Field(ge=0)
    attempt: int = Field(ge=0)
    world_size: int = Field(ge=1)
    zero_stage: int = Field(ge=0, le=3)
    data_position: int = Field(ge=0, description="Samples consumed, over all ranks.")
    config_hash: str
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1), AfterValidator(_distinct)]
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    def encode(self) -> bytes:
        return self.model_dump_json(by_alias=True, indent=1).encode()


def parse(raw: bytes) -> Manifest:
    """Reads what `Manifest.encode` wrote.

    Raises:
        ManifestError: it is anything else.
    """
    if len(raw) > MAX_BYTES:
        raise ManifestError(f"larger than {MAX_BYTES} bytes")
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise ManifestError(f"{place}: {first['msg']}") from None
