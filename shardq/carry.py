"""Carrying: codes of a quantized source into a layout that holds the same numbers, without quantizing again.

This is the planning side, by headers and configuration alone: the scheme that an encoded weight has, whether its
numbers fit another scheme in a layout, and what the layout stores. `carry_codes` is the worker's, which has the data.

Codes are never changed. Scales are repeated where the source shares them more widely than the target, a zero point
becomes MLX's bias and back, and a global scale becomes a divisor; all or nothing, so that every weight decodes to the
same fp32 number (-0 and +0 are one number).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from shardq.carry_activation import declared_activation
from shardq.errors import UnknownScheme
from shardq.formats import ELEMENTS
from shardq.layouts.base import Layout
from shardq.schemes import PLAIN_SCALES, PRESETS, WEIGHT_TYPE, WHOLE_ROW, Exponent, Reach, Scheme, parse_name

if TYPE_CHECKING:
    from shardq.dequantize.base import Encoded
    from shardq.dequantize.hints import Hints

POWERS: Final = "e8m0"
E4M3: Final = "e4m3fn"
SMALL: Final = (E4M3, "e5m3")  # formats of scales that are small floats
STORED: Final = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
SCALES: Final = ("scales", "weight_scale", "weight_scale_inv")  # what layouts call them
BIASES: Final = "biases"
GLOBAL_SCALE: Final = "weight_global_scale"
BLOCK: Final = 128  # rows and columns of native FP8's blocks
MX_GROUP: Final = 32  # columns that share a power of two
NV_GROUP: Final = 16  # columns that share a scale of e4m3, which MLX stores in bytes as it does powers of two
GROUPS: Final = (128, 64, 32)  # of integers that every layout has a reader for
WIDER: Final = {"F16": ("F16", "F32"), "BF16": ("BF16", "F32"), "F32": ("F32",)}  # types that hold a type's numbers


@dataclass(frozen=True, slots=True)
class Goal:
    """Where codes are carried to, as far as it decides canonical rows: equal goals share them."""

    scheme: Scheme  # settled by the layout
    layout: str  # for messages
    scale: str  # the format in which scales, and biases, are stored there: a key of ELEMENTS
    biased: bool  # biases in place of zero points
    lifted: bool  # a global scale above the others, which readers divide by


def goal(layout: Layout, scheme: Scheme, dtype: str, rows: int, columns: int) -> Goal:
    """The goal of a [rows, columns] weight of type `dtype` under `scheme`, settled by and not refused by `layout`."""
    specs = {s.suffix: s for s in layout.outputs(scheme, dtype, rows, columns)}
    tag = next(specs[name].dtype for name in SCALES if name in specs)
    return Goal(scheme, layout.name, STORED.get(tag, scheme.scale), BIASES in specs, GLOBAL_SCALE in specs)


# --- what the source has -------------------------------------------------------------------------------------------


def carried_scheme(e: "Encoded", hints: "Hints", symmetric: bool | None = None) -> Scheme | None:
    """The scheme, not settled for a layout, whose numbers an encoded weight has; None where `no_scheme` says why.

    Integers are symmetric without zero points; with zero points or biases where `symmetric` or, where that is None, the
    configuration says so, which is checked against the data when they are carried. Plain scales of native FP8 count as
    powers of two where the configuration says so. A weight that one group or block covers has the scheme that the
    configuration names, else whole rows, or one scale for all.
    """
    if no_scheme(e, hints) is not None:
        return None
    scale, activation = _scale_format(e, hints), declared_activation(e, hints)
    if ELEMENTS[e.element].is_integer:
        said = hints.symmetric(_module(e)) if symmetric is None else symmetric
        plain = e.part("zeros") is None and e.part(BIASES) is None
        return Scheme(e.element, _integer_group(e, hints), plain or bool(said), activation=activation)
    if scale in SMALL or (scale == POWERS and e.block[0] == 1):
        reach: Reach = "fused" if scale == E4M3 else "group"  # as presets have it: layouts may settle otherwise
        return Scheme(
            e.element, _small_group(e), True, scale, reach=reach, exponent=_exponent(scale), activation=activation
        )
    rows, group = _block(e, hints)
    of_all = group == WHOLE_ROW and rows != 1
    return Scheme(
        e.element, group, True, scale, group_rows=1 if of_all else rows, reach="tensor" if of_all else "group",
        exponent=_exponent(scale), activation=activation,
    )  # fmt: skip


def no_scheme(e: "Encoded", hints: "Hints") -> str | None:
    """Why no scheme has the numbers of an encoded weight, or None."""
    if e.element not in ELEMENTS:
        return f"has codes of {e.element}, which no scheme has"
    if e.kind == "bnb8":
        return "has a last factor of 1/127, which no scheme has"
    if e.transposed:
        return "is stored as columns"
    if e.part("groups") is not None and hints.act_order and e.block[1] < e.columns:
        return "has its columns in act-order (desc_act), which no layout here keeps"
    if stored_scale(e) is None:
        return f"has scales of a type that no scheme has beside {e.element}"
    return None


def _exponent(scale: str) -> Exponent:
    return "even" if scale == POWERS else ""  # as presets have it: the rule is the layout's business


def _module(e: "Encoded") -> str:
    return e.name.removesuffix(".weight")


def stored_scale(e: "Encoded") -> str | None:
    """The format of the scales of an encoded weight: a key of ELEMENTS; None for one that no scheme has beside it."""
    part = e.part("scale")
    if part is None or part.dtype in STORED:
        return None if part is None else STORED[part.dtype]
    if e.element not in ELEMENTS or ELEMENTS[e.element].is_integer:
        return None
    if part.dtype == "F8_E4M3" or (e.kind == "mlx" and e.block[1] == NV_GROUP):
        return E4M3
    return POWERS if part.dtype in ("U8", "F8_E8M0") else None


def _scale_format(e: "Encoded", hints: "Hints") -> str:
    """As schemes say it."""
    stored = stored_scale(e)
    assert stored is not None
    if stored not in PLAIN_SCALES:
        return stored
    return POWERS if hints.power_scales and e.element == E4M3 else WEIGHT_TYPE


def _is_lifted(e: "Encoded") -> bool:
    return e.part("factor") is not None or e.part("divisor") is not None


def _integer_group(e: "Encoded", hints: "Hints") -> int:
    """Whole rows where one group is the row, unless the configuration names just that size."""
    said = [g for bits, g in hints.widths(_module(e)) if bits == ELEMENTS[e.element].bits]
    whole = e.block[1] >= e.columns and e.columns not in said and e.part(BIASES) is None
    return WHOLE_ROW if whole else e.block[1]


def _small_group(e: "Encoded") -> int:
    """Columns below a scale that is a small float or a power of two; of MX, which few columns may not fill."""
    if e.element != E4M3 or e.block[1] < e.columns:
        return e.block[1]
    return MX_GROUP if e.columns <= MX_GROUP else WHOLE_ROW


def _block(e: "Encoded", hints: "Hints") -> tuple[int, int]:
    """Rows and columns that share a scale, as schemes say it: (rows, WHOLE_ROW) for one scale of all. A side that a
    single block covers has that of the blocks that the configuration names."""
    high, wide = shared_rows(e), e.block[1]
    named = hints.weight_block or (BLOCK, BLOCK)
    whole_high, whole_wide = high >= e.rows, wide >= e.columns
    in_named = named[0] >= e.rows and named[1] >= e.columns and hints.weight_block is not None
    if e.block[0] == 1 or (whole_high and whole_wide and not in_named):
        return high, WHOLE_ROW if whole_wide else wide
    return (
        named[0] if whole_high and named[0] >= e.rows else high,
        named[1] if whole_wide and named[1] >= e.columns else wide,
    )


def shared_rows(e: "Encoded") -> int:
    """The largest number of rows, counted from the first, that always share their scales: fewer than a block has
    stored, where rows are picked from it; all rows where one block covers them."""
    mine, high = e.span, e.block[0]
    if high == 1:
        return 1
    cuts = (-(-(at * high - mine[0]) // mine.step) for at in range(mine[0] // high + 1, mine[-1] // high + 1))
    return math.gcd(*cuts) or e.rows


# --- what the target takes -----------------------------------------------------------------------------------------


def fits(e: "Encoded", own: Scheme, target: Scheme, layout: Layout, default: Scheme | None = None) -> str | None:
    """By headers alone: why codes of `own` (see carried_scheme) cannot be carried to `target`, which is settled by
    `layout`, beside `default`, the scheme of the other modules; None where they can be, if the data are as they should.
    What is done to activations does not matter."""
    if own.element != target.element:
        return f"has codes of {own.element}, not of {target.element}"
    if own.format.is_integer and target.symmetric and not own.symmetric:
        return f"has zero points or biases, and {target.name} is symmetric"
    if reason := _group_misfit(e, target):
        return reason
    if target.scale == POWERS and own.scale != POWERS:
        return f"has scales that are no powers of two, as {target.name} wants"
    if target.scale in SMALL and own.scale in PLAIN_SCALES:
        return f"has scales wider than those of {target.name}"
    refusal = layout.refuse(target, default or target, e.rows, e.columns)
    if refusal is not None:
        return f"does not fit the layout {layout.name}, which {refusal.reason}"
    if layout.unpacks_to(target) != target:
        return f"has codes, and the layout {layout.name} keeps values"
    return None


def _group_misfit(e: "Encoded", target: Scheme) -> str | None:
    wide, columns = e.block[1], target.group_columns(e.columns)
    if wide < e.columns and wide % columns:
        return f"has a scale for {wide} columns, which are not whole groups of {columns}"
    high, rows = shared_rows(e), e.rows if target.reach == "tensor" else min(target.group_rows, e.rows)
    if high < e.rows and high % rows:
        return f"has a scale for {high} rows, which are not whole blocks of {rows}"
    return None


def target_scheme(e: "Encoded", own: Scheme, layout: Layout, default: Scheme | None = None) -> Scheme | None:
    """The scheme, settled, under which `layout` takes codes of `own`: the same, or the nearest with the same weights
    (smaller groups; plain scales for powers of two, and the reverse). Activations are declared as in the source, or not
    at all. None where nothing fits: `fits` of `own` as the layout settles it then says why."""
    settled = (layout.settle(s) for s in _candidates(own))
    return next((s for s in settled if fits(e, own, s, layout, default) is None and _is_named(s)), None)


def _is_named(s: Scheme) -> bool:
    """True for what a ledger can name: what sources may have goes beyond it."""
    try:
        return parse_name(s.name) is not None
    except UnknownScheme:
        return False


def _candidates(own: Scheme) -> Iterator[Scheme]:
    for s in dict.fromkeys((own, replace(own, activation=""))):
        yield s
        if own.format.is_integer:
            yield from (replace(s, group_size=size) for size in GROUPS)
        elif own.scale == POWERS and own.group_rows > 1:
            yield replace(s, scale=WEIGHT_TYPE, exponent="")
    yield from (p.scheme for p in PRESETS.values() if p.scheme.activation in ("", own.activation))


def carried_dtype(e: "Encoded", own: Scheme, target: Scheme, layout: Layout) -> str:
    """The type that the module should be given, so that what `layout` stores in it is exact whenever that is possible:
    that of the source's scales, F32 where zero points become biases (a product of both does not fit 16 bits), BF16 for
    powers of two. Where the layout stores scales in a type of its own, the type that the source's reader would give."""
    sixteen, wide = (goal(layout, target, dtype, e.rows, e.columns) for dtype in ("F16", "F32"))
    if sixteen.scale == wide.scale:
        return e.dtype
    if sixteen.biased and e.part("zeros") is not None and not own.symmetric:
        return "F32"
    scale = e.part("scale")
    assert scale is not None
    if _is_lifted(e):
        return "F32"
    return scale.dtype if scale.dtype in STORED else "BF16"


def is_certain(e: "Encoded", own: Scheme, to: Goal) -> bool:
    """True where carrying cannot fail, if the configuration tells the truth: what `fits` has let pass, with scales of a
    type that the target stores and without a change of zero points. For a run that may quantize again instead."""
    scale = e.part("scale")
    assert scale is not None
    if e.part(BIASES) is not None:
        return to.biased and to.scale in (STORED[t] for t in WIDER[scale.dtype])
    if to.lifted or e.part("divisor") is not None:
        return to.lifted and (e.part("divisor") is not None or (own.scale == E4M3 and not _is_lifted(e)))
    if _is_lifted(e):
        return False
    if scale.dtype in STORED:
        held = to.scale in (STORED[t] for t in WIDER[scale.dtype])
        return held and (not to.biased or (to.scale == "fp32" and scale.dtype != "F32"))
    return to.scale == own.scale or (own.scale == POWERS and to.scale in ("bf16", "fp32"))


def needs_largest(e: "Encoded", to: Goal) -> bool:
    """True where all of a matrix, and what a server runs as one with it, must be surveyed for its largest scale first
    (`carry_codes.largest_scale`): powers of two below a global scale that the source does not have."""
    return to.lifted and stored_scale(e) == POWERS and not _is_lifted(e)
