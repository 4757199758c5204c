"""What a verification found, and the checks that every output passes, whatever its files hold."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from shardq.errors import VerifyFailed
from shardq.ledger import LEDGER
from shardq.outputs import Output
from shardq.serving.served import Served
from shardq.source_rows import WINDOW_BYTES
from shardq.sources.base import SourceFile
from shardq.staging import PROVENANCE


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found."""

    result: str  # the folder or repo, as it was named
    commit: str | None  # of a repo
    files: int  # weight shards
    tensors: int  # source tensors in the ledger; of what others made those of its headers
    deep: bool  # hashes were taken and modules unpacked
    compared: int  # source tensors compared with their source
    problems: tuple[str, ...]  # empty when the output is sound
    served: Served  # for verdicts of engines
    notes: tuple[str, ...] = ()  # what is odd but does no harm
    foreign: bool = False  # made by others: there is no ledger, and nothing was checked against one


def listed_files(output: Output) -> list[SourceFile]:
    """The weight files that the records list. Raises VerifyFailed for one that is missing or has another size."""
    found: list[SourceFile] = []
    for name, record in output.provenance["files"].items():
        file = output.files.get(name)
        if file is None:
            raise VerifyFailed(f"{output.where} lacks {name}, which {PROVENANCE} lists: get it again or quantize again")
        if file.size_bytes != record["size"]:
            raise VerifyFailed(
                f"{output.where}/{name} has {file.size_bytes} bytes: expected {record['size']}; get it again or "
                "quantize again"
            )
        found.append(file)
    return found


def check_run(output: Output) -> Iterator[str]:
    """The records are of one run."""
    if output.ledger["fingerprint"] != output.provenance["fingerprint"]:
        yield f"{LEDGER} and {PROVENANCE} are of different runs"


def check_listed_hashes(output: Output) -> Iterator[str]:
    """What the Hub says of its large files, without reading them."""
    for name, record in output.provenance["files"].items():
        yield from _compare_hash(name, output.files[name].sha256, record["sha256"])


def check_hashes(output: Output) -> Iterator[str]:
    """The same of their bytes, which are all read."""
    for name, record in output.provenance["files"].items():
        digest = hashlib.sha256()
        for at in range(0, record["size"], WINDOW_BYTES):
            digest.update(output.source.read(name, at, min(record["size"], at + WINDOW_BYTES)))
        yield from _compare_hash(name, digest.hexdigest(), record["sha256"])


def _compare_hash(name: str, found: str | None, expected: str) -> Iterator[str]:
    if found not in {None, expected}:
        yield f"{name} has sha256 {found}: expected {expected}; get it again or quantize again"
