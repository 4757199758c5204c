"""Check an output folder against its own ledger, index, headers and hashes, and against its source if at hand."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardq.config_json import dump
from shardq.errors import ShardqError, VerifyFailed
from shardq.files.safetensors import Header, HeaderTensor, read_header
from shardq.layouts import find_layout
from shardq.layouts.base import Layout
from shardq.ledger import LEDGER, decode_ledger
from shardq.schemes import Scheme
from shardq.sources.base import Source
from shardq.staging import CONFIG, PROVENANCE, WORK
from shardq.unpack import check_against_source, check_module

HASH_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found."""

    folder: Path
    files: int  # weight shards
    tensors: int  # source tensors in the ledger
    deep: bool  # hashes were taken and modules unpacked
    compared: int  # source tensors compared with their source
    problems: tuple[str, ...]  # empty when the folder is sound


@dataclass(frozen=True, slots=True)
class Output:
    """An output folder's records."""

    folder: Path
    provenance: Mapping[str, Any]
    ledger: Mapping[str, Any]
    config: Mapping[str, Any]
    headers: Mapping[str, Header]  # shard -> header

    @property
    def layout(self) -> Layout:
        """The layout that the folder was written in."""
        return find_layout(self.provenance["identity"]["recipe.layout"])


def verify_folder(folder: Path, deep: bool, source: Source | None) -> Verification:
    """Check a finished output folder.

    Always: headers, sizes, index, configuration and completeness against the ledger. `deep`: also the sha256 of each
    shard, and every module unpacked. With `source`: error figures recomputed and copies compared byte for byte.
    Raises VerifyFailed when the folder is unfinished or holds no records; everything else comes back as problems.
    """
    output = _open(folder)
    problems = [*_check_ledger(output), *_check_index(output), *_check_config(output)]
    compared = 0
    if deep:
        problems += _check_hashes(output)
        problems += [p for n, e in _quantized(output) for p in check_module(n, e, *_place(output, e), output.layout)]
    if source is not None and not problems:
        found, compared = check_against_source(output.ledger["tensors"], source, output.layout, output.headers, folder)
        problems += found
    return Verification(folder, len(output.headers), len(output.ledger["tensors"]), deep, compared, tuple(problems))


def _open(folder: Path) -> Output:
    if (folder / WORK).exists():
        raise VerifyFailed(f"{folder} is unfinished: run the command that began it again to resume")
    try:
        provenance = json.loads((folder / PROVENANCE).read_bytes())
        ledger = decode_ledger((folder / LEDGER).read_bytes())
        config = json.loads((folder / CONFIG).read_bytes())
        files = provenance["files"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise VerifyFailed(
            f"{folder} has no readable {PROVENANCE}, {LEDGER} and {CONFIG} ({e}): expected the output of "
            "`shardq quantize`"
        ) from e
    headers: dict[str, Header] = {}
    for name, record in files.items():
        path = folder / name
        if not path.exists():
            raise VerifyFailed(f"{folder} lacks {name}, which {PROVENANCE} lists: get it again or quantize again")
        if path.stat().st_size != record["size"]:
            raise VerifyFailed(
                f"{path} has {path.stat().st_size} bytes: expected {record['size']}; get it again or quantize again"
            )
        try:
            headers[name] = read_header(path)
        except ShardqError as e:
            raise VerifyFailed(str(e)) from e
    return Output(folder, provenance, ledger, config, headers)


def _tensors(output: Output) -> dict[str, tuple[str, HeaderTensor]]:
    return {t.name: (file, t) for file, h in output.headers.items() for t in h.tensors}


def _check_ledger(output: Output) -> Iterator[str]:
    """Every ledger entry has its tensors, every tensor has a ledger entry."""
    there = _tensors(output)
    claimed: dict[str, str] = {}
    if output.ledger["fingerprint"] != output.provenance["fingerprint"]:
        yield f"{LEDGER} and {PROVENANCE} are of different runs"
    for name, entry in output.ledger["tensors"].items():
        for out_name, dtype, shape in _expected(output, name, entry):
            file, tensor = there.get(out_name, ("", None))
            if tensor is None:
                yield f"{out_name} is missing: the ledger promises it for {name}"
            elif (tensor.dtype, list(tensor.shape)) != (dtype, list(shape)):
                yield f"{out_name} in {file} is {tensor.dtype} {list(tensor.shape)}: expected {dtype} {list(shape)}"
            if out_name in claimed:
                yield f"{out_name} is claimed by {name} and {claimed[out_name]}"
            claimed[out_name] = name
    for out_name in there.keys() - claimed.keys():
        yield f"{out_name} in {there[out_name][0]} is in no ledger entry"


def _expected(output: Output, name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if entry["outcome"] == "copied":
        yield name, entry["dtype"], tuple(entry["shape"])
        return
    scheme = believed_scheme(output, name)
    if scheme is None:
        return  # _check_config tells
    rows, columns = entry["shape"]
    module = name.removesuffix(".weight")
    for spec in output.layout.outputs(scheme, rows, columns):
        yield f"{module}.{spec.suffix}", spec.dtype, spec.shape


def believed_scheme(output: Output, name: str) -> Scheme | None:
    """What a loader would take from config.json for the module of a source tensor."""
    return output.layout.scheme_of(output.config["quantization_config"], name.removesuffix(".weight"))


def _check_index(output: Output) -> Iterator[str]:
    """The index names exactly the tensors that the shards hold, with the right total."""
    indexes = sorted(output.folder.glob("*.safetensors.index.json"))
    there = {name: file for name, (file, _) in _tensors(output).items()}
    if not indexes:
        if len(output.headers) > 1:
            yield f"{len(output.headers)} shards and no index"
        return
    index = json.loads(indexes[0].read_bytes())
    if index["weight_map"] != there:
        wrong = sorted(set(index["weight_map"].items()) ^ set(there.items()))[:3]
        yield f"{indexes[0].name} and the shards disagree, first about {wrong}"
    total = sum(t.end - t.begin for h in output.headers.values() for t in h.tensors)
    if index["metadata"]["total_size"] != total:
        yield f"{indexes[0].name} says total_size {index['metadata']['total_size']}: expected {total}"


def _check_config(output: Output) -> Iterator[str]:
    """config.json tells a loader the scheme of every module as the ledger has it."""
    block = output.config.get("quantization_config")
    if not isinstance(block, dict):
        yield f"{CONFIG} has no quantization_config"
        return
    for name, content in output.layout.config_files(block).items():
        path = output.folder / name
        if not path.exists() or path.read_bytes() != dump(content):
            yield f"{name} differs from quantization_config in {CONFIG}"
    for name, entry in _quantized(output):
        scheme = believed_scheme(output, name)
        if scheme is None or scheme.name != entry["scheme"]:
            believed = scheme.name if scheme else "not quantized"
            yield f"{CONFIG} says {believed} for {name}: the ledger says {entry['scheme']}"


def _check_hashes(output: Output) -> Iterator[str]:
    for name, record in output.provenance["files"].items():
        digest = hashlib.sha256()
        with (output.folder / name).open("rb") as f:
            while block := f.read(HASH_BYTES):
                digest.update(block)
        if digest.hexdigest() != record["sha256"]:
            yield f"{name} has sha256 {digest.hexdigest()}: expected {record['sha256']}; get it again or quantize again"


def _quantized(output: Output) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((n, e) for n, e in output.ledger["tensors"].items() if e["outcome"] == "quantized")


def _place(output: Output, entry: Mapping[str, Any]) -> tuple[Path, Header]:
    return output.folder / entry["file"], output.headers[entry["file"]]
