"""Which files of a source are the model's weights: an index, a single file, or a numbered set without an index.

Only the top of a source is looked at: what lies in subfolders (`original/`, `onnx/`, parts of a pipeline) is another
set, unless the index names it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from shardq.errors import CheckpointIncomplete, SourceUnreadable, UnsupportedSource

_PREFERRED: Final = ("model", "diffusion_pytorch_model")
# model.safetensors.index.json, diffusion_pytorch_model.safetensors.index.bf16.json; not Mistral's own names
_INDEX: Final = re.compile(r"(?!consolidated).*\.safetensors\.index(\.\w+)?\.json")
# Buffers that old indexes name and files lack; every reader computes them.
_COMPUTED: Final = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids)$")
# model-00001-of-00002, model-1-of-61, model_00001-of-00072, model.safetensors-00001-of-00003
_NUMBERED: Final = re.compile(r"(?P<stem>.*?)[-_]?(?P<k>\d{1,9})-of-(?P<n>\d{1,9})(?P<rest>.*)\.safetensors")
_FOREIGN: Final = {
    ".bin": "pickle files",
    ".pt": "pickle files",
    ".pth": "pickle files",
    ".ckpt": "pickle files",
    ".h5": "Keras files",
    ".msgpack": "Flax files",
    ".gguf": "GGUF files",
    ".onnx": "ONNX files",
}


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The answer: an index to read, or the shards themselves."""

    index_name: str | None
    shard_names: tuple[str, ...]  # empty when the index names them
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """The `weight_map` of an index file, checked for form only."""

    weight_map: Mapping[str, str]  # tensor -> shard
    warnings: tuple[str, ...]

    @property
    def shard_names(self) -> tuple[str, ...]:
        """Shards in the order of their names, numbers by value; the index itself is sorted by tensor name."""
        return tuple(sorted(set(self.weight_map.values()), key=_natural))


def choose_weights(names: Sequence[str], label: str) -> WeightSet:
    """Pick the weights among all file names of a source.

    Order: the index of `model`, of `diffusion_pytorch_model`, or the only one; the single file of the same names, or
    the only one; one complete numbered set. Anything else is refused, never guessed: UnsupportedSource (adapters, other
    file formats), CheckpointIncomplete (numbers missing), SourceUnreadable (nothing there, or several candidates).
    """
    top = sorted(n for n in names if "/" not in n)
    indexes = [n for n in top if _INDEX.fullmatch(n)]
    if indexes:
        index = _preferred(indexes, ".safetensors.index.json")
        if index is None:
            raise SourceUnreadable(f"{label} has several indexes and none is preferred: {_listed(indexes)}; keep one")
        others = [n for n in indexes if n != index]
        notes = (f"{index} is the index; others are left out: {_listed(others)}.",) if others else ()
        return WeightSet(index, (), notes)
    files = [n for n in top if n.endswith(".safetensors")]
    own = [n for n in files if not n.startswith(("adapter_", "consolidated"))]
    if not own:
        raise _no_weights(names, files, label)
    single = _preferred(own, ".safetensors")
    if single is not None:
        others = [n for n in own if n != single]
        notes = (f"{single} is the model; others are left out: {_listed(others)}.",) if others else ()
        return WeightSet(None, (single,), notes)
    return _numbered_set(own, label)


def _preferred(names: Sequence[str], suffix: str) -> str | None:
    for stem in _PREFERRED:
        if stem + suffix in names:
            return stem + suffix
    return names[0] if len(names) == 1 and not _NUMBERED.fullmatch(names[0]) else None


def _numbered_set(names: Sequence[str], label: str) -> WeightSet:
    sets: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            raise _ambiguous(names, label)
        key = (match["stem"], match["rest"], int(match["n"]))
        sets.setdefault(key, {})[int(match["k"])] = name
    if len(sets) != 1:
        raise _ambiguous(names, label)
    ((_, _, count), by_number) = next((key, found) for key, found in sets.items())
    if len(by_number) != len(names):  # model-1-of-2 beside model-01-of-02
        raise _ambiguous(names, label)
    # Writers count 1..n; some count 0..n, so that n files from 0 may lack their last one.
    first = 0 if 0 in by_number else 1
    gap = next((k for k in range(first, count + 1) if k not in by_number), None)
    if gap is not None or max(by_number) > count:
        wrong = f"{max(by_number)} is one too many" if gap is None else f"{gap} is missing"
        raise CheckpointIncomplete(
            f"{label} has no index, and its {len(by_number)} shards ({names[0]}, ...) are not a whole set of {count}: "
            f"number {wrong}; get the missing files, or the index"
        )
    ordered = tuple(by_number[k] for k in sorted(by_number))
    note = f"No index: the {len(ordered)} numbered shards are taken as the whole model."
    return WeightSet(None, ordered, (note,))


def _ambiguous(names: Sequence[str], label: str) -> SourceUnreadable:
    return SourceUnreadable(
        f"{label} has no index and several weight files, and which ones are the model is not clear: {_listed(names)}; "
        "keep one set, or add model.safetensors.index.json"
    )


def _no_weights(names: Sequence[str], top_files: Sequence[str], label: str) -> UnsupportedSource | SourceUnreadable:
    if any(n.startswith("adapter_") for n in top_files):
        return UnsupportedSource(
            f"{label} holds an adapter ({_listed(top_files)}), not a model; merge it into its base model first"
        )
    if top_files:
        return UnsupportedSource(
            f"{label} holds weights under Mistral's own names only ({_listed(top_files)}); "
            "convert them to the transformers layout first"
        )
    folders = sorted({n.rpartition("/")[0] for n in names if n.endswith(".safetensors")})
    if folders:
        return SourceUnreadable(
            f"{label} has no weights at its top, but in subfolders: {_listed(folders)}; choose one with --subfolder"
        )
    foreign = [n for n in names if PurePosixPath(n).suffix in _FOREIGN]
    if foreign:
        kind = _FOREIGN[PurePosixPath(foreign[0]).suffix]
        return UnsupportedSource(
            f"{label} has no safetensors weights, only {kind} ({_listed(foreign)}); convert them first: load the model "
            "where you trust it and save it as safetensors"
        )
    return SourceUnreadable(f"{label} has no weight files: not a checkpoint; check the path or repo")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def is_computed(tensor: str) -> bool:
    """True for a buffer that readers compute themselves: an index may name it although no file has it."""
    return _COMPUTED.search(tensor) is not None


def parse_index(raw: bytes, where: str) -> Index:
    """Read an index file. Text behind a complete first document is ignored with a warning: published indexes have it,
    and the headers are checked anyway. Raises SourceUnreadable, UnsupportedSource.
    """
    try:
        text = raw.decode("utf-8").lstrip()
        document, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise SourceUnreadable(f"{where} is not valid JSON ({error}); get the file again") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceUnreadable(f"{where} has no weight_map with tensors in it: not an index; get the file again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise SourceUnreadable(
                f"{where}: tensor {tensor!r} is mapped to {shard!r}, which is no file of this folder"
            )
        if not shard.endswith(".safetensors"):
            raise UnsupportedSource(
                f"{where}: tensor {tensor!r} is in {shard!r}, which is not a safetensors file; convert the model first"
            )
    warnings = (f"{where}: text behind the end of the index was ignored.",) if text[end:].strip() else ()
    return Index(weight_map, warnings)


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    # Digits by value, that is, without leading zeros first by length: model-10 behind model-9. The name settles ties.
    pieces = re.split(r"(\d+)", name)
    parts = [(len(p.lstrip("0")), p.lstrip("0")) if p.isdecimal() else (-1, p) for p in pieces]
    return parts, name
