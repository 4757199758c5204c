"""stub"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    size_bytes: int
    sha256: str


class Destination(Protocol):
    label: str
    head: str

    def prepare(self) -> None: ...
    def provenance(self) -> dict[str, Any] | None: ...
    def holds(self, files: Collection[StoredFile]) -> bool: ...
    def upload(self, path: Path, file: StoredFile, on_bytes: Callable[[int], None]) -> None: ...
    def stored(self, files: Collection[StoredFile]) -> set[str]: ...
    def commit(self, files: Collection[StoredFile], small: Mapping[str, bytes], message: str) -> str: ...
