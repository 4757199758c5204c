"""Schemes: the numbers of a quantized weight, and the table of names that users know them by.

A scheme says nothing about bytes on disk; that is a layout's business. Names and fields follow auto-round 0.16.1, so
that a command line written for it means the same here.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from shardq.errors import BadGroupSize, BadOption, UnknownScheme
from shardq.formats import ELEMENTS, ElementFormat

WHOLE_ROW: Final = -1  # group size: all columns of a row share one scale ("per channel")
WEIGHT_TYPE: Final = "weight"  # a scale format: that of the weight itself
WIDTHS: Final = (2, 3, 4, 8)  # what --bits takes; the kernels know 2..8, no loader reads the others


Numbers = Literal["auto_round", "compressed_tensors", "mlx", "fp8"]
Exponent = Literal["", "floor", "even", "ceil"]
Reach = Literal["group", "tensor", "fused"]


@dataclass(frozen=True, slots=True)
class Activation:
    """What a server is told to do to a matrix' inputs. Nothing of it changes a weight."""

    name: str
    bits: int
    floating: bool
    group_size: int  # columns that share a scale, computed for each token while serving; WHOLE_ROW for all of a token
    scale: str  # format of these scales


ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        a.name: a
        for a in (
            Activation("int8", 8, False, WHOLE_ROW, "fp32"),
            Activation("fp8", 8, True, WHOLE_ROW, "fp32"),
            Activation("fp8-g128", 8, True, 128, "fp32"),
            Activation("mxfp4", 4, True, 32, "e8m0"),
            Activation("mxfp8", 8, True, 32, "e8m0"),
        )
    }
)
# Names of schemes with float elements, by element and by whether scales are powers of two.
_STEMS: Final[Mapping[tuple[str, bool], str]] = MappingProxyType(
    {
        ("e4m3fn", False): "FP8",
        ("e2m1", True): "MXFP4",
        ("e2m3", True): "MXFP6",
        ("e4m3fn", True): "MXFP8",
    }
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight matrix becomes codes and scales, and what a server does to activations."""

    element: str  # key of formats.ELEMENTS: the format of a code
    group_size: int  # columns that share a scale; WHOLE_ROW for the whole row
    symmetric: bool  # False: a zero point for each group
    scale: str = "fp16"  # the format a scale is rounded to before codes are taken: a key of ELEMENTS, or WEIGHT_TYPE
    search: Literal["none"] = "none"  # how the scale is chosen: "none" is plain round-to-nearest on min and max
    numbers: Numbers = "auto_round"  # whose arithmetic; the layout decides
    group_rows: int = 1  # rows that share a scale
    exponent: Exponent = ""  # how a scale that is a power of two is rounded; empty where scales are none
    reach: Reach = "group"  # whose largest magnitude must be known before the first code: the group's, the whole
    # tensor's, or that of all matrices which a server runs as one
    activation: str = ""  # key of ACTIVATIONS: what the config declares; empty: left in 16 bits

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
        return self.format.is_integer and not self.activation

    @property
    def name(self) -> str:
        """Canonical name, which with a layout says all: W4A16 (group 128), W4A16G32, W8A16CH (whole row), -ASYM where
        asymmetric; FP8, MXFP4, ... with A16 behind it where activations stay."""
        if self.format.is_integer:
            width = ACTIVATIONS[self.activation].bits if self.activation else 16
            group = {128: "", WHOLE_ROW: "CH"}.get(self.group_size, f"G{self.group_size}")
            return f"W{self.bits}A{width}{group}{'' if self.symmetric else '-ASYM'}"
        stem = _STEMS.get((self.element, self.scale == "e8m0"), self.element.upper())
        shape = "-BLOCK" if self.group_rows > 1 else ""
        return f"{stem}{'' if self.activation else 'A16'}{shape}"

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


def _int_preset(bits: int, group_size: int = 128) -> Preset:
    scheme = Scheme(f"int{bits}", group_size, symmetric=True)
    return Preset(scheme.name, scheme, f"{bits}-bit integers, one scale for {group_size} columns")


def _mx_preset(element: str, activation: str, summary: str) -> Preset:
    scheme = Scheme(element, 32, symmetric=True, scale="e8m0", exponent="even", activation=activation)
    return Preset(scheme.name, scheme, summary)


_FP8: Final = Scheme("e4m3fn", WHOLE_ROW, symmetric=True, scale=WEIGHT_TYPE, activation="fp8")

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        p.name: p
        for p in (
            _int_preset(2),
            _int_preset(2, 32),
            _int_preset(2, 64),
            _int_preset(3),
            _int_preset(4),
            _int_preset(4, 32),
            _int_preset(4, 64),
            _int_preset(8),
            _int_preset(8, 32),
            _int_preset(8, 64),
            Preset(
                "W4A16_ASYM", Scheme("int4", 128, symmetric=False), "4-bit integers with zero points, for 128 columns"
            ),
            Preset(
                "W4A16_MIXED",
                Scheme("int8", 128, symmetric=True),
                "8-bit integers, with 4 bits for routed experts (auto-round's mixture)",
                ((r"re:.*\.(experts|moe)\.", 4),),
            ),
            Preset(
                "W8A8",
                Scheme("int8", WHOLE_ROW, symmetric=True, activation="int8"),
                "8-bit integers, one scale for a row; activations to 8 bits while serving",
            ),
            Preset("FP8_DYNAMIC", _FP8, "8-bit floats, one scale for a row; activations to 8 bits while serving"),
            Preset("FPW8A16", replace(_FP8, activation=""), "8-bit floats, one scale for a row"),
            Preset(
                "FP8_BLOCK",
                replace(_FP8, group_size=128, group_rows=128, activation="fp8-g128"),
                "8-bit floats, one scale for 128 rows and columns; activations to 8 bits while serving",
            ),
            _mx_preset("e2m1", "mxfp4", "4-bit floats, a power of two for 32 columns; activations alike"),
            _mx_preset("e2m1", "", "4-bit floats, a power of two for 32 columns"),
            _mx_preset("e4m3fn", "mxfp8", "8-bit floats, a power of two for 32 columns; activations alike"),
            _mx_preset("e4m3fn", "", "8-bit floats, a power of two for 32 columns"),
            _mx_preset("e2m3", "", "6-bit floats, a power of two for 32 columns"),
        )
    }
)
# Names that other tools use, to ours.
ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {"INT8": "W8A8", "INT8_W8A8": "W8A8", "FP8": "FP8_DYNAMIC", "FP8A16": "FPW8A16", "MXFP6": "MXFP6A16"}
)


def parse_scheme(text: str) -> Preset:
    """The preset of that name or alias, whatever its case, with "-" for "_". Raises UnknownScheme with the nearest
    names."""
    name = text.strip().upper().replace("-", "_")
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], n=3) or list(PRESETS)
    raise UnknownScheme(f"unknown scheme {text!r}: did you mean {', '.join(near)}? `shardq schemes` lists them all")


def parse_name(name: str) -> Scheme:
    """The scheme whose `name` this is, as a ledger has it, before a layout has settled its numbers.

    Raises UnknownScheme.
    """
    for preset in PRESETS.values():
        if preset.scheme.name == name:
            return preset.scheme
    found = re.fullmatch(r"W(\d)A16(CH|G\d+)?(-ASYM)?", name)
    if not found:
        raise UnknownScheme(f"unknown scheme {name!r} in a ledger")
    bits, group, asym = found.groups()
    size = 128 if group is None else WHOLE_ROW if group == "CH" else int(group[1:])
    return Scheme(f"int{bits}", size, symmetric=asym is None)


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
