"""Encoded weights from safetensors files, and rows of them through the package's own door."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges, decode_rows, read_parts
from shardq.dequantize.finding import Found, find_encoded
from shardq.kernels import KernelSet, load

EXPECTED = "EXPECTED."
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class EncodedFile:
    """One file as a checkpoint of one shard."""

    content: bytes
    refs: Mapping[str, TensorRef]
    metadata: Mapping[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's configuration."""
        found = json.loads(self.metadata["config"])
        assert isinstance(found, dict)
        return found

    def expected(self) -> dict[str, NDArray[np.float32]]:
        """fp32 weights that the reader made, by name."""
        return {
            name.removeprefix(EXPECTED): np.frombuffer(self.content[t.begin : t.end], "<f4").reshape(t.shape or ())
            for name, t in self.refs.items()
            if name.startswith(EXPECTED)
        }

    def find(self) -> Found:
        """All encoded weights, with what they want looked up."""
        refs = [t for name, t in self.refs.items() if not name.startswith(EXPECTED)]
        first = find_encoded(refs, self.config)
        peeked = {t.name: self.content[t.begin : t.end] for t in first.wanted}
        return find_encoded(refs, self.config, peeked)

    def read(self, part: Part, ranges: Ranges) -> bytes:
        """Bytes of ranges of the shard."""
        assert part.shard == "shard"
        return b"".join(self.content[begin:end] for begin, end in ranges)

    def decode(self, e: Encoded, row: int, end_row: int, kernels: KernelSet) -> NDArray[np.float32]:
        """Rows of a weight."""
        out = np.full((end_row - row, e.columns), np.nan, np.float32)
        decode_rows(e, read_parts(e, row, end_row, self.read), row, end_row, out, kernels)
        return out


def open_encoded(content: bytes) -> EncodedFile:
    """The bytes of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    refs = {
        name: TensorRef(name, "shard", e["dtype"], tuple(e["shape"]), *(8 + size + n for n in e["data_offsets"]))
        for name, e in header.items()
    }
    return EncodedFile(content, refs, metadata)


@pytest.fixture(scope="session")
def fast() -> KernelSet:
    """The kernels that this CPU would use."""
    return load()


@pytest.fixture(scope="session")
def open_golden() -> Callable[[str], EncodedFile]:
    """open_golden("kind/case")."""
    return lambda case: open_encoded((GOLDEN / f"{case}.safetensors").read_bytes())


@pytest.fixture(scope="session")
def open_bytes() -> Callable[[bytes], EncodedFile]:
    """A file from its bytes."""
    return open_encoded


def golden_cases() -> list[str]:
    """kind/case of every file."""
    return sorted(str(p.relative_to(GOLDEN).with_suffix("")) for p in GOLDEN.glob("*/*.safetensors"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with an argument `golden_case` run for each file."""
    if "golden_case" in metafunc.fixturenames:
        metafunc.parametrize("golden_case", golden_cases())
