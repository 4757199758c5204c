"""What benches share that measure settings one by one: a folder to work in, a table, and what misses its bar."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

READ_BYTES: Final = 8 << 20
RowT = TypeVar("RowT", bound=Any)  # a dataclass


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """That one, made if need be and kept; without one a temporary one."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="shardq-bench-") as temporary:
        yield Path(temporary)


def warm(source: Path) -> None:
    """Read a checkpoint once, so that all who read it later find it in the page cache."""
    for path in source.glob("*.safetensors"):
        with path.open("rb") as f:
            while f.read(READ_BYTES):
                pass


def print_rows(
    columns: Sequence[str],
    names: Iterable[str],
    measure_one: Callable[[str], Iterable[RowT]],
    judge: Callable[[Sequence[RowT]], Iterable[str]],
    json_file: Path | None,
) -> None:
    """The head of a table, the rows of each name, which `measure_one` prints, and below it what misses its bar. Rows
    also go into `json_file`, if there is one."""
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    rows = [row for name in names for row in measure_one(name)]
    print("\n".join(["", *judge(rows)]))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
