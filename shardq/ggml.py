"""The element types of ggml as GGUF files store them: ids, and how many weights lie in how many bytes.

Sources: gguf 0.19.0 (`GGMLQuantizationType`, `GGML_QUANT_SIZES`); Q2_0, which that release does not know yet, is from
ggml 0.25.3. Types that exist only while ggml multiplies (Q8_1, Q8_K), and those it has withdrawn, are not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from shardq.errors import LayoutRefuses


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One element type. A row is packed by itself: consecutive weights of one row share a block."""

    name: str
    id: int  # in the file
    block_weights: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, its share of the scales included."""
        return 8 * self.block_bytes / self.block_weights


GGML_TYPES: Final[tuple[GgmlType, ...]] = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
    GgmlType("Q2_0", 42, 64, 18),
)

GGML: Final[dict[str, GgmlType]] = {t.name: t for t in GGML_TYPES}
GGML_BY_ID: Final[dict[int, GgmlType]] = {t.id: t for t in GGML_TYPES}


def row_bytes(kind: GgmlType, columns: int) -> int:
    """Bytes of one row. Raises LayoutRefuses when it is not a whole number of blocks."""
    if columns % kind.block_weights:
        raise LayoutRefuses(
            f"rows of {columns} weights cannot be {kind.name}: expected a multiple of its block of "
            f"{kind.block_weights}; choose a type with smaller blocks for them"
        )
    return columns // kind.block_weights * kind.block_bytes


def tensor_bytes(kind: GgmlType, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` in GGUF's order, the row length first; () is one weight, a dimension 0 none.

    Raises LayoutRefuses for rows that are not a whole number of blocks.
    """
    columns, *rows = shape or (1,)
    return row_bytes(kind, columns) * prod(rows)
