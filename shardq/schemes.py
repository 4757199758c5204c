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
WIDTHS: Final = (2, 3, 4, 8)  # what --bits takes; the kernels know 2..8, no loader reads the others


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight matrix becomes codes and scales."""

    element: str  # key of formats.ELEMENTS: the format of a code
    group_size: int  # columns that share a scale; WHOLE_ROW for the whole row
    symmetric: bool  # True: signed scale and a fixed zero point; False: a zero point for each group
    scale: str = "fp16"  # key of formats.ELEMENTS: the format a scale is rounded to before codes are taken
    search: Literal["none"] = "none"  # how the scale is chosen: "none" is plain round-to-nearest on min and max

    def __post_init__(self) -> None:
        """Refuse what no kernel can do. Raises BadOption, BadGroupSize."""
        if self.element not in ELEMENTS or self.scale not in ELEMENTS:
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
    def name(self) -> str:
        """Canonical name: W4A16 (group 128), W4A16G32, W8A16CH (whole row), with -ASYM where asymmetric."""
        group = {128: "", WHOLE_ROW: "CH"}.get(self.group_size, f"G{self.group_size}")
        return f"W{self.bits}A16{group}{'' if self.symmetric else '-ASYM'}"

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
    return Preset(scheme.name, scheme, f"{bits}-bit integers, one fp16 scale for {group_size} columns")


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
                "W4A16_MIXED",
                Scheme("int8", 128, symmetric=True),
                "8-bit integers, with 4 bits for routed experts (auto-round's mixture)",
                ((r"re:.*\.(experts|moe)\.", 4),),
            ),
        )
    }
)


def parse_scheme(text: str) -> Preset:
    """The preset of that name, whatever its case, with "-" for "_". Raises UnknownScheme with the nearest names."""
    name = text.strip().upper().replace("-", "_")
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3) or list(PRESETS)
    raise UnknownScheme(f"unknown scheme {text!r}: did you mean {', '.join(near)}? `shardq schemes` lists them all")


def parse_name(name: str) -> Scheme:
    """The scheme whose `name` this is, as a ledger has it. Raises UnknownScheme."""
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
    if bits is not None and bits not in WIDTHS:
        raise BadOption(f"{bits} bits is not offered: expected one of {', '.join(map(str, WIDTHS))}")
    return replace(
        scheme,
        element=scheme.element if bits is None else f"int{bits}",
        group_size=scheme.group_size if group_size is None else group_size,
        symmetric=scheme.symmetric if symmetric is None else symmetric,
    )
