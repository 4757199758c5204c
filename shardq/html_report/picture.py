"""The heat map of errors as a small PNG, for the model card: the same bytes on every machine, so nothing is compressed.

Source: the PNG specification, third edition (chunks, palette, filter 0), and RFC 1950 and 1951 (stored blocks).
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Final

from shardq.html_report.grid import Grid
from shardq.html_report.shades import STEPS, Shades, find_shades

PICTURE: Final = "shardq-errors.png"
SIDE: Final = 8  # pixels of a cell, with a gap of one
DEPTH: Final = 4  # bits of a pixel
BLOCK_BYTES: Final = 65535  # of a stored block, at most
BACK: Final = 0  # of the palette: gaps, and places without a cell
KEPT: Final = 1
# Shades of style.css, on a grey that neither a light nor a dark page hides.
PALETTE: Final = (
    "808891", "a9b0b8",
    "e8f1fa", "cfe2f3", "b0cfea", "8cb8de", "669dce", "4682bb", "2e67a2", "1d4d83", "103560",
)  # fmt: skip


def draw_picture(grid: Grid, shades: Shades) -> bytes:
    """Layers from left to right, modules from top to bottom those of `Grid.measured`."""
    width = len(grid.layers) * SIDE + 1
    lines: list[bytes] = []
    gap = _line([BACK] * width)
    for module in grid.measured:
        colours = [BACK]
        for layer in grid.layers:
            cell = grid.cells.get((layer, module))
            error = cell.relative_error if cell else None
            colour = BACK if cell is None else KEPT if error is None else KEPT + 1 + shades.step(error)
            colours += [colour] * (SIDE - 1) + [BACK]
        lines += [gap, *[_line(colours)] * (SIDE - 1)]
    lines.append(gap)
    header = struct.pack(">IIBBBBB", width, len(lines), DEPTH, 3, 0, 0, 0)
    assert len(PALETTE) == KEPT + 1 + STEPS
    chunks = ((b"IHDR", header), (b"PLTE", bytes.fromhex("".join(PALETTE))), (b"IDAT", _stored(b"".join(lines))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in (*chunks, (b"IEND", b"")))


def main_grid(grids: Sequence[Grid]) -> tuple[Grid, Shades] | None:
    """The one with the most that is quantized; None where nothing has an error."""
    shades = find_shades(grids)
    if shades is None:
        return None
    return max(grids, key=lambda g: sum(c.relative_error is not None for c in g.cells.values())), shades


def _line(colours: Sequence[int]) -> bytes:
    """A row of pixels, two in a byte, behind its filter."""
    padded = [*colours, *[BACK] * (len(colours) % 2)]
    return bytes([0, *(a << DEPTH | b for a, b in zip(padded[::2], padded[1::2], strict=True))])


def _stored(data: bytes) -> bytes:
    return b"\x78\x01" + b"".join(_blocks(data)) + struct.pack(">I", zlib.adler32(data))


def _blocks(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), BLOCK_BYTES):
        part = data[at : at + BLOCK_BYTES]
        is_last = at + BLOCK_BYTES >= len(data)
        yield struct.pack("<BHH", is_last, len(part), len(part) ^ 0xFFFF) + part


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
