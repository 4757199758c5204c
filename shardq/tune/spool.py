"""Hidden states that memory must not hold: in a file without a name, of which some samples are read, or written, at a
time.

Each sample has a place of fixed size. Compressed, the last bytes of its numbers (sign and exponent, of BF16 and FP32)
lie in a zstd frame behind the others, which hardly give way; what is left of the place is a hole that takes no disk.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from shardq.errors import BudgetTooSmall, DiskFull
from shardq.files.atomic import pread_exact, preallocate, pwrite_all, writing
from shardq.files.direct import whole_blocks
from shardq.files.nameless import open_nameless
from shardq.limits import SpoolAs
from shardq.tune.settings import check_spool

LEVEL: Final = 1  # negative ones leave single bytes as they are, and others find no more
# What is expected to be left of last bytes, by type; measured: at most 0.39, and 0.74 of F16 (bench/README.md).
SHARES: Final = {torch.float16: 0.8}
SHARE: Final = 0.45
CPU: Final = torch.device("cpu")


@dataclass(slots=True)
class Taken:
    """Of a disk, by hidden states of all files together."""

    most_bytes: int | None
    bytes: int = 0

    def add(self, more_bytes: int) -> None:
        """Raises BudgetTooSmall."""
        self.bytes += more_bytes
        if self.most_bytes is not None and self.bytes > self.most_bytes:
            raise BudgetTooSmall(
                f"--max-disk: hidden states of some samples take {self.bytes} bytes already, of {self.most_bytes} that "
                "are left for all of them; allow more, or take fewer --nsamples in another folder"
            )


class Spool:
    """Hidden states [samples, tokens, width] in a file of a folder that goes when nobody holds it any more. What is
    read is a copy, with the bits that were written."""

    device: Final = CPU

    def __init__(
        self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, *, packed: bool, taken: Taken | None = None
    ) -> None:
        """A file for a `shape`, without content; `packed`: compressed. Raises BudgetTooSmall, DiskFull, NotWritable."""
        self.shape, self.dtype, self.packed, self._folder = shape, dtype, packed, folder
        self._taken = taken or Taken(None)
        self._what = f"{folder.name}: hidden states"
        self._sizes = [0] * len(self)  # of samples, as they are stored
        self._held = [0] * len(self)  # of the disk, which a smaller one does not give back
        self._file = open_nameless(folder, "hidden")
        if not packed:
            self._taken.add(self.nbytes)
            preallocate(self._file.fileno(), self.nbytes, self._what)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all samples, as tensors have them."""
        return len(self) * self._sample_bytes

    @property
    def _sample_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __getitem__(self, samples: slice | Sequence[int]) -> torch.Tensor:
        """Some samples, in any order. Raises SourceUnreadable."""
        chosen = range(len(self))[samples] if isinstance(samples, slice) else samples
        found = torch.empty((len(chosen), *self.shape[1:]), dtype=self.dtype)
        for place, sample in enumerate(chosen):
            self._read(sample, _bytes_of(found[place]))
        return found

    def __setitem__(self, samples: slice, values: torch.Tensor) -> None:
        """Raises BudgetTooSmall, DiskFull, NotWritable."""
        chosen = range(len(self))[samples]
        for sample, value in zip(chosen, values.detach().expand(len(chosen), *self.shape[1:]), strict=True):
            self._write(sample, _bytes_of(value.to(CPU, self.dtype).contiguous()))

    def beside(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Spool":
        """Room for others, which lie as these do and take of the same disk. Raises as a new one."""
        return Spool(self._folder, shape, dtype, packed=self.packed, taken=self._taken)

    def clone(self) -> "Spool":
        """The same in a file of its own, sample by sample. Raises as `__setitem__`."""
        made = self.beside(self.shape, self.dtype)
        for sample in range(len(self)):
            made[sample : sample + 1] = self[sample : sample + 1]
        return made

    def _at(self, sample: int) -> int:
        return sample * (whole_blocks(self._sample_bytes) if self.packed else self._sample_bytes)

    def _read(self, sample: int, out: NDArray[np.uint8]) -> None:
        fd, at, size = self._file.fileno(), self._at(sample), self._sizes[sample]
        if size == out.nbytes:
            pread_exact(fd, out.data, at, self._what)
            return
        stored = np.empty(size, np.uint8)
        pread_exact(fd, stored.data, at, self._what)
        numbers = out.reshape(-1, self.dtype.itemsize)
        behind = numbers[:, :-1].size
        numbers[:, :-1] = stored[:behind].reshape(len(numbers), -1)
        numbers[:, -1] = np.frombuffer(zstandard.ZstdDecompressor().decompress(stored[behind:].data), np.uint8)

    def _write(self, sample: int, values: NDArray[np.uint8]) -> None:
        parts = [values]
        if self.packed:
            numbers = values.reshape(-1, self.dtype.itemsize)
            last = np.ascontiguousarray(numbers[:, -1])
            frame = zstandard.ZstdCompressor(level=LEVEL).compress(last.data)
            if len(frame) < len(last):
                parts = [np.ascontiguousarray(numbers[:, :-1]), np.frombuffer(frame, np.uint8)]
            held = whole_blocks(sum(p.nbytes for p in parts))
            if held > self._held[sample]:
                self._taken.add(held - self._held[sample])
                self._held[sample] = held
        at = self._at(sample)
        with writing(self._what):
            for part in parts:
                pwrite_all(self._file.fileno(), part.data, at)
                at += part.nbytes
        self._sizes[sample] = sum(p.nbytes for p in parts)


Hidden = torch.Tensor | Spool


@dataclass(frozen=True, slots=True)
class Spooling:
    """Where hidden states lie, and what they may take."""

    folder: Path
    max_ram_bytes: int | None = None  # beyond which they lie in files of the folder
    max_disk_bytes: int | None = None  # which all these files together may take
    how: SpoolAs = "auto"

    def __post_init__(self) -> None:
        """Raises BadOption."""
        check_spool(self.how)

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, copies: int, in_ram: int = 0) -> Hidden:
        """Room for hidden states of a `shape` of which there will be so many copies, the others by `clone`, or by
        `make_beside`, and some more `in_ram` wherever these lie, which take none of the disk. Compressed if the disk
        has no room for them else. Raises BudgetTooSmall, DiskFull, NotWritable."""
        sample = math.prod(shape[1:]) * dtype.itemsize
        if self.max_ram_bytes is None or not is_spooled(shape[0] * sample, copies + in_ram, self.max_ram_bytes):
            return torch.empty(shape, dtype=dtype)
        if sample > self.max_ram_bytes:
            raise BudgetTooSmall(
                f"--max-ram of {self.max_ram_bytes} bytes: one sample's hidden states take {sample}; ask for shorter "
                "samples, or allow more"
            )
        with writing(self.folder):
            free = shutil.disk_usage(self.folder).free
        most = self.max_disk_bytes
        room = free if most is None else min(free, most)
        least, packed = plan_spool(shape[0] * copies, sample, dtype, self.how, room)
        if most is not None and least > most:
            raise BudgetTooSmall(
                f"--max-disk leaves {most} bytes, and hidden states that --max-ram does not let stay in memory need "
                f"some {least}; allow more, or take fewer samples"
            )
        if least > free:
            raise DiskFull(
                f"{self.folder}: hidden states need some {least} bytes, and its disk has {free} free; free some space, "
                "or take fewer samples"
            )
        return Spool(self.folder, shape, dtype, packed=packed, taken=Taken(most))


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Hidden:
    """Room for hidden states."""
    return torch.empty(shape, dtype=dtype)


def make_beside(hidden: Hidden, shape: tuple[int, ...], dtype: torch.dtype) -> Hidden:
    """Room for more hidden states where some are. Raises as a new `Spool`."""
    return in_memory(shape, dtype) if isinstance(hidden, torch.Tensor) else hidden.beside(shape, dtype)


def is_spooled(hidden_bytes: int, copies: int, max_ram_bytes: int | None) -> bool:
    """True if hidden states of which there are so many copies lie in files."""
    return max_ram_bytes is not None and copies * hidden_bytes > max_ram_bytes


def plan_spool(
    samples: int, sample_bytes: int, dtype: torch.dtype, how: SpoolAs, room_bytes: int | None
) -> tuple[int, bool]:
    """What so many samples are expected to take of a disk with room for `room_bytes`, None: for all; and whether they
    are compressed."""
    plain = samples * sample_bytes
    if how == "plain" or (how == "auto" and (room_bytes is None or plain <= room_bytes)):
        return plain, False
    share = 1 - (1 - SHARES.get(dtype, SHARE)) / dtype.itemsize
    return samples * whole_blocks(math.ceil(sample_bytes * share)), True


def _bytes_of(values: torch.Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = values.reshape(-1).view(torch.uint8).numpy()
    return found
