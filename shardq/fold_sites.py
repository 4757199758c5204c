"""Where scales can move between neighbours without changing what a layer computes: from names, shapes and the config.

Behind a norm: its weights times m, and the columns of all that it feeds divided by m. Between two matrices, the rows of
one times m, and the columns of the other divided by m, where what lies between is linear in each of them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from shardq.checkpoint import TensorRef
from shardq.families import load_families
from shardq.fold_rows import FoldRow, Heads, PairFold, load_folds
from shardq.fused import model_types

_LAYER: Final = re.compile(r"((?:[A-Za-z_]\w*\.)*?layers\.\d+\.)(.+)")
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
WEIGHT: Final = ".weight"
BIAS: Final = ".bias"


@dataclass(frozen=True, slots=True)
class NormSite:
    """A norm, and the matrices that its output feeds; names of weights."""

    norm: str
    of: tuple[str, ...]  # whose column scales it takes
    also: tuple[str, ...]
    adds: float


@dataclass(frozen=True, slots=True)
class PairSite:
    """Two matrices, names of weights: each column of one belongs to a row of the other."""

    rows: str
    bias: str | None  # of the rows
    columns: str
    owners: range | tuple[int, ...]  # column -> its row; a row may have several columns, or none


@dataclass(frozen=True, slots=True)
class Sites:
    """All that can be folded."""

    norms: tuple[NormSite, ...]
    pairs: tuple[PairSite, ...]
    left: tuple[str, ...]  # layers of a known family that stay as they are, each with the reason


def find_sites(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> Sites:
    """The sites of a model whose type has a row in folds.toml; none of any other. Raises nothing."""
    row = fold_row(config)
    if row is None:
        return Sites((), (), ())
    norms: list[NormSite] = []
    pairs: list[PairSite] = []
    left: list[str] = []
    known = _known(row)
    heads = _head_counts(config)
    for layer, names in _layers(tensors).items():
        strange = [n for n in names if _pattern(n) not in known]
        if strange:
            left.append(f"{layer.removesuffix('.')} has {strange[0]}")
            continue
        own_norms = list(_norm_sites(layer, names, row, tensors))
        own_pairs = [_pair_site(layer, rows, columns, p, tensors, heads) for rows, columns, p in _couples(names, row)]
        if None in own_norms or None in own_pairs:
            left.append(f"{layer.removesuffix('.')} has shapes that do not go together")
            continue
        norms += [n for n in own_norms if n]
        pairs += [p for p in own_pairs if p]
    return Sites(tuple(norms), tuple(pairs), tuple(left))


def fold_row(config: Mapping[str, Any] | None) -> FoldRow | None:
    """The row of folds.toml for a model; None where there is none."""
    types = model_types(config)
    return next((r for r in load_folds() if any(fnmatchcase(t, p) for t in types for p in r.model_types)), None)


def _layers(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Prefix of each layer of the text model -> names below it."""
    nontext = load_families().names.nontext
    layers: dict[str, list[str]] = {}
    for name in tensors:
        if (match := _LAYER.fullmatch(name)) and not nontext.search(match[1]):
            layers.setdefault(match[1], []).append(match[2])
    return layers


def _pattern(name: str) -> str:
    """A name as rows have it: numbers are stars, and weights and biases their module."""
    starred = _NUMBER.sub("*", name)
    return starred.removesuffix(WEIGHT) if starred.endswith(WEIGHT) else starred.removesuffix(BIAS)


def _known(row: FoldRow) -> frozenset[str]:
    fed = {name for n in row.norms for name in (n.norm, *n.of, *n.also)}
    return frozenset({*fed, *(name for p in row.pairs for name in (p.rows, p.columns)), *row.others})


def _norm_sites(
    layer: str, names: Iterable[str], row: FoldRow, tensors: Mapping[str, TensorRef]
) -> Iterator[NormSite | None]:
    """Those of a layer; None for one whose shapes do not fit."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(WEIGHT):
            by_pattern.setdefault(_pattern(name), []).append(layer + name)
    for n in row.norms:
        of = tuple(name for pattern in n.of for name in by_pattern.get(pattern, ()))
        also = tuple(name for pattern in n.also for name in by_pattern.get(pattern, ()))
        (norm,) = by_pattern.get(n.norm) or (None,)
        if norm is None or not of:
            continue
        fits = layer + n.norm + BIAS not in tensors and all(
            _shape(tensors, name)[1:] == _shape(tensors, norm) for name in (*of, *also)
        )
        yield NormSite(norm, of, also, row.adds) if fits and len(_shape(tensors, norm)) == 1 else None


def _couples(names: Iterable[str], row: FoldRow) -> Iterator[tuple[str, str, PairFold]]:
    """Weights of a layer that a row pairs; those below a number have the same one."""
    there = set(names)
    for name in sorted(there):
        for p in row.pairs:
            if name.endswith(WEIGHT) and _pattern(name) == p.rows:
                other = p.columns
                for number in _NUMBER.findall(name):
                    other = other.replace("*", number, 1)
                if other + WEIGHT in there:
                    yield name, other + WEIGHT, p


def _pair_site(
    layer: str, rows: str, columns: str, p: PairFold, tensors: Mapping[str, TensorRef], heads: Mapping[str, int]
) -> PairSite | None:
    """None where shapes do not fit."""
    rows, columns = layer + rows, layer + columns
    above, below = _shape(tensors, rows), _shape(tensors, columns)
    owners = _owners(p.heads, above[0], below[1], heads) if len(above) == len(below) == 2 else None
    bias = rows.removesuffix(WEIGHT) + BIAS
    if owners is None or _shape(tensors, bias) not in ((), above[:1]):
        return None
    return PairSite(rows, bias if bias in tensors else None, columns, owners)


def _owners(kind: Heads, rows: int, columns: int, heads: Mapping[str, int]) -> range | tuple[int, ...] | None:
    """The row that each column belongs to; None where the numbers do not go together."""
    if kind == "latent":
        keys, values = heads.get("qk_nope_head_dim", 0), heads.get("v_head_dim", 0)
        if values == 0 or columns % values or rows != columns // values * (keys + values):
            return None
        return tuple(c // values * (keys + values) + keys + c % values for c in range(columns))
    if rows == columns:
        return range(rows)
    shared = heads.get("num_key_value_heads", 0)
    if kind != "grouped" or shared == 0 or rows % shared or columns % rows:
        return None
    size, each = rows // shared, columns // rows
    return tuple(c // size // each * size + c % size for c in range(columns))


def _head_counts(config: Mapping[str, Any] | None) -> Mapping[str, int]:
    """Numbers of the text model's own config, or of the top level where it has none."""
    config = config or {}
    own = next((config[k] for k in sorted(load_families().config.text) if isinstance(config.get(k), Mapping)), config)
    return {k: v for k, v in own.items() if type(v) is int}


def _shape(tensors: Mapping[str, TensorRef], name: str) -> tuple[int, ...]:
    """Empty for what is not there or not known."""
    t = tensors.get(name)
    return t.shape or () if t else ()
