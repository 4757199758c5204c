"""What a tuning puts on the disk, from headers alone: files of codes, and hidden states that memory must not hold."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from shardq.errors import BudgetTooSmall
from shardq.files.direct import whole_blocks
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.tune.blocks import BlockModel
from shardq.tune.spool import Spooling, is_spooled, plan_spool
from shardq.tune.subjects import Subject, Subjects
from shardq.tuned import DTYPES, PARTS

LONGEST_SCALE: Final = -2.2250738585072014e-308  # of a whole tensor, as it is written
OTHER_BYTES: Final = 1 << 13  # the manifest, but for what it says of each file; a lock
LINE_BYTES: Final = 256  # of a file, in the manifest
ID_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Shares:
    """Of what --max-disk leaves beside codes; None without a limit."""

    spool_bytes: int | None = None  # for hidden states
    waiting_bytes: int | None = None  # for a block that waits


def check_disk(
    model: BlockModel, subjects: Subjects, samples: int, tokens: int, chains: int, spooling: Spooling
) -> Shares:
    """Refuse what a folder will not hold, where `spooling` has the limit of all. `samples` of `tokens` go through the
    model in so many `chains`. Raises BudgetTooSmall."""
    most = spooling.max_disk_bytes
    if most is None:
        return Shares()
    codes = codes_bytes(subjects) + samples * tokens * ID_BYTES + OTHER_BYTES
    each, count = hidden_bytes(model, 1, tokens), chains * samples
    in_files = is_spooled(samples * each, chains, spooling.max_ram_bytes)
    spool, packed = plan_spool(count, each, model.dtype, spooling.how, most - codes) if in_files else (0, False)
    if codes + spool > most:
        how = f" (compressed, as is expected; {count * each} as they are)" if packed else ""
        told = f", and {spool} of hidden states that --max-ram does not let stay in memory{how}" if spool else ""
        raise BudgetTooSmall(
            f"--max-disk of {most} bytes: tuning needs {codes} for codes{told}; allow more, or take fewer --nsamples"
        )
    whole = count * (whole_blocks(each) if packed else each) if in_files else 0  # if nothing gives way
    return Shares(min(whole, most - codes), max(0, most - codes - whole))


def hidden_bytes(model: BlockModel, samples: int, tokens: int) -> int:
    """Hidden states of all samples, once."""
    return int(samples * tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize)


def codes_bytes(subjects: Subjects) -> int:
    """All files of codes, and at most a few bytes more: not every symmetric code has a zero point."""
    files = [*subjects.blocks, *([(subjects.head,)] if subjects.head else [])]
    return sum(_file_bytes(of) + LINE_BYTES for of in files)


def _file_bytes(subjects: Sequence[Subject]) -> int:
    specs, said = [], {}
    for s in subjects:
        rows, columns = s.shape
        groups = s.scheme.groups(columns)
        there = {"codes", "scales"} | ({"zeros"} if s.scheme.format.is_integer else set())
        there |= {"biases"} if s.scheme.numbers == "mlx" else set()
        specs += [
            TensorSpec(f"{part}.{s.module}", DTYPES[part], (rows, columns if part == "codes" else groups))
            for part in PARTS
            if part in there
        ]
        said[s.module] = {"scheme": asdict(s.scheme), "global_scale": LONGEST_SCALE}
    return plan_file(specs, {"modules": json.dumps(said, sort_keys=True)}).size_bytes
