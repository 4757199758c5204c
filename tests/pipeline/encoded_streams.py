"""What the tests of range mode with quantized sources share: where tensors lie, runs, and what goes wrong on the way.
On no path; see encoded_sources.py."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import encoded_sources as sources
import pytest

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.lender import Lender
from shardq.loans import Digest, Loan
from shardq.onepass import OnePass
from shardq.run import quantize_to_folder
from shardq.sources.base import Source
from shardq.sources.hub import HubReader

CASES: Final[Mapping[str, Any]] = sources.CASES
PLACES: Final[Mapping[str, Any]] = sources.PLACES
FLOATS: Final = ("fp8_block", "nvfp4_ct", "mxfp4_ct", "bnb4_nested")
INTEGERS: Final = ("gptq_v1", "gptq_act_order", "int_pack_zeros", "awq")  # GPTQ and AWQ have codes along lines
EXPERTS: Final = tuple(name for name, case in CASES.items() if case.kinds & {"mxfp4_gptoss", "fp8_3d"})
Report = Callable[[Progress], None]


def by_layer(name: str) -> int:
    """Companions in the first shard, which has nothing else, and a shard for each layer."""
    found = sources.LAYER.search(name)
    return 1 if sources.COMPANION.search(name) else 2 + (int(found[1]) if found else 0)


def write(tmp_path: Path, case: str, place: str | None = None) -> Path:
    folder: Path = sources.write_source(CASES[case], tmp_path / "written" / "model")
    if place is None:
        return folder
    where, shards = (by_layer, 3) if place == "by_layer" else PLACES[place]
    out: Path = sources.scatter(folder, tmp_path / "source" / "model", where, shards)
    return out


def run(
    source: Source, out: Path, stream: bool = True, parallel: int = 1, report: Report = lambda _: None,
    scheme: str = "W4A16", cap: int | None = None,
) -> None:  # fmt: skip
    limits = Limits(parallel=parallel, stream=stream, max_disk_bytes=cap)
    quantize_to_folder(source, make_recipe(scheme), out, limits, False, report)


def local(folder: Path, out: Path, scheme: str = "W4A16") -> dict[str, bytes]:
    shardq.quantize(folder, scheme, output_dir=out, limits=Limits(parallel=1))
    return shards(out)


def shards(out: Path) -> dict[str, bytes]:
    assert (out / "config.json").exists()
    assert not (out / ".shardq").exists()
    return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}


def work_of(folder: Path, scheme: str = "W4A16") -> OnePass:
    return OnePass((shardq.plan(folder, scheme),))


def loans_of(folder: Path) -> list[Loan]:
    return [loan for own in work_of(folder).loans.values() for loan in own]


class Flip:
    """The lender gets one byte of a tensor changed, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loan: Loan, at: int, mask: int) -> None:
        self.done = False
        lending = set[tuple[int, str]]()  # threads, and for whom
        read_loan, read_into = Lender._read, HubReader.read_into

        def note(lender: Lender, wanted: Loan, keeps: bool) -> Digest:
            lending.add((threading.get_ident(), wanted.home))
            try:
                return read_loan(lender, wanted, keeps)
            finally:
                lending.clear()

        def read(reader: HubReader, begin: int, out: memoryview) -> None:
            read_into(reader, begin, out)
            mine = (threading.get_ident(), loan.home) in lending and reader._file.name == loan.donor
            if mine and begin <= at < begin + out.nbytes and not self.done:
                out[at - begin] ^= mask
                self.done = True

        monkeypatch.setattr(Lender, "_read", note)
        monkeypatch.setattr(HubReader, "read_into", read)


def corrupt_span(monkeypatch: pytest.MonkeyPatch, shard: str, at: int, times: int = 1, mask: int = 0xFF) -> None:
    """What is streamed of a shard has one byte wrong; what is lent of it has not."""
    lending, left = set[int](), times
    read_loan, read_into = Lender._read, HubReader.read_into

    def note(lender: Lender, loan: Loan, keeps: bool) -> Digest:
        lending.add(threading.get_ident())
        return read_loan(lender, loan, keeps)

    def read(reader: HubReader, begin: int, out: memoryview) -> None:
        nonlocal left
        read_into(reader, begin, out)
        streamed = reader._file.name == shard and threading.get_ident() not in lending
        if streamed and begin <= at < begin + out.nbytes and left:
            out[at - begin] ^= mask
            left -= 1

    monkeypatch.setattr(Lender, "_read", note)
    monkeypatch.setattr(HubReader, "read_into", read)
