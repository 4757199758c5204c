"""Element formats: numbers only. Everything that can be derived is derived.

Sources: safetensors 0.8.0 for the tags and their order in a file, IEEE 754 for fp16/fp32, OCP FP8 and MX v1.0 for the
eight-bit and smaller floats.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class StorageType:
    """How one element of a tensor lies in a safetensors file."""

    tag: str  # the dtype string of the header
    bits: int  # bits of one element
    floating: bool  # a real number on its own; False for integers, booleans and bare exponents


# In the order by which the safetensors writer sorts tensors, low alignment first; a file has high alignment first.
STORAGE_TYPES: Final[tuple[StorageType, ...]] = (
    StorageType("BOOL", 8, False),
    StorageType("F4", 4, True),
    StorageType("F6_E2M3", 6, True),
    StorageType("F6_E3M2", 6, True),
    StorageType("U8", 8, False),
    StorageType("I8", 8, False),
    StorageType("F8_E5M2", 8, True),
    StorageType("F8_E4M3", 8, True),
    StorageType("F8_E8M0", 8, False),
    StorageType("F8_E4M3FNUZ", 8, True),
    StorageType("F8_E5M2FNUZ", 8, True),
    StorageType("I16", 16, False),
    StorageType("U16", 16, False),
    StorageType("F16", 16, True),
    StorageType("BF16", 16, True),
    StorageType("I32", 32, False),
    StorageType("U32", 32, False),
    StorageType("F32", 32, True),
    StorageType("C64", 64, False),
    StorageType("F64", 64, True),
    StorageType("I64", 64, False),
    StorageType("U64", 64, False),
)

STORAGE: Final[dict[str, StorageType]] = {t.tag: t for t in STORAGE_TYPES}
STORAGE_ORDER: Final[dict[str, int]] = {t.tag: i for i, t in enumerate(STORAGE_TYPES)}

# Full-precision weight dtypes that the kernels read.
WEIGHT_DTYPES: Final[tuple[str, ...]] = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class ElementFormat:
    """The numbers of one quantized or scale element."""

    name: str
    bits: int
    exponent_bits: int  # 0 for integers
    mantissa_bits: int  # 0 for integers
    max_value: float  # largest finite magnitude; for a signed integer the magnitude of the most negative code

    @property
    def is_integer(self) -> bool:
        """True for int2..int8."""
        return self.exponent_bits == self.mantissa_bits == 0


INTEGERS: Final[tuple[ElementFormat, ...]] = tuple(
    ElementFormat(f"int{b}", b, 0, 0, float(1 << (b - 1))) for b in range(2, 9)
)
FLOATS: Final[tuple[ElementFormat, ...]] = (
    ElementFormat("e0m3", 4, 0, 3, 1.75),  # MXINT4 of auto-round 0.16.1: a sign and 0 to 7 quarters
    ElementFormat("e2m1", 4, 2, 1, 6.0),
    ElementFormat("e2m3", 6, 2, 3, 7.5),
    ElementFormat("e4m3fn", 8, 4, 3, 448.0),
    ElementFormat("e5m2", 8, 5, 2, 57344.0),
    ElementFormat("e5m3", 8, 5, 3, 114688.0),  # no sign; for scales only, of auto-round 0.16.1
    ElementFormat("e8m0", 8, 8, 0, 2.0**127),
    ElementFormat("fp16", 16, 5, 10, 65504.0),
    ElementFormat("bf16", 16, 8, 7, 2.0**127 * (2 - 2.0**-7)),
    ElementFormat("fp32", 32, 8, 23, 2.0**127 * (2 - 2.0**-23)),
)
ELEMENTS: Final[dict[str, ElementFormat]] = {f.name: f for f in INTEGERS + FLOATS}
