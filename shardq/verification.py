"""Check an output against its own ledger, index, headers and hashes, and against its source if at hand.

The output is a folder or a repo: everything is read by ranges, and without `deep` only headers and records are.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shardq.against_source import check_against_source
from shardq.config_json import dump
from shardq.errors import BadOption, CorruptShard, SourceUnreadable, UnknownDtype, VerifyFailed
from shardq.files.safetensors import Header, HeaderTensor
from shardq.gguf_verification import verify_gguf
from shardq.headers import read_headers
from shardq.importance import Importance
from shardq.layouts import GGUF_LAYOUT
from shardq.ledger import DECODED
from shardq.outputs import Output, open_result, read_output, target_of
from shardq.recorded import check_absorbed
from shardq.replaced import check_replaced
from shardq.serving.served import read_served
from shardq.sources.base import Source
from shardq.staging import CONFIG
from shardq.unpack import OutputShard, check_module
from shardq.verified import Verification, check_hashes, check_listed_hashes, check_run, listed_files

Headers = Mapping[str, Header]  # shard -> header


def verify_output(result: str, deep: bool, source: Source | None, importance: Importance | None = None) -> Verification:
    """Check a finished output: a folder, or org/name[@revision]; `importance` that of a GGUF output, for its `source`.

    Always: headers, sizes, index, configuration and completeness against the ledger, and the sha256 of each shard where
    the Hub tells it. `deep`: also the sha256 of each shard as it is read, and every module unpacked; a repo's weights
    are then read twice. With `source`: the ledger checked against its headers, error figures recomputed, and what was
    copied or decoded compared byte for byte; what a tuning replaced is compared with the ledger's sha256, also by
    `deep`, and of weights that it scaled the source does not tell the error figures. Memory: twice the
    packed bytes of one module, and its codes. Raises VerifyFailed when the output is unfinished or holds no records,
    HubAccess and HubTransfer; everything else comes back as problems.
    """
    opened = open_result(result)
    output = read_output(opened, result)
    if output.layout.name == GGUF_LAYOUT:
        return verify_gguf(output, deep, source, importance)
    if importance:
        raise BadOption(f"--importance is for GGUF files, and {result} is none: leave it out")
    headers = _read_headers(output)
    problems = [*_check_ledger(output, headers), *check_absorbed(output.ledger)]
    problems += (*_check_index(output, headers), *_check_config(output))
    complete = not problems
    problems += check_listed_hashes(output)
    compared = 0
    if deep:
        problems += (p for p in check_hashes(output) if p not in problems)
        for name, entry in _quantized(output) if complete else ():
            shard = OutputShard(opened, entry["file"], headers[entry["file"]])
            problems += check_module(name, entry, shard, output.layout)
    if deep or source is not None:
        there = {name: (file, t.begin, t.end) for name, (file, t) in _tensors(headers).items()}
        problems += check_replaced(output, there) if complete else ()
    if source is not None and not problems:
        shards = {name: OutputShard(opened, name, h) for name, h in headers.items()}
        found, compared = check_against_source(output, source, shards)
        problems += found
    tensors = len(output.ledger["tensors"])
    served = read_served({t.name: (t.dtype, t.shape) for h in headers.values() for t in h.tensors}, output.config)
    return Verification(result, opened.commit, len(headers), tensors, deep, compared, tuple(problems), served)


def _read_headers(output: Output) -> dict[str, Header]:
    """Of all shards that the records list, after a look at their sizes. Raises VerifyFailed."""
    try:
        return read_headers(output.source, listed_files(output))
    except (CorruptShard, UnknownDtype, SourceUnreadable) as e:
        raise VerifyFailed(str(e)) from e


def _tensors(headers: Headers) -> dict[str, tuple[str, HeaderTensor]]:
    return {t.name: (file, t) for file, h in headers.items() for t in h.tensors}


def _check_ledger(output: Output, headers: Headers) -> Iterator[str]:
    """Every ledger entry has its tensors, every tensor has a ledger entry."""
    there = _tensors(headers)
    claimed: dict[tuple[str, int], str] = {}  # name and slice of a tensor -> source tensor
    yield from check_run(output)
    for name, entry in output.ledger["tensors"].items():
        for out_name, dtype, shape in _expected(output, name, entry):
            file, tensor = there.get(out_name, ("", None))
            if tensor is None:
                yield f"{out_name} is missing: the ledger promises it for {name}"
            elif (tensor.dtype, list(tensor.shape)) != (dtype, list(shape)):
                yield f"{out_name} in {file} is {tensor.dtype} {list(tensor.shape)}: expected {dtype} {list(shape)}"
            elif file != entry["file"]:
                yield f"{out_name} is in {file}: the ledger has it in {entry['file']}"
            at = (out_name, target_of(name, entry).index)
            if at in claimed:
                yield f"{out_name} is claimed by {name} and {claimed[at]}"
            claimed[at] = name
    for out_name in there.keys() - {out_name for out_name, _ in claimed}:
        yield f"{out_name} in {there[out_name][0]} is in no ledger entry"


def _expected(output: Output, name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    if entry["outcome"] == "dropped":
        return
    if entry["outcome"] in ("copied", DECODED):
        yield name, entry["dtype"], tuple(entry["shape"])
        return
    scheme = output.believed_scheme(name)
    if scheme is None:
        return  # _check_config tells
    rows, columns = entry["shape"]
    place = target_of(name, entry)
    for spec in output.layout.outputs(scheme, entry["dtype"], rows, columns):
        yield f"{place.module}.{spec.suffix}", spec.dtype, place.stacked(spec.shape)


def _check_index(output: Output, headers: Headers) -> Iterator[str]:
    """The index names exactly the tensors that the shards hold, with the right total."""
    indexes = [n for n in sorted(output.files) if n.endswith(".safetensors.index.json") and "/" not in n]
    there = {name: file for name, (file, _) in _tensors(headers).items()}
    if not indexes:
        if len(headers) > 1:
            yield f"{len(headers)} shards and no index"
        return
    name = indexes[0]
    try:
        index = json.loads(_read_all(output, name))
        weight_map, said = index["weight_map"], index["metadata"]["total_size"]
        differing = sorted(set(weight_map.items()) ^ set(there.items()))
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        yield f"{name} is not an index ({e})"
        return
    if differing:
        yield f"{name} and the shards disagree, first about {differing[:3]}"
    total = sum(t.end - t.begin for h in headers.values() for t in h.tensors)
    if said != total:
        yield f"{name} says total_size {said}: expected {total}"


def _check_config(output: Output) -> Iterator[str]:
    """config.json tells a loader the scheme of every module as the ledger has it."""
    own = output.layout.config_key
    if not own:
        return
    block = output.config.get(own)
    if not isinstance(block, dict):
        yield f"{CONFIG} has no {own}"
        return
    for key, value in output.layout.config_keys(block).items():
        if output.config.get(key) != value:
            yield f"{CONFIG}: {key} does not go with {own}"
    for name, content in output.layout.config_files(block).items():
        if name not in output.files or _read_all(output, name) != dump(content):
            yield f"{name} differs from {own} in {CONFIG}"
    for name, entry in _quantized(output):
        scheme = output.believed_scheme(name)
        if scheme is None or scheme.name != entry["scheme"]:
            believed = scheme.name if scheme else "not quantized"
            yield f"{CONFIG} says {believed} for {name}: the ledger says {entry['scheme']}"


def _quantized(output: Output) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((n, e) for n, e in output.ledger["tensors"].items() if e["outcome"] == "quantized")


def _read_all(output: Output, name: str) -> bytes:
    return output.source.read(name, 0, output.files[name].size_bytes)
