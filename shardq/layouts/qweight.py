"""The tensors of the GPTQ family: qweight, qzeros, scales, and g_idx where the loader wants it.

Facts (GPTQModel 7.7.0 `pack_original`, auto-round 0.16.1 `qlinear_torch[_zp]`): qweight int32 [columns*bits/32, rows]
holds, for each output row of the weight, the codes along its columns as one little-endian bit stream, least significant
bit first; qzeros int32 [G, rows*bits/32] is the same stream along the rows; scales fp16 [G, rows]; g_idx int32
[columns].

Readers of version 1 add one to every stored zero point, so it holds `zero - 1`, and cannot hold a zero point of 0; it
is what most readers know. Version 2 holds the zero point itself. One configuration names one version.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from shardq.layouts.base import OutSpec, Refusal
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

LANES: Final = 32  # rows and columns must be multiples: the loaders size qweight and qzeros by whole words


def settle_integers(scheme: Scheme) -> Scheme:
    """See Layout.settle: weight-only integers in auto-round's arithmetic, with scales of fp16."""
    return replace(scheme, numbers="auto_round", scale="fp16") if scheme.is_adjustable else scheme


@dataclass(frozen=True, slots=True)
class QweightTensors:
    """The tensors of one member of the family; methods as in Layout."""

    widths: tuple[int, ...]  # bits that its readers know
    symmetries: tuple[bool, ...]  # those of the schemes that it holds
    subtracted: int  # taken from a zero point before it is stored: 1 or 0
    g_idx: bool = False  # the loader wants the group of each column

    def refuse(self, scheme: Scheme, rows: int, columns: int) -> Refusal | None:
        """Why it cannot hold a [rows, columns] weight under `scheme`, or None."""
        if not scheme.is_adjustable or scheme.bits not in self.widths or scheme.symmetric not in self.symmetries:
            kinds = " and ".join("symmetric" if s else "asymmetric" for s in self.symmetries)
            widths = ", ".join(map(str, self.widths))
            what = f"{kinds} integer weights of {widths} bits beside 16-bit activations"
            return Refusal(f"holds {what}, not {scheme.element} ({scheme.name})", ragged=False)
        if scheme.group_rows != 1 or scheme.scale != "fp16":
            return Refusal(f"has fp16 scales of single rows, not those of {scheme.name}", ragged=False)
        if rows % LANES or columns % LANES:
            return Refusal(f"needs rows and columns to be multiples of {LANES}", ragged=False)
        if columns % scheme.group_columns(columns) or scheme.group_size > columns:
            return Refusal(f"group size {scheme.group_size} does not divide {columns} columns", ragged=True)
        return None

    def outputs(self, scheme: Scheme, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """Scales are fp16 whatever the weight is."""
        groups = scheme.groups(columns)
        specs = (
            OutSpec("qweight", "I32", (columns * scheme.bits // 32, rows), slab_axis=1),
            OutSpec("qzeros", "I32", (groups, rows * scheme.bits // 32), slab_axis=1, per_rows=(scheme.bits, 32)),
            OutSpec("scales", "F16", (groups, rows), slab_axis=1),
        )
        return (*specs, OutSpec("g_idx", "I32", (columns,), slab_axis=None)) if self.g_idx else specs

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """The rows of `part` are a multiple of 32."""
        import numpy as np

        rows, columns = part.codes.shape
        bits = scheme.bits
        kernels.pack_columns(part.codes, bits, out["qweight"].view(np.uint32), row)
        kernels.narrow_columns(part.scales, out["scales"].view(np.uint16), row)
        if not scheme.symmetric:
            assert part.zeros is not None
            packed = np.empty((part.zeros.shape[1], rows * bits // 32), np.uint32)
            kernels.pack_bits(np.ascontiguousarray(part.zeros.T), bits, packed)
            first = row * bits // 32
            out["qzeros"].view(np.uint32)[:, first : first + packed.shape[1]] = packed
        if row == 0:
            self._write_constants(out, scheme, columns, kernels)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """The inverse of pack, for whole tensors."""
        import numpy as np

        from shardq.quantizers.quantized import Quantized

        qweight, qzeros, scales = (arrays[k] for k in ("qweight", "qzeros", "scales"))
        rows, groups = scales.shape[1], scales.shape[0]
        codes = np.empty((rows, qweight.shape[0] * 32 // scheme.bits), np.uint8)
        kernels.unpack_bits(np.ascontiguousarray(qweight.view(np.uint32).T), scheme.bits, codes)
        zeros = np.empty((groups, rows), np.uint8)
        kernels.unpack_bits(np.ascontiguousarray(qzeros.view(np.uint32)), scheme.bits, zeros)
        added = (zeros.T + self.subtracted) & ((1 << scheme.bits) - 1)  # readers wrap at the width
        return Quantized(
            codes, np.ascontiguousarray(scales.T.astype(np.float32)), np.ascontiguousarray(added.astype(np.uint8))
        )

    def _write_constants(self, out: "Arrays", scheme: Scheme, columns: int, kernels: "KernelSet") -> None:
        """What no weight decides, for the whole slab at once: symmetric zero points, and g_idx where it is wanted."""
        import numpy as np

        if scheme.symmetric:
            lanes = np.full((1, LANES), (1 << (scheme.bits - 1)) - self.subtracted, np.uint8)
            pattern = np.empty((1, scheme.bits), np.uint32)
            kernels.pack_bits(lanes, scheme.bits, pattern)
            zeros = out["qzeros"].view(np.uint32)
            zeros.reshape(zeros.shape[0], -1, scheme.bits)[:] = pattern
        if "g_idx" in out and out["g_idx"].size:
            out["g_idx"][:] = np.arange(columns) // scheme.group_columns(columns)
