"""What a run tells while it goes on; the command line draws it, scripts may."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["start", "fetch", "work", "file", "upload"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a run."""

    stage: Stage
    item: str  # shard or file that the step is about; empty for the whole run
    done_bytes: int  # source bytes finished, those of an earlier run included
    total_bytes: int
    resumed_bytes: int  # of done_bytes, those that an earlier run had finished
    fetched_bytes: int  # downloaded so far, 0 for a folder
    done_files: int
    total_files: int
    uploaded_bytes: int = 0  # so far, 0 without a destination


Report = Callable[[Progress], None]
