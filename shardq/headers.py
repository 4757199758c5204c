"""A source's headers -> Checkpoint: everything that can be known before a weight is read, checked both ways.

Kept: every tensor of every shard of the weight set. Refused: whatever the index and the headers disagree on in a way
that loses a tensor. One of two copies of a tensor is taken only when the index says which.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shardq.checkpoint import Checkpoint, Shard, SideFile, TensorRef
from shardq.dequantize.finding import find_encoded
from shardq.errors import CheckpointIncomplete, CorruptShard, SourceUnreadable, UnknownDtype
from shardq.files.atomic import reading
from shardq.files.safetensors import (
    PREFIX_BYTES,
    Header,
    TensorSpec,
    header_span,
    parse_header,
    plan_file,
    read_header,
)
from shardq.formats import STORAGE
from shardq.shared_scales import find_global_scales
from shardq.sources.base import REMOTE_READERS, Source, SourceFile, read_each
from shardq.weight_set import Index, choose_weights, is_computed, parse_index

CONFIG_NAME: Final = "config.json"
_DUMP_HEADERS: Final = "headers.json.gz"
_NO_CONFIG: Final = "No config.json: roles of tensors are judged by their names alone."
_PARAMS: Final = "params.json"  # Mistral's own
_FIRST_READ_BYTES: Final = 256 * 1024  # most headers fit, so that one request does
_NEAR_BYTES: Final = 4096  # between small tensors that are read together: less than a request costs
_MOST_SCATTERED: Final = 256  # requests for numbers that are only compared
_MAX_JSON_FILE_BYTES: Final = 1 << 29


def read_checkpoint(source: Source) -> Checkpoint:
    """Read all headers of a source and check them against its index.

    Raises SourceUnreadable (nothing to read, several candidates, malformed index or config), UnsupportedSource,
    CheckpointIncomplete (a shard or tensor that the index names is missing), CorruptShard, UnknownDtype, and for the
    Hub HubAccess and HubTransfer.
    """
    files = {f.name: f for f in source.files()}
    chosen = choose_weights(tuple(files), source.label)
    index: Index | None = None
    shard_names = chosen.shard_names
    warnings = list(chosen.warnings)
    if chosen.index_name is not None:
        index = parse_index(_read_all(source, files[chosen.index_name]), f"{source.label}, {chosen.index_name}")
        shard_names = index.shard_names
        warnings += index.warnings
        _check_shards_exist(index, files, source.label)
        warnings += _warn_of_extra_files(files, shard_names)
    headers = read_headers(source, [files[name] for name in shard_names])
    tensors, notes = _merge(headers, index.weight_map if index else None)
    warnings += notes
    config, config_bytes = _read_config(source, files)
    if config is None:
        warnings.append(f"{_NO_CONFIG} ({_PARAMS} is not read.)" if _PARAMS in files else _NO_CONFIG)
    known = {*shard_names, CONFIG_NAME, chosen.index_name}
    found = find_encoded(tensors.values(), config)
    scales = find_global_scales(found.encoded, tensors)
    if source.remote and (places := len(_near(scales))) > _MOST_SCATTERED:
        warnings.append(
            f"Global scales lie in {places} places, too many to ask for: whether modules that servers run as one "
            "matrix share theirs is not known. A copy in a folder tells."
        )
        scales = ()
    return Checkpoint(
        label=source.label,
        commit=source.commit,
        shards=tuple(Shard(n, files[n].size_bytes, files[n].sha256, headers[n].sha256) for n in shard_names),
        tensors=tensors,
        config=config,
        config_bytes=config_bytes,
        index_name=chosen.index_name,
        side_files=tuple(SideFile(f.name, f.size_bytes) for f in files.values() if f.name not in known),
        warnings=tuple(warnings),
        peeked=_peek(source, (*found.wanted, *scales)),
    )


def _near(tensors: Iterable[TensorRef]) -> list[list[TensorRef]]:
    """Small tensors by what is read at once: files have them side by side, by the thousand."""
    runs: list[list[TensorRef]] = []
    for t in sorted(tensors, key=lambda t: (t.shard, t.begin)):
        last = runs[-1] if runs else []
        if last and last[0].shard == t.shard and t.begin - last[-1].end <= _NEAR_BYTES:
            last.append(t)
        else:
            runs.append([t])
    return runs


def _peek(source: Source, wanted: Iterable[TensorRef]) -> dict[str, bytes]:
    """The content of small tensors that decide what a plan is."""
    runs = _near(wanted)
    if not runs:
        return {}
    from concurrent.futures import ThreadPoolExecutor  # a folder of plain weights needs no threads

    with ThreadPoolExecutor(REMOTE_READERS if source.remote else 1) as pool:
        contents = pool.map(lambda run: source.read(run[0].shard, run[0].begin, run[-1].end), runs)
        return {
            t.name: content[t.begin - run[0].begin : t.end - run[0].begin]
            for run, content in zip(runs, contents, strict=True)
            for t in run
        }


def _check_shards_exist(index: Index, files: Mapping[str, SourceFile], label: str) -> None:
    missing = [n for n in index.shard_names if n not in files]
    if not missing:
        return
    tensor = next(t for t, s in index.weight_map.items() if s == missing[0])
    more = f" ({len(missing)} shards are missing in all)" if len(missing) > 1 else ""
    raise CheckpointIncomplete(
        f"{label}: shard {missing[0]} is missing, which the index names for tensor {tensor!r}{more}; "
        "get the missing files"
    )


def _warn_of_extra_files(files: Mapping[str, SourceFile], shard_names: Sequence[str]) -> list[str]:
    listed = set(shard_names)
    extra = sorted(n for n in files if n.endswith(".safetensors") and "/" not in n and n not in listed)
    if not extra:
        return []
    more = f" and {len(extra) - 4} more" if len(extra) > 4 else ""
    return [f"Not in the index and left out: {', '.join(extra[:4])}{more}."]


def read_headers(source: Source, shards: Sequence[SourceFile]) -> dict[str, Header]:
    """Headers of `shards`, in their order; those on the network are read side by side.

    Raises CorruptShard, UnknownDtype, SourceUnreadable, HubAccess, HubTransfer.
    """
    return read_each(source, shards, _read_header)


def _read_header(source: Source, file: SourceFile) -> Header:
    path = source.local_path(file.name)
    if path is not None:
        return read_header(path, file.name)
    raw = source.read(file.name, 0, min(_FIRST_READ_BYTES, file.size_bytes))
    if file.size_bytes >= PREFIX_BYTES:
        span = header_span(raw, file.size_bytes, file.name)
        if span > len(raw):
            raw += source.read(file.name, len(raw), span)
    return parse_header(raw, file.size_bytes, file.name)


def _merge(
    headers: Mapping[str, Header], weight_map: Mapping[str, str] | None
) -> tuple[dict[str, TensorRef], list[str]]:
    """All tensors in shard order, then file order, and what is odd about them."""
    tensors: dict[str, TensorRef] = {}
    unlisted: list[str] = []
    copies: list[str] = []
    computed: list[str] = []
    for shard, header in headers.items():
        for t in header.tensors:
            owner = weight_map.get(t.name) if weight_map is not None else shard
            if owner is None:
                unlisted.append(t.name)
            elif owner != shard:
                copies.append(t.name)
                continue
            if t.name in tensors:
                raise CorruptShard(
                    f"tensor {t.name!r} is in {tensors[t.name].shard} and in {shard}, and no index says which one "
                    "counts; remove one of the files"
                )
            tensors[t.name] = TensorRef(t.name, shard, t.dtype, t.shape, t.begin, t.end)
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            if is_computed(name):
                computed.append(name)
                continue
            elsewhere = next((s for s, h in headers.items() if any(t.name == name for t in h.tensors)), None)
            found = f", but is in {elsewhere}" if elsewhere else " nor in any other"
            raise CheckpointIncomplete(
                f"tensor {name!r} is not in shard {shard}, where the index has it{found}; get shard and index again"
            )
    notes: list[str] = []
    if unlisted:
        notes.append(f"{len(unlisted)} tensors are in shards but not in the index and were taken: {unlisted[0]}, ...")
    if copies:
        notes.append(
            f"{len(copies)} tensors are also in shards that the index does not name for them; those copies were left "
            f"out: {copies[0]}, ..."
        )
    if computed:
        notes.append(
            f"{len(computed)} buffers are in the index but in no shard, and readers compute them: {computed[0]}, ..."
        )
    return tensors, notes


def _read_all(source: Source, file: SourceFile) -> bytes:
    if file.size_bytes > _MAX_JSON_FILE_BYTES:
        raise SourceUnreadable(
            f"{source.label}, {file.name}: {file.size_bytes} bytes are too many for a JSON file "
            f"(at most {_MAX_JSON_FILE_BYTES}); is it what its name says?"
        )
    return source.read(file.name, 0, file.size_bytes)


def _read_config(source: Source, files: Mapping[str, SourceFile]) -> tuple[Mapping[str, Any] | None, bytes | None]:
    if CONFIG_NAME not in files:
        return None, None
    raw = _read_all(source, files[CONFIG_NAME])
    return _parse_object(raw, f"{source.label}, {CONFIG_NAME}"), raw


def _parse_object(raw: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceUnreadable(f"{where} is not valid JSON ({error}); repair it or get it again") from error
    if not isinstance(value, dict):
        raise SourceUnreadable(f"{where} is not a JSON object; repair it or get it again")
    return value


def read_dump(folder: Path) -> Checkpoint:
    """A checkpoint from recorded headers, to plan without having the weights.

    `folder` holds headers.json.gz ({shard: {tensor: [dtype, shape]}}; offsets are those of the reference writer), or an
    index (`*index.json` or `*index.json.gz`, the safetensors one first; then dtypes and shapes are None, offsets -1 and
    shard sizes 0), and optionally config.json (or the only `*__config.json`). Raises SourceUnreadable,
    UnsupportedSource, UnknownDtype, CorruptShard.
    """
    label = folder.absolute().name
    with reading(folder):
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
        sizes = {n: (folder / n).stat().st_size for n in names}
    index_name = _dump_index(names)
    warnings: tuple[str, ...] = ()
    if _DUMP_HEADERS in names:
        recorded = _parse_object(_read_packed(folder / _DUMP_HEADERS), f"{label}, {_DUMP_HEADERS}")
        shards, tensors = _recorded_shards(recorded, f"{label}, {_DUMP_HEADERS}")
    elif index_name is not None:
        index = parse_index(_read_packed(folder / index_name), f"{label}, {index_name}")
        shards, tensors = _indexed_shards(index)
        warnings = (*index.warnings, "Only an index: dtypes and shapes are not known.")
    else:
        raise SourceUnreadable(
            f"{folder} holds neither recorded headers ({_DUMP_HEADERS}) nor an index "
            "(*index.json[.gz]): nothing to plan from"
        )
    configs = [n for n in names if n == CONFIG_NAME] or [n for n in names if n.endswith(f"__{CONFIG_NAME}")]
    config_bytes = _read_packed(folder / configs[0]) if len(configs) == 1 else None
    if config_bytes is None:
        warnings = (*warnings, _NO_CONFIG)
    known = {_DUMP_HEADERS, index_name, *configs}
    return Checkpoint(
        label=label,
        commit=None,
        shards=shards,
        tensors=tensors,
        config=None if config_bytes is None else _parse_object(config_bytes, f"{label}, {configs[0]}"),
        config_bytes=config_bytes,
        index_name=index_name.removesuffix(".gz") if index_name else None,
        side_files=tuple(SideFile(n, sizes[n]) for n in names if n not in known),
        warnings=warnings,
    )


def _dump_index(names: Sequence[str]) -> str | None:
    indexes = [n for n in names if n.endswith(("index.json", "index.json.gz"))]
    indexes.sort(key=lambda n: (not n.startswith("model.safetensors."), ".safetensors." not in n, n))
    return indexes[0] if indexes else None


def _read_packed(path: Path) -> bytes:
    """A file, unpacked when its name ends in .gz. Raises SourceUnreadable."""
    import gzip  # of recorded headers alone
    import zlib

    with reading(path):
        raw = path.read_bytes()
        try:
            return gzip.decompress(raw) if path.suffix == ".gz" else raw
        except (EOFError, zlib.error) as error:
            raise SourceUnreadable(f"{path} is damaged ({error}); get the file again") from error


def _recorded_shards(recorded: Mapping[str, Any], where: str) -> tuple[tuple[Shard, ...], dict[str, TensorRef]]:
    shards: list[Shard] = []
    tensors: dict[str, TensorRef] = {}
    for shard, entries in recorded.items():
        try:
            plan = plan_file([TensorSpec(n, str(d), tuple(s)) for n, (d, s) in entries.items()])
        except KeyError as error:
            raise UnknownDtype(
                f"{where}, shard {shard}: unknown dtype {error}; known are {', '.join(STORAGE)}"
            ) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise SourceUnreadable(f"{where}, shard {shard}: expected {{tensor: [dtype, shape]}} ({error})") from error
        shards.append(Shard(shard, plan.size_bytes, None, None))
        for name, (begin, end) in plan.offsets.items():
            if name in tensors:
                raise CorruptShard(f"{where}: tensor {name!r} is in {tensors[name].shard} and in {shard}")
            dtype, shape = entries[name]
            tensors[name] = TensorRef(name, shard, dtype, tuple(shape), begin, end)
    return tuple(shards), tensors


def _indexed_shards(index: Index) -> tuple[tuple[Shard, ...], dict[str, TensorRef]]:
    by_shard: dict[str, list[str]] = {name: [] for name in index.shard_names}
    for tensor, shard in index.weight_map.items():
        by_shard[shard].append(tensor)
    tensors = {t: TensorRef(t, s, None, None, -1, -1) for s, names in by_shard.items() for t in names}
    return tuple(Shard(name, 0, None, None) for name in by_shard), tensors
