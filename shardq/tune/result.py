"""What became of a tuning."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What became of a model."""

    folder: Path
    blocks: int
    resumed: int  # blocks that were there before
    modules: int  # with tuned codes
    left: tuple[str, ...]  # modules that get codes, but none of these: the main job makes them
    samples: int
    tokens: int
    dropped: int  # samples that were too short
    borrowed: tuple[str, ...]  # modules of experts that no token went to: scales of activations are their siblings'
    unscaled: tuple[str, ...]  # blocks in which AWQ finds nothing to scale
