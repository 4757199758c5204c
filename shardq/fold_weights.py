"""A fold applied to the weights of a checkpoint: by headers, before any of them is read."""

import math
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.dequantize.base import Encoded, Scaling
from shardq.dequantize.plain import plain_rows
from shardq.errors import BadFold
from shardq.fold import Fold, source_digest
from shardq.fold_sites import WEIGHT, NormSite, PairSite, find_sites
from shardq.importance_vectors import BothRef, Ref, SizesRef, VectorRef

if TYPE_CHECKING:
    from shardq.decide import Decision

MAX_EXPONENT: Final = 32
POSSIBLE: Final = bytes(k & 0xFF for k in range(-MAX_EXPONENT, MAX_EXPONENT + 1))  # as int8 are stored
NEGATED: Final = bytes(-k & 0xFF for k in range(256))
LEAST: Final = 2.0 ** -(MAX_EXPONENT + 0.5)  # factor


@dataclass(frozen=True, slots=True)
class Folded:
    """What a fold makes of the weights of a checkpoint."""

    tensors: Mapping[str, TensorRef]  # each with the name, type and shape that it had
    importance: Mapping[str, SizesRef]  # of matrices whose columns have sizes


def fold_weights(tensors: Mapping[str, TensorRef], checkpoint: Checkpoint, fold: Fold) -> Folded:
    """The weights of a checkpoint with their scales moved.

    Raises BadFold for a fold of other modules or shapes, and for one of another checkpoint where its numbers are only
    right for its own.
    """
    if fold.factors and fold.source != source_digest(checkpoint):
        raise BadFold(f"the fold is of another checkpoint than {checkpoint.label}: leave the file out to find its own")
    sites, named = find_sites(tensors, checkpoint.config), fold.modules
    places = [_Place.of_norm(s, tensors) for s in sites.norms] + [_Place.of_pair(s, tensors) for s in sites.pairs]
    if unknown := named - {p.module for p in places}:
        raise BadFold(
            f"the fold names {min(unknown)} and {len(unknown) - 1} others that {checkpoint.label} has no place for: "
            "expected one of the same model"
        )
    made = dict(tensors)
    importance: dict[str, SizesRef] = {}
    for place in places:
        if place.module in named:
            for name, scaling in place.scalings(fold):
                made[name] = _scaled(made[name], scaling)
            if sizes := place.sizes(fold):
                importance |= {name: SizesRef(sizes, fold.power) for name in place.behind}
    return Folded(made, importance)


def weigh(t: TensorRef, data: VectorRef | None, sizes: SizesRef | None) -> Ref | None:
    """The importance of a matrix from what is known: data of the model as it was, sizes of columns, or both. Inputs of
    columns that were divided by something are as much larger."""
    scaling = t.encoded[0].scaling if t.encoded else None
    powers = b""
    if scaling:
        powers = _powers_of(scaling.factors) if scaling.factors else _negated(scaling.columns)
    if data and sizes:
        return BothRef(data, replace(sizes, powers=powers))
    one = data or sizes
    return replace(one, powers=powers) if one else None


def check_kept(decisions: "Iterable[Decision]") -> None:
    """Raise BadFold for a matrix that would be kept and cannot be folded to the last digit."""
    for d in decisions:
        if d.scheme is None and len(d.tensor.shape or ()) > 1 and any(_loses(e) for e in d.tensor.encoded):
            raise BadFold(
                f"{d.tensor.name} is kept ({d.rule}), and {'F16' if d.tensor.dtype == 'F16' else 'its norm adds one'}: "
                "it cannot be folded exactly; quantize it too, or find a fold for this recipe with --fold auto"
            )


def power_of(factor: float) -> int:
    """The exponent of two that a norm is multiplied by where columns behind it are multiplied by `factor`, above 0."""
    return -round(math.log2(factor))


@dataclass(frozen=True, slots=True)
class _Place:
    """A norm or a matrix, and what its scales are moved to."""

    module: str  # as the fold names it
    count: int  # its scales
    own: tuple[str, ...]  # weights and biases that are multiplied
    behind: tuple[str, ...]  # matrices whose columns are divided
    owners: range | tuple[int, ...]  # column -> scale
    adds: float

    @staticmethod
    def of_norm(site: NormSite, tensors: Mapping[str, TensorRef]) -> "_Place":
        count = _rows(tensors, site.norm)
        behind = (*site.of, *site.also)
        return _Place(site.norm.removesuffix(WEIGHT), count, (site.norm,), behind, range(count), site.adds)

    @staticmethod
    def of_pair(site: PairSite, tensors: Mapping[str, TensorRef]) -> "_Place":
        own = (site.rows, site.bias) if site.bias else (site.rows,)
        count = _rows(tensors, site.rows)
        return _Place(site.rows.removesuffix(WEIGHT), count, own, (site.columns,), site.owners, 0.0)

    def scalings(self, fold: Fold) -> Iterator[tuple[str, Scaling]]:
        """Weights and what they are multiplied by; none where that is 1."""
        if self.adds:
            factors = fold.factors.get(self.module, b"")
            fits = len(factors) in {0, 4 * self.count} and all(LEAST < g < 1 / LEAST for g in _floats(factors))
            fits = fits and self.module not in fold.exponents
            powers, columns = _powers_of(factors) if fits else b"", Scaling(factors=factors)
        else:
            powers = fold.exponents.get(self.module, b"")
            fits = len(powers) in {0, self.count} and not powers.translate(None, POSSIBLE)
            fits = fits and self.module not in fold.factors and not self._lost(powers)
            columns = Scaling(columns=_negated(self._spread(powers))) if fits else Scaling()
        if not fits:
            kind = "F32 above zero" if self.adds else "I8 exponents of two, of rows with columns"
            raise BadFold(f"the fold of {self.module} does not fit it: expected {self.count} scales, {kind}")
        if any(powers) or columns.factors:
            yield from ((name, Scaling(rows=powers, added=self.adds)) for name in self.own)
            yield from ((name, columns) for name in self.behind)

    def sizes(self, fold: Fold) -> bytes:
        """Those of the columns behind; empty where the fold says nothing of them. Raises BadFold."""
        sizes = fold.sizes.get(self.module, b"")
        if len(sizes) not in {0, self.count}:
            raise BadFold(f"the fold of {self.module} does not fit it: expected {self.count} sizes, found {len(sizes)}")
        return self._spread(sizes)

    def _spread(self, values: bytes) -> bytes:
        if isinstance(self.owners, range) or not values:
            return values
        return bytes(values[row] for row in self.owners)

    def _lost(self, powers: bytes) -> bool:
        """True if rows are scaled that no column belongs to."""
        return isinstance(self.owners, tuple) and any(
            powers[row] for row in {*range(len(powers))}.difference(self.owners)
        )


def _rows(tensors: Mapping[str, TensorRef], name: str) -> int:
    shape = tensors[name].shape
    assert shape
    return shape[0]


def _scaled(t: TensorRef, one: Scaling) -> TensorRef:
    """With what its rows, or its columns, are multiplied by, beside what it has for the others."""
    (e,) = t.encoded or (plain_rows(t),)
    other = e.scaling or Scaling()
    rows, columns = one.rows or other.rows, one.columns or other.columns
    factors, added = one.factors or other.factors, one.added or other.added
    return replace(t, encoded=(replace(e, scaling=Scaling(rows, columns, factors, added)),))


def _loses(e: Encoded) -> bool:
    return e.scaling is not None and (not e.scaling.is_exact or e.dtype == "F16")


def _negated(exponents: bytes) -> bytes:
    return exponents.translate(NEGATED)


def _powers_of(factors: bytes) -> bytes:
    return array("b", map(power_of, _floats(factors))).tobytes()


def _floats(data: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(data) // 4}f", data)
