"""Folds: scales that were moved between neighbours so that fewer weights share a group with much larger ones. The model
computes the same; what is quantized is another one. A fold is found once (folding.py), and written down.

The file is a zstandard frame around a safetensors file. Its tensors are named for modules: of a norm I8 [columns],
exponents of two that its weights are multiplied by and the columns behind it divided by; where norms add one, F32
[columns] instead, what the columns behind it are multiplied by; of a matrix I8 [rows], exponents of two for its rows,
by which the columns that they lead to are divided.
"""

import hashlib
import math
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.dequantize.base import Encoded, Scaling
from shardq.dequantize.plain import plain_rows
from shardq.errors import BadFold, CorruptShard, UnknownDtype
from shardq.files.atomic import reading, write_atomic
from shardq.files.safetensors import TensorSpec, parse_header, plan_file
from shardq.fold_sites import WEIGHT, NormSite, PairSite, Sites, find_sites

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shardq.decide import Decision

FOLD: Final = "shardq-fold.zst"  # in an output
FORMAT: Final = "shardq-fold"
MAX_BYTES: Final = 1 << 30
MAX_EXPONENT: Final = 32
POSSIBLE: Final = bytes(k & 0xFF for k in range(-MAX_EXPONENT, MAX_EXPONENT + 1))  # as int8 are stored
NEGATED: Final = bytes(-k & 0xFF for k in range(256))
LEAST: Final = 2.0 ** -(MAX_EXPONENT + 0.5)
KINDS: Final = ("I8 exponents of two", "F32 above zero")  # of other modules, of norms that add something


@dataclass(frozen=True)
class Fold:
    """Scales by module."""

    exponents: Mapping[str, bytes]  # int8
    factors: Mapping[str, bytes]  # fp32, little-endian: of norms that add something
    source: str  # what `source_digest` says of the checkpoint that it was found in

    def encode(self) -> bytes:
        """The safetensors file: the same bytes for equal folds."""
        arrays = {**self.exponents, **self.factors}
        specs = [TensorSpec(n, "I8", (len(x),)) for n, x in self.exponents.items()]
        specs += [TensorSpec(n, "F32", (len(x) // 4,)) for n, x in self.factors.items()]
        plan = plan_file(specs, {"format": FORMAT, "source": self.source})
        return plan.header + b"".join(arrays[name] for name in plan.offsets)

    @cached_property
    def sha256(self) -> str:
        """Of the safetensors file, in hex."""
        return hashlib.sha256(self.encode()).hexdigest()


def write_fold(path: str | os.PathLike[str], fold: Fold) -> None:
    """Write a file, whole or not at all. Raises DiskFull, NotWritable."""
    write_atomic(Path(path), pack_fold(fold))


def pack_fold(fold: Fold) -> bytes:
    """The content of a file."""
    import zstandard

    return zstandard.ZstdCompressor(level=9).compress(fold.encode())


def read_fold(path: str | os.PathLike[str]) -> Fold:
    """The inverse of write_fold. Raises BadFold, SourceUnreadable."""
    with reading(path):
        data = Path(path).read_bytes()
    return unpack_fold(data, os.path.basename(path))


def unpack_fold(data: bytes, label: str) -> Fold:
    """The inverse of pack_fold; `label` is for messages. Raises BadFold."""
    import zstandard

    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES)
        header = parse_header(raw, len(raw), label)
    except (zstandard.ZstdError, CorruptShard, UnknownDtype) as e:
        raise BadFold(f"fold {label} cannot be read ({e}): expected a file that --fold auto has written") from e
    if header.metadata.get("format") != FORMAT:
        raise BadFold(f"fold {label} holds something else: expected format {FORMAT!r} in its metadata")
    found: dict[str, dict[str, bytes]] = {"I8": {}, "F32": {}}
    for t in header.tensors:
        if t.dtype not in found or len(t.shape) != 1:
            raise BadFold(f"fold {label}, {t.name}: expected I8 or F32 and one dimension, found {t.dtype} {t.shape}")
        found[t.dtype][t.name] = raw[t.begin : t.end]
    return Fold(found["I8"], found["F32"], header.metadata.get("source", ""))


def source_digest(checkpoint: Checkpoint) -> str:
    """Tells a checkpoint from others of the same family: sha256 of its shards' sizes and headers, in hex."""
    said = [(s.name, s.size_bytes, s.sha256, s.header_sha256) for s in checkpoint.shards]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def fold_tensors(tensors: Mapping[str, TensorRef], checkpoint: Checkpoint, fold: Fold) -> dict[str, TensorRef]:
    """The weights of a checkpoint with their scales moved; each has the name, type and shape that it had.

    Raises BadFold for a fold of other modules or shapes, and for one of another checkpoint where its numbers are only
    right for its own.
    """
    sites = find_sites(tensors, checkpoint.config)
    if fold.factors and fold.source != source_digest(checkpoint):
        raise BadFold(f"the fold is of another checkpoint than {checkpoint.label}: leave the file out to find its own")
    scalings: dict[str, Scaling] = {}
    unused = {*fold.exponents, *fold.factors}
    for name, one in _scalings(sites, fold, tensors, unused):
        other = scalings.get(name, Scaling())  # of its rows where this one is of its columns, or the reverse
        rows, columns = one.rows or other.rows, one.columns or other.columns
        scalings[name] = Scaling(rows, columns, one.factors or other.factors, one.added)
    if unused:
        raise BadFold(
            f"the fold names {min(unused)} and {len(unused) - 1} others that {checkpoint.label} has no place for: "
            "expected one of the same model"
        )
    return {name: _scaled(t, scalings[name]) if name in scalings else t for name, t in tensors.items()}


def check_kept(decisions: "Iterable[Decision]") -> None:
    """Raise BadFold for a matrix that would be kept and cannot be folded to the last digit."""
    for d in decisions:
        if d.scheme is None and len(d.tensor.shape or ()) > 1 and any(_loses(e) for e in d.tensor.encoded):
            raise BadFold(
                f"{d.tensor.name} is kept ({d.rule}), and {'F16' if d.tensor.dtype == 'F16' else 'its norm adds one'}: "
                "it cannot be folded exactly; quantize it too, or find a fold for this recipe with --fold auto"
            )


def _loses(e: Encoded) -> bool:
    return e.scaling is not None and (not e.scaling.is_exact or e.dtype == "F16")


def _scalings(
    sites: Sites, fold: Fold, tensors: Mapping[str, TensorRef], unused: set[str]
) -> Iterator[tuple[str, Scaling]]:
    """Weights and what the fold says of them; what it is of is taken out of `unused`."""
    for norm in sites.norms:
        module = norm.norm.removesuffix(WEIGHT)
        if module in unused:
            unused.discard(module)
            yield from _of_norm(norm, fold, module, _rows(tensors, norm.norm))
    for pair in sites.pairs:
        module = pair.rows.removesuffix(WEIGHT)
        if module in unused:
            unused.discard(module)
            yield from _of_pair(pair, fold, module, _rows(tensors, pair.rows))


def _rows(tensors: Mapping[str, TensorRef], name: str) -> int:
    shape = tensors[name].shape
    assert shape
    return shape[0]


def _of_norm(site: NormSite, fold: Fold, module: str, columns: int) -> Iterator[tuple[str, Scaling]]:
    if module in fold.factors:
        factors = fold.factors[module]
        fits = site.adds != 0 and len(factors) == 4 * columns and all(LEAST < g < 1 / LEAST for g in _floats(factors))
        powers = array("b", map(power_of, _floats(factors))).tobytes() if fits else b""
        behind = Scaling(factors=factors)
    else:
        powers = fold.exponents[module]
        fits, behind = site.adds == 0 and _are_exponents(powers, columns), Scaling(columns=_negated(powers))
    if not fits:
        raise BadFold(f"the fold of {module} does not fit it: expected {columns} scales, {KINDS[site.adds != 0]}")
    yield site.norm, Scaling(rows=powers, added=site.adds)
    for name in (*site.of, *site.also):
        yield name, behind


def _of_pair(site: PairSite, fold: Fold, module: str, rows: int) -> Iterator[tuple[str, Scaling]]:
    powers = fold.exponents.get(module, b"")
    if not _are_exponents(powers, rows):
        raise BadFold(f"the fold of {module} does not fit it: expected {rows} scales, {KINDS[False]}")
    if isinstance(site.owners, tuple) and (lost := [r for r in {*range(rows)}.difference(site.owners) if powers[r]]):
        raise BadFold(f"the fold of {module} scales row {min(lost)}, to which no column of {site.columns} belongs")
    yield site.rows, Scaling(rows=powers)
    if site.bias:
        yield site.bias, Scaling(rows=powers)
    above = powers if isinstance(site.owners, range) else bytes(powers[row] for row in site.owners)
    yield site.columns, Scaling(columns=_negated(above))


def _are_exponents(data: bytes, count: int) -> bool:
    return len(data) == count and not data.translate(None, POSSIBLE)


def _negated(exponents: bytes) -> bytes:
    return exponents.translate(NEGATED)


def _floats(data: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(data) // 4}f", data)


def power_of(factor: float) -> int:
    """The exponent of two that a norm is multiplied by where columns behind it are multiplied by `factor`, above 0."""
    return -round(math.log2(factor))


def _scaled(t: TensorRef, scaling: Scaling) -> TensorRef:
    (e,) = t.encoded or (plain_rows(t),)
    return replace(t, encoded=(replace(e, scaling=scaling),))
