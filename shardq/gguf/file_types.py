"""The file types of llama.cpp that shardq writes: what users name, and the number and element type behind a name.

Source: llama.cpp as in llama-cpp-python 0.3.36, `enum llama_ftype` and `llama_ftype_get_default_type`; the names are
those of its tool llama-quantize.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class FileType:
    """One file type: an element type, and by mixtures.py which tensors get another one."""

    name: str
    number: int  # `general.file_type`
    base: str  # element type of ggml.py
    summary: str


FILE_TYPES: Final[tuple[FileType, ...]] = (
    FileType("Q4_0", 2, "Q4_0", "4 bits, a scale for 32 weights"),
    FileType("Q4_1", 3, "Q4_1", "4 bits, a scale and a minimum for 32 weights"),
    FileType("Q5_0", 8, "Q5_0", "5 bits, a scale for 32 weights"),
    FileType("Q5_1", 9, "Q5_1", "5 bits, a scale and a minimum for 32 weights"),
    FileType("Q8_0", 7, "Q8_0", "8 bits, a scale for 32 weights"),
    FileType("Q2_K", 10, "Q2_K", "2 bits; attention's values and output, and down projections 3 or 4"),
    FileType("Q2_K_S", 21, "Q2_K", "2 bits; 4 for the first down projections, and values that many heads share"),
    FileType("Q3_K_S", 11, "Q3_K", "3 bits"),
    FileType("Q3_K_M", 12, "Q3_K", "3 bits; attention's values and output, and down projections 4 or 5"),
    FileType("Q3_K_L", 13, "Q3_K", "3 bits; attention's values and output, and down projections 5"),
    FileType("Q4_K_S", 14, "Q4_K", "4 bits; 5 for the values and down projections of the first blocks"),
    FileType("Q4_K_M", 15, "Q4_K", "4 bits; 6 for half of the values and down projections"),
    FileType("Q5_K_S", 16, "Q5_K", "5 bits"),
    FileType("Q5_K_M", 17, "Q5_K", "5 bits; 6 for half of the values and down projections"),
    FileType("Q6_K", 18, "Q6_K", "6 bits"),
    FileType("IQ4_NL", 25, "IQ4_NL", "4 bits that mean values of a table, a scale for 32 weights"),
    FileType("IQ4_XS", 30, "IQ4_XS", "4 bits that mean values of a table, scales of 6 bits in blocks of 256"),
    FileType("TQ1_0", 36, "TQ1_0", "three values, five to a byte; for models that were trained so"),
    FileType("TQ2_0", 37, "TQ2_0", "three values in 2 bits; for models that were trained so"),
    FileType("MXFP4_MOE", 38, "MXFP4", "MXFP4 for experts, 8 bits for all else"),
    FileType("F16", 1, "F16", "fp16; norms and other vectors fp32"),
    FileType("BF16", 32, "BF16", "bf16; norms and other vectors fp32"),
    FileType("F32", 0, "F32", "fp32"),
)
# Numbers of file types that are not written here: gguf 0.19.0 (`LlamaFileType`), and llama.cpp for the last.
OTHERS: Final = {
    19: "IQ2_XXS", 20: "IQ2_XS", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 31: "IQ1_M", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
ALIASES: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's
PREFIX: Final = "GGUF:"

_BY_NAME: Final = {kind.name: kind for kind in FILE_TYPES}


def find_file_type(text: str) -> FileType | None:
    """The file type of a name or alias, whatever its case, with or without `gguf:`, with - or _; None for others."""
    name = text.upper().removeprefix(PREFIX).replace("-", "_")
    return _BY_NAME.get(ALIASES.get(name, name))


def name_file_type(number: object) -> str | None:
    """The name of `general.file_type`'s value, also of those that are not written here; None for others."""
    known = OTHERS | {kind.number: kind.name for kind in FILE_TYPES}
    return known.get(number) if isinstance(number, int) else None
