"""Schemes: the numbers of a quantized weight, and the table of names that users know them by.

A scheme says nothing about bytes on disk; that is a layout's business. Names and fields follow auto-round 0.16.1 and
compressed-tensors 0.20.0, so that a command line written for them means the same here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from shardq.errors import BadGroupSize, BadOption, UnknownScheme
from shardq.formats import ELEMENTS, ElementFormat

WHOLE_ROW: Final = -1  # group size: all columns of a row share one scale ("per channel")
ALL_TOKENS: Final = 0  # group size of activations: all tokens share a scale, which is known before serving
WEIGHT_TYPE: Final = "weight"  # a scale format: that of the weight itself
WIDTHS: Final = (2, 3, 4, 5, 6, 7, 8)  # what --bits takes; a layout may hold fewer


Numbers = Literal["auto_round", "compressed_tensors", "mlx", "fp8"]
Exponent = Literal["", "floor", "even", "ceil", "rceil"]
Reach = Literal["group", "tensor", "fused"]


@dataclass(frozen=True, slots=True)
class Activation:
    """What a server is told to do to a matrix' inputs. Nothing of it changes a weight."""

    name: str
    element: str  # key of formats.ELEMENTS
    group_size: int  # columns that share a scale, computed for each token while serving; WHOLE_ROW for all of a token,
    # ALL_TOKENS for one that is computed for none
    scale: str  # format of these scales
    exponent: Exponent = ""  # how the server rounds a scale that is a power of two; empty: as its format has it
    calibrated: bool = False  # static: needs a number for each matrix that only data give

    @property
    def format(self) -> ElementFormat:
        """The element format's row."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return self.format.bits

    @property
    def floating(self) -> bool:
        """False for integers."""
        return not self.format.is_integer


ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        a.name: a
        for a in (
            Activation("int4", "int4", WHOLE_ROW, "fp32"),
            Activation("int8", "int8", WHOLE_ROW, "fp32"),
            Activation("fp8", "e4m3fn", WHOLE_ROW, "fp32"),
            Activation("fp8-g128", "e4m3fn", 128, "fp32"),
            Activation("mxfp4", "e2m1", 32, "e8m0"),
            Activation("mxfp8", "e4m3fn", 32, "e8m0"),
            Activation("mxfp4-rceil", "e2m1", 32, "e8m0", exponent="rceil"),
            Activation("mxfp8-rceil", "e4m3fn", 32, "e8m0", exponent="rceil"),
            Activation("mxint4", "e0m3", 32, "e8m0"),
            Activation("int8-static", "int8", ALL_TOKENS, WEIGHT_TYPE, calibrated=True),
            Activation("fp8-static", "e4m3fn", ALL_TOKENS, WEIGHT_TYPE, calibrated=True),
            Activation("nvfp4", "e2m1", 16, "e4m3fn", calibrated=True),
            Activation("nvfp4-e5m3", "e2m1", 16, "e5m3"),
        )
    }
)
# Names of schemes with float elements, by element and format of scales; plain numbers as scales have no entry there.
_STEMS: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("e4m3fn", ""): "FP8",
        ("e0m3", "e8m0"): "MXINT4",
        ("e2m1", "e8m0"): "MXFP4",
        ("e2m3", "e8m0"): "MXFP6",
        ("e4m3fn", "e8m0"): "MXFP8",
        ("e2m1", "e4m3fn"): "NVFP4",
        ("e2m1", "e5m3"): "NVFP4_E5M3",
    }
)
PLAIN_SCALES: Final = (WEIGHT_TYPE, "fp16", "bf16", "fp32")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight matrix becomes codes and scales, and what a server does to activations."""

    element: str  # key of formats.ELEMENTS: the format of a code
    group_size: int  # columns that share a scale; WHOLE_ROW for the whole row
    symmetric: bool  # False: a zero point for each group
    scale: str = "fp16"  # the format a scale is rounded to before codes are taken: a key of ELEMENTS, or WEIGHT_TYPE
    numbers: Numbers = "auto_round"  # whose arithmetic; the layout decides
    group_rows: int = 1  # rows that share a scale
    exponent: Exponent = ""  # how a scale that is a power of two is rounded; empty where scales are none
    reach: Reach = "group"  # whose largest magnitude must be known before the first code: the group's, the whole
    # tensor's, or that of all matrices which a server runs as one
    activation: str = ""  # key of ACTIVATIONS: what the config declares; empty: left in 16 bits
    block: str = ""  # key of ggml.GGML: codes and scales lie together in its blocks, which no other layout holds

    def __post_init__(self) -> None:
        """Refuse what no kernel can do. Raises BadOption, BadGroupSize."""
        if self.element not in ELEMENTS or self.scale not in {*ELEMENTS, WEIGHT_TYPE}:
            raise BadOption(f"unknown element format {self.element!r} or scale format {self.scale!r}")
        if self.group_size != WHOLE_ROW and self.group_size < 1:
            raise BadGroupSize(
                f"group size {self.group_size} is impossible: expected a positive number of columns, or -1 for "
                "the whole row"
            )

    @property
    def format(self) -> ElementFormat:
        """The element format's row."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.format.bits

    @property
    def is_adjustable(self) -> bool:
        """True for weight-only integers, whose bits, group size and symmetry a user may choose."""
        return self.format.is_integer and not self.activation and not self.block

    @property
    def calibrated(self) -> bool:
        """True where each matrix needs a number for its activations that only data give."""
        return bool(self.activation) and ACTIVATIONS[self.activation].calibrated

    @property
    def stem(self) -> str:
        """What the weights are, for layouts that name their formats after it: W4, FP8, MXFP4, NVFP4, ..."""
        if self.format.is_integer:
            return f"W{self.bits}"
        return _STEMS.get((self.element, "" if self.scale in PLAIN_SCALES else self.scale), self.element.upper())

    @property
    def name(self) -> str:
        """Canonical name, which with a layout says all: W4A16 (group 128), W4A16G32, W8A16CH (whole row), -ASYM where
        asymmetric, W4A8, W4AFP8; FP8, MXFP4, ... with A16 behind it where activations stay, A8 or XFP8 where they
        become another format than the weights; -STATIC where their scales are in the checkpoint."""
        if self.block:
            return self.block
        if self.bits == 16:
            return self.element.upper()
        a = ACTIVATIONS[self.activation] if self.activation else None
        if self.format.is_integer:
            width = f"{'FP' if a.floating else ''}{a.bits}" if a else "16"
            group = {128: "", WHOLE_ROW: "CH"}.get(self.group_size, f"G{self.group_size}")
            static = "-STATIC" if a and a.group_size == ALL_TOKENS else ""
            return f"{self.stem}A{width}{group}{'' if self.symmetric else '-ASYM'}{static}"
        if a is None:
            kind = "A16"
        elif a.element == self.element:
            kind = "-RCEIL" if a.exponent == "rceil" else "-STATIC" if a.group_size == ALL_TOKENS else ""
        else:
            kind = f"A{a.bits}" if a.scale == self.scale else f"XFP{a.bits}"
        shape = "-BLOCK" if self.group_rows > 1 else "-TENSOR" if self.reach == "tensor" else ""
        return f"{self.stem}{kind}{shape}"

    def group_columns(self, columns: int) -> int:
        """Columns of a full group in a row of `columns`."""
        return columns if self.group_size == WHOLE_ROW else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns`, a short last one included."""
        return -(-columns // self.group_columns(columns))


@dataclass(frozen=True, slots=True)
class Preset:
    """A named scheme, and the widths that it changes for some modules."""

    name: str
    scheme: Scheme
    summary: str
    bits_of: tuple[tuple[str, int], ...] = ()  # module pattern, bits; first match wins


_FP8: Final = Scheme("e4m3fn", WHOLE_ROW, symmetric=True, scale=WEIGHT_TYPE, activation="fp8")
_MX: Final = Scheme("e2m1", 32, symmetric=True, scale="e8m0", exponent="even")  # the rule is the layout's business
PLAIN_WEIGHTS: Final = Scheme("bf16", 1, symmetric=True, scale="bf16")  # of outputs that quantize nothing
_NV: Final = Scheme("e2m1", 16, symmetric=True, scale="e4m3fn", reach="fused")


def _int_preset(bits: int, group_size: int = 128, activation: str = "") -> Preset:
    scheme = Scheme(f"int{bits}", group_size, symmetric=True, activation=activation)
    served = f"; activations to {activation} while serving" if activation else ""
    return Preset(scheme.name, scheme, f"{bits}-bit integers, one scale for {group_size} columns{served}")


def _float_preset(scheme: Scheme, summary: str) -> Preset:
    return Preset(scheme.name.replace("-", "_"), scheme, summary)


def _mx_preset(element: str, activation: str, summary: str) -> Preset:
    return _float_preset(replace(_MX, element=element, activation=activation), summary)


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        p.name: p
        for p in (
            *(_int_preset(2, g) for g in (128, 32, 64)),
            _int_preset(3),
            *(_int_preset(4, g) for g in (128, 32, 64)),
            *(_int_preset(b) for b in (5, 6, 7)),
            *(_int_preset(8, g) for g in (128, 32, 64)),
            Preset(
                "W4A16_ASYM", Scheme("int4", 128, symmetric=False), "4-bit integers with zero points, for 128 columns"
            ),
            Preset(
                "W4A16_MIXED",
                Scheme("int8", 128, symmetric=True),
                "8-bit integers, with 4 bits for routed experts (auto-round's mixture)",
                ((r"re:.*\.(experts|moe)\.", 4),),
            ),
            _int_preset(4, activation="int4"),
            _int_preset(4, activation="int8"),
            _int_preset(4, activation="fp8"),
            Preset(
                "W8A8",
                Scheme("int8", WHOLE_ROW, symmetric=True, activation="int8"),
                "8-bit integers, one scale for a row; activations to 8 bits while serving",
            ),
            Preset(
                "W8A8_STATIC",
                Scheme("int8", WHOLE_ROW, symmetric=True, activation="int8-static"),
                "8-bit integers, one scale for a row; activations to 8 bits by scales that `shardq tune` finds",
            ),
            Preset("FP8_DYNAMIC", _FP8, "8-bit floats, one scale for a row; activations to 8 bits while serving"),
            Preset("FPW8A16", replace(_FP8, activation=""), "8-bit floats, one scale for a row"),
            Preset(
                "FP8_BLOCK",
                replace(_FP8, group_size=128, group_rows=128, activation="fp8-g128"),
                "8-bit floats, one scale for 128 rows and columns; activations to 8 bits while serving",
            ),
            Preset(
                "FPW8A16_BLOCK",
                replace(_FP8, group_size=128, group_rows=128, activation=""),
                "8-bit floats, one scale for 128 rows and columns",
            ),
            _float_preset(
                replace(_FP8, reach="tensor"), "8-bit floats, one scale for all; activations to 8 bits while serving"
            ),
            _float_preset(
                replace(_FP8, activation="fp8-static"),
                "8-bit floats, one scale for a row; activations to 8 bits by scales that `shardq tune` finds",
            ),
            _float_preset(
                replace(_FP8, reach="tensor", activation="fp8-static"),
                "8-bit floats, one scale for all; activations to 8 bits by scales that `shardq tune` finds",
            ),
            Preset("FPW8A16_TENSOR", replace(_FP8, reach="tensor", activation=""), "8-bit floats, one scale for all"),
            _mx_preset("e2m1", "mxfp4", "4-bit floats, a power of two for 32 columns; activations alike"),
            _mx_preset("e2m1", "", "4-bit floats, a power of two for 32 columns"),
            _mx_preset("e2m1", "mxfp4-rceil", "as MXFP4, with scales of activations rounded up while serving"),
            _mx_preset("e2m1", "fp8-g128", "4-bit floats, a power of two for 32 columns; activations to 8 bits"),
            _mx_preset("e4m3fn", "mxfp8", "8-bit floats, a power of two for 32 columns; activations alike"),
            _mx_preset("e4m3fn", "", "8-bit floats, a power of two for 32 columns"),
            _mx_preset("e4m3fn", "mxfp8-rceil", "as MXFP8, with scales of activations rounded up while serving"),
            _mx_preset("e2m3", "", "6-bit floats, a power of two for 32 columns"),
            _mx_preset("e2m3", "mxfp8", "6-bit floats, a power of two for 32 columns; activations to MXFP8"),
            _mx_preset(
                "e0m3", "mxint4", "4-bit integers with a sign, a power of two for 32 columns; activations alike"
            ),
            _float_preset(_NV, "4-bit floats, an fp8 scale for 16 columns, a scale for all that runs as one matrix"),
            _float_preset(
                replace(_NV, activation="nvfp4"),
                "as NVFP4A16; activations alike, below scales that `shardq tune` finds",
            ),
            _float_preset(
                replace(_NV, scale="e5m3", reach="group", activation="nvfp4-e5m3"),
                "4-bit floats, a wide fp8 scale for 16 columns; activations alike",
            ),
        )
    }
)
# Of ggml's blocks, by type: codes, and columns that share a scale. These scales are codes again in blocks of 256.
BLOCKS: Final[Mapping[str, Scheme]] = MappingProxyType(
    {
        block: Scheme(element, columns, symmetric, block=block)
        for block, element, columns, symmetric in (
            ("Q4_0", "int4", 32, True),
            ("Q4_1", "int4", 32, False),
            ("Q5_0", "int5", 32, True),
            ("Q5_1", "int5", 32, False),
            ("Q8_0", "int8", 32, True),
            ("Q2_K", "int2", 16, False),
            ("Q3_K", "int3", 16, True),
            ("Q4_K", "int4", 32, False),
            ("Q5_K", "int5", 32, False),
            ("Q6_K", "int6", 16, True),
            ("IQ4_NL", "int4", 32, True),  # codes of a table of 16 numbers, as the next
            ("IQ4_XS", "int4", 32, True),
            ("TQ1_0", "int2", 256, True),  # three numbers a code
            ("TQ2_0", "int2", 256, True),
            ("MXFP4", "e2m1", 32, True),
        )
    }
)
# Names that other tools use, to names that `parse_scheme` knows.
ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "INT8": "W8A8",
        "INT8_W8A8": "W8A8",
        "INT8_STATIC": "W8A8_STATIC",
        "W8A8CH_STATIC": "W8A8_STATIC",
        "INT8_W8A8_STATIC": "W8A8_STATIC",
        "INT4": "W4A4CH",
        "FP8": "FP8_DYNAMIC",
        "FP8A16": "FPW8A16",
        "FP8A16_TENSOR": "FPW8A16_TENSOR",
        "MXFP6": "MXFP6A16",
        **{f"{b}BIT": f"W{b}A16G64" for b in (2, 3, 4, 5, 6, 8)},  # mlx-lm
    }
)
_TOKENS: Final[Mapping[str, str]] = MappingProxyType({"16": "", "8": "int8", "4": "int4", "FP8": "fp8"})
_INTEGERS: Final = re.compile(r"W([2-8])A(16|8|4|FP8)_?(CH|G\d+)?(?:_(A?SYM))?")
_STATIC: Final = "_STATIC"


def parse_scheme(text: str) -> Preset:
    """The preset of that name or alias, whatever its case, with "-" for "_"; or the integers that a name such as
    W6A16_G64_ASYM spells out. Raises UnknownScheme with the nearest names, or with what a name needs that is not there.
    """
    name = text.strip().upper().replace("-", "_")
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    if scheme := _spelled_out(name):
        return Preset(scheme.name, scheme, f"{scheme.bits}-bit integers")
    if name.endswith(_STATIC):
        raise UnknownScheme(
            f"scheme {text!r}: scales of activations that calibration data give are offered for "
            f"{', '.join(p.name for p in PRESETS.values() if p.scheme.calibrated)}; or take {_without_data(name)}, "
            "whose activations get their scales while serving"
        )
    import difflib  # for who mistypes alone

    near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], n=3) or list(PRESETS)
    raise UnknownScheme(f"unknown scheme {text!r}: did you mean {', '.join(near)}? `shardq schemes` lists them all")


def _without_data(name: str) -> str:
    stem = name.removesuffix(_STATIC)
    return next((n for n in (f"{stem}_DYNAMIC", stem, ALIASES.get(stem, "")) if n in PRESETS), "FP8_DYNAMIC or W8A8")


def _spelled_out(name: str) -> Scheme | None:
    """The integers of W<bits>A<bits>[G<columns>|CH][-ASYM]; none with activations smaller than weights, nor zero points
    beside small activations: no library has those."""
    found = _INTEGERS.fullmatch(name.replace("-", "_"))
    if not found:
        return None
    bits, width, group, symmetry = found.groups()
    activation = _TOKENS[width]
    if activation and (symmetry == "ASYM" or int(bits) > ACTIVATIONS[activation].bits):
        return None
    size = 128 if group is None else WHOLE_ROW if group == "CH" else int(group[1:])
    return Scheme(f"int{bits}", size, symmetry != "ASYM", activation=activation)


def parse_name(name: str) -> Scheme:
    """The scheme whose `name` this is, as a ledger has it, before a layout has settled its numbers.

    Raises UnknownScheme.
    """
    for preset in PRESETS.values():
        if preset.scheme.name == name:
            return preset.scheme
    if scheme := BLOCKS.get(name) or _spelled_out(name):
        return scheme
    raise UnknownScheme(f"unknown scheme {name!r} in a ledger")


def change_scheme(
    scheme: Scheme,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
) -> Scheme:
    """`scheme` with the given fields replaced. Raises BadOption, BadGroupSize."""
    if bits is group_size is symmetric is None:
        return scheme
    if not scheme.is_adjustable:
        raise BadOption(
            f"{scheme.name} is as it is: bits, group size and symmetry can be chosen for W4A16 and the like"
        )
    if bits is not None and bits not in WIDTHS:
        raise BadOption(f"{bits} bits is not offered: expected one of {', '.join(map(str, WIDTHS))}")
    return replace(
        scheme,
        element=scheme.element if bits is None else f"int{bits}",
        group_size=scheme.group_size if group_size is None else group_size,
        symmetric=scheme.symmetric if symmetric is None else symmetric,
    )
