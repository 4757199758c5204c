"""Files of importance as shardq writes them: safetensors with the mean square of every input of Linear layers, and with
its mean.

Each tensor is F32 [columns], mean x_j**2 over the tokens that a layer saw. Its name is a module of the checkpoint
(`model.layers.0.self_attn.q_proj`), or several that get the same input: `{a,b}` stands for either, `*` for any one
dotted segment, each at most once, as in `model.layers.0.mlp.experts.*.{gate_proj,up_proj}`. A module has the vector of
its own name, else the one that fits; two of the same name are refused. Beside a tensor there may be one named `mean `
and its name: as many numbers, mean x_j over the same tokens. What `__metadata__` says is in `Provenance`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from shardq.errors import BadImportance, CorruptShard, UnknownDtype
from shardq.files.atomic import write_atomic
from shardq.files.safetensors import TensorSpec, plan_file, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DataKind = Literal["text", "self-generated", "random ids", "unknown"]

FORMAT: Final = "shardq-importance"
VERSION: Final = "1"  # of files without means
WITH_MEANS: Final = "2"
MEAN: Final = "mean "  # before the name of a vector: the tensor of its means
MAX_NAME: Final = 500  # characters
MAX_NAMES: Final = 1_000_000  # modules that the names of a file stand for
_BRACES: Final = re.compile(r"([^{}]*)\{([^{}]*)\}([^{}]*)")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a file's statistics were made of. All of it is what the file says of itself."""

    data: DataKind
    tokens: int | None = None  # that each layer saw; None where the file does not say
    seed: int | None = None  # of random ids, or of sampling
    model: str = ""  # label, never a path
    commit: str | None = None  # of the model
    text: str = ""  # name of the text, without folders


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of a file: a vector, or slices of equal length that follow each other."""

    begin: int  # offset of its first value
    values: int  # F32, little-endian, of all slices
    counts: tuple[float, ...] = (1.0,)  # by what a slice is divided: one for each, or one for all; 0 is a slice that
    # no token has reached
    mean: int | None = None  # offset of as many means, which may be negative; None where the file has none

    @property
    def size_bytes(self) -> int:
        """Bytes of all values."""
        return 4 * self.values


def read_importance(path: str, label: str) -> tuple[Provenance, dict[str, Entry]]:
    """What a file's header says: names without braces -> vectors; `label` is the file's name for messages.

    Reads no values. Raises BadImportance, SourceUnreadable.
    """
    try:
        header = read_header(path, label)
    except (CorruptShard, UnknownDtype) as error:
        raise BadImportance(f"importance {error}") from error
    provenance = _provenance(header.metadata, label)
    entries: dict[str, Entry] = {}
    means = {t.name.removeprefix(MEAN): t for t in header.tensors if t.name.startswith(MEAN)}
    for t in header.tensors:
        if t.name.startswith(MEAN):
            continue
        where = f"importance {label}, entry {short(t.name)}"
        if t.dtype != "F32" or len(t.shape) != 1 or t.shape[0] < 1:
            raise BadImportance(f"{where}: expected F32 and one dimension, found {t.dtype} {short(list(t.shape))}")
        mean = means.pop(t.name, None)
        if mean is not None and (mean.dtype, mean.shape) != (t.dtype, t.shape):
            raise BadImportance(
                f"{where}: expected means like it, F32 {list(t.shape)}, found {mean.dtype} {short(list(mean.shape))}"
            )
        entry = Entry(t.begin, t.shape[0], mean=mean.begin if mean else None)
        for name in expand_name(t.name, where):
            if name in entries:
                raise BadImportance(f"{where}: {short(name)} has two vectors; refusing to pick one")
            entries[name] = entry
        if len(entries) > MAX_NAMES:
            raise BadImportance(f"importance {label} names more than {MAX_NAMES} modules")
    if means:
        raise BadImportance(f"importance {label} has means of what it holds no vector of: {short(min(means))}")
    if not entries:
        raise BadImportance(f"importance {label} holds no vectors")
    return provenance, entries


def find_entry(entries: Mapping[str, Entry], module: str) -> Entry | None:
    """The vector of a module: of its own name, else of one in which `*` stands for a number of it, the last first."""
    if (own := entries.get(module)) is not None:
        return own
    parts = module.split(".")
    for place in reversed(range(len(parts))):
        if parts[place].isdecimal():
            starred = ".".join((*parts[:place], "*", *parts[place + 1 :]))
            if (found := entries.get(starred)) is not None:
                return found
    return None


def expand_name(name: str, where: str) -> tuple[str, ...]:
    """The names that `name` stands for, `*` left as it is. Raises BadImportance for braces or `*` in other places."""
    plain = name.split(".")
    wrong_star = "*" in name and (name.count("*") > 1 or "*" not in plain)
    if not name or len(name) > MAX_NAME or wrong_star:
        raise BadImportance(f"{where}: not a name of modules")
    if "{" not in name and "}" not in name:
        return (name,)
    match = _BRACES.fullmatch(name)
    words = match[2].split(",") if match else []
    if match is None or len(words) < 2 or "" in words or "*" in match[2]:
        raise BadImportance(f"{where}: not a name of modules")
    return tuple(f"{match[1]}{word}{match[3]}" for word in words)


def join_names(names: Sequence[str]) -> str:
    """The name for one vector of several modules with the same parent: the reverse of `expand_name`.

    The same for any order of `names`. Raises ValueError where the parents differ.
    """
    parents = {n.rpartition(".")[0] for n in names}
    leaves = sorted({n.rpartition(".")[2] for n in names})
    if len(parents) != 1:
        raise ValueError(f"no common parent: {sorted(parents)}")
    parent = parents.pop()
    leaf = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
    return f"{parent}.{leaf}" if parent else leaf


def write_importance(
    path: str | os.PathLike[str],
    vectors: "Mapping[str, NDArray[np.floating[Any]]]",
    provenance: Provenance,
    means: "Mapping[str, NDArray[np.floating[Any]]]" = MappingProxyType({}),
) -> None:
    """Write a file, whole or not at all; equal arguments give equal bytes, whatever their order.

    Vectors are [columns], and so are `means`, of the inputs themselves, which some or all of them have; all are rounded
    to F32. Raises BadImportance for what a reader would refuse (NaN, infinite, negative or all zero vectors, wrong
    shape or name), DiskFull, NotWritable.
    """
    import numpy as np

    label = os.path.basename(path)
    arrays = {name: np.asarray(vector, np.dtype("<f4")) for name, vector in vectors.items()}
    names: set[str] = set()
    for name, array in arrays.items():
        where = f"importance {label}, entry {short(name)}"
        if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any() or not array.any():
            raise BadImportance(f"{where}: expected one dimension of finite values, none negative and not all zero")
        expanded = expand_name(name, where)
        if not names.isdisjoint(expanded):
            raise BadImportance(f"{where}: a module has two vectors")
        names.update(expanded)
    for name, vector in means.items():
        mean = np.asarray(vector, np.dtype("<f4"))
        if name not in vectors or mean.shape != arrays[name].shape or not np.isfinite(mean).all():
            raise BadImportance(
                f"importance {label}, means of {short(name)}: expected finite numbers, as many as its vector has"
            )
        arrays[MEAN + name] = mean
    specs = [TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    plan = plan_file(specs, _metadata(provenance, WITH_MEANS if means else VERSION))
    write_atomic(path, plan.header + b"".join(arrays[name].tobytes() for name in plan.offsets))


def _metadata(p: Provenance, version: str) -> dict[str, str]:
    known = {
        "format": FORMAT,
        "format_version": version,
        "data": p.data,
        "tokens": p.tokens,
        "seed": p.seed,
        "model": p.model,
        "commit": p.commit,
        "text": p.text,
    }
    return {key: str(value) for key, value in known.items() if value not in (None, "")}


def _provenance(metadata: Mapping[str, str], label: str) -> Provenance:
    if metadata.get("format") != FORMAT:
        raise BadImportance(
            f"importance {label} is a safetensors file of something else: expected format {FORMAT!r} in its metadata"
        )
    version = metadata.get("format_version", "")
    if version not in (VERSION, WITH_MEANS):
        raise BadImportance(
            f"importance {label} has format version {short(version)}, "
            f"this version of shardq reads {VERSION} and {WITH_MEANS}"
        )
    data = metadata.get("data", "unknown")
    if data not in get_args(DataKind):
        raise BadImportance(f"importance {label}: data {short(data)}; known are {', '.join(get_args(DataKind))}")
    return Provenance(
        cast("DataKind", data),
        _whole(metadata, "tokens", label),
        _whole(metadata, "seed", label),
        metadata.get("model", ""),
        metadata.get("commit"),
        metadata.get("text", ""),
    )


def _whole(metadata: Mapping[str, str], key: str, label: str) -> int | None:
    text = metadata.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise BadImportance(f"importance {label}: {key} {short(text)} is not a whole number")
    return int(text)


def short(value: object) -> str:
    """`value` for a message: ASCII, one line, cut, since a hostile file can hold megabytes."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:100] + "..."
