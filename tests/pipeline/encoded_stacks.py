"""Stacks of experts, beside the matrix of each expert that they are in the twin."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from encoded_codes import Encode, plain
from encoded_models import Piece, keep, rng_of
from encoded_numbers import Stored

EXPERTS, HIDDEN, INNER = 3, 128, 256  # gate and up together are 512 rows
PAIR: Final = ("gate_proj", "up_proj")


def stack(
    name: str, prefix: str, written: Sequence[str], shape: tuple[int, int], encode: Encode = plain, *,
    leaf: str = ".weight", alternate: bool = False, turned: bool = False, whole: bool = False,
) -> Piece:  # fmt: skip
    """The matrices `written` of all experts, stacked as `name`.

    `shape`: outputs and inputs of a slice. `leaf` stands for `.weight` in the names. `alternate`: rows of the matrices
    take turns, else they are halves. `turned`: slices are [inputs, outputs]. `whole`: the twin has a stack as well.
    """
    made = [encode(rng_of(f"{prefix}.{n}.{written[-1]}"), *shape) for n in range(EXPERTS)]
    stored = {}
    for suffix, part in made[0].parts.items():
        slices = [m.parts[suffix].data.T if turned else m.parts[suffix].data for m in made]
        stored[name + suffix.replace(".weight", leaf, 1)] = Stored(part.dtype, np.stack(slices))
    if whole:
        return Piece(stored, {name + leaf: Stored("F32", np.stack([m.weight for m in made]))}, encoded=True)
    twin = {
        f"{prefix}.{n}.{projection}.weight": Stored(m.twin.dtype, np.ascontiguousarray(m.twin.data[rows]))
        for n, m in enumerate(made)
        for projection, rows in zip(written, shares(shape[0], len(written), alternate), strict=True)
    }
    return Piece(stored, twin, made[0].encoded)


def shares(rows: int, parts: int, alternate: bool) -> list[slice]:
    """The rows of each part."""
    if alternate:
        return [slice(n, rows, parts) for n in range(parts)]
    return [slice(n * rows // parts, (n + 1) * rows // parts) for n in range(parts)]


def bias_stack(name: str, prefix: str, written: Sequence[str], outputs: int) -> Piece:
    """Biases of a stack whose rows take turns."""
    (stored,) = keep(name, EXPERTS, outputs).source.values()
    twin = {
        f"{prefix}.{n}.{projection}.bias": Stored("BF16", np.ascontiguousarray(stored.data[n, rows]))
        for n in range(EXPERTS)
        for projection, rows in zip(written, shares(outputs, len(written), alternate=True), strict=True)
    }
    return Piece({name: stored}, twin)


def fused(at: str, encode: Encode = plain, **how: Any) -> Iterator[Piece]:
    """`gate_up_proj` and `down_proj`, raw parameters without `.weight`."""
    yield stack(f"{at}.gate_up_proj", at, PAIR, (2 * INNER, HIDDEN), encode, leaf="", **how)
    yield stack(f"{at}.down_proj", at, ("down_proj",), (HIDDEN, INNER), encode, leaf="", **how)


def separate(at: str, prefix: str, encode: Encode) -> Iterator[Piece]:
    """A stack for each projection."""
    for name, shape in {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
        yield stack(f"{at}.{name}", prefix, (name,), shape, encode)
