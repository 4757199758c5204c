"""What every kernel set does, to the bit."""

from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["BF16", "F16", "F32"]
DTYPES: Final[tuple[Dtype, ...]] = ("BF16", "F16", "F32")

RawWeights = NDArray[np.uint16] | NDArray[np.float32]  # uint16 patterns for BF16 and F16, float32 for F32
Bytes = NDArray[np.uint8] | bytes | bytearray | memoryview


class KernelSet(Protocol):
    """The kernels of one instruction set.

    Arrays are C-contiguous and have the shape and dtype given; the caller allocates outputs, which must not overlap
    inputs. TypeError for what is no array; ValueError, naming the argument, for a wrong dtype, shape, layout or number,
    for no rows, and for no columns. A group is `group` consecutive columns of a row; the last one may be short, and a
    group wider than the row is the row. G is the number of groups of a row. Kernels are thread-safe and run without the
    GIL.
    """

    @property
    def name(self) -> str:
        """One of shardq.kernels.NAMES."""
        ...

    def widen(self, src: RawWeights, dtype: str, out: NDArray[np.float32]) -> None:
        """Raw weights [rows, cols] to fp32 [rows, cols], exactly; a NaN keeps its sign, payload and quiet bit."""
        ...

    def group_minmax(
        self, x: NDArray[np.float32], group: int, out_min: NDArray[np.float32], out_max: NDArray[np.float32]
    ) -> None:
        """Smallest and largest value per group of x [rows, cols], both [rows, G].

        NaN is passed over; a group of nothing but NaN gives +Inf and -Inf. A zero result is +0.
        """
        ...

    def rtn_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        symmetric: bool,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
    ) -> int:
        """Integer round-to-nearest of src [rows, cols] to codes [rows, cols], scales and zeros [rows, G], bits 2 to 8.

        w = scale * (code - zero). Source: auto-round 0.16.1, model-free, plain RTN. All arithmetic is fp32, RNE is
        rounding half to even, t = 1e-5 rounded to fp16, mx = max(0, largest w), mn = min(0, smallest w), and
        fp16() keeps its result as fp32.

        symmetric, h = 2^(bits-1):
            e = -mn if mx < -mn, else -mx: a positive extreme, and a tie, give a negative scale
            s = fp16(e / h); s = min(s, -t) if s < 0, else max(s, t), so that -0 becomes +t
            zero = h; code = clamp(RNE(w / s), -h, h - 1) + h
        asymmetric, top = 2^bits - 1:
            s = max(fp16((mx - mn) / top), t)
            zero = min(RNE(-mn / s), top); code = clamp(RNE(w / s) + zero, 0, top)
            auto-round stores this zero but adds the unclamped one to the codes; the two differ only where s is an fp16
            subnormal, and there its own output decodes shifted.

        Division is true division in effect. Returns the number of bad groups: those that hold NaN or infinity, or whose
        scale is beyond fp16. A bad group gets scale t and every code and zero 2^(bits-1), that is, decodes to zeros.
        """
        ...

    def rtn_error_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        symmetric: bool,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        stats: NDArray[np.float64],
    ) -> int:
        """rtn_int, then error_int on its codes: equal codes, scales, zeros, stats [rows, 3] and count, in one pass.

        A bad group decodes to zeros, so its weights are its differences: one NaN or infinity shows in its row's stats.
        """
        ...

    def pack_bits(self, codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint32]) -> None:
        """Codes [rows, n] to a bit stream per row, [rows, ceil(n * bits / 32)], bits 2 to 8.

        Code i takes bits i * bits and up, least significant first; bits of a code above `bits` are dropped; bits
        behind the last code are zero. The words hold the stream in little-endian order.
        """
        ...

    def unpack_bits(self, words: NDArray[np.uint32], bits: int, out: NDArray[np.uint8]) -> None:
        """The inverse of pack_bits: words [rows, ceil(n * bits / 32)] to codes [rows, n]."""
        ...

    def transpose_u32(self, src: NDArray[np.uint32], out: NDArray[np.uint32], row0: int) -> None:
        """out[:, row0 : row0 + rows] = src.T for src [rows, n] and out [n, R]; the rest of out stays as it is."""
        ...

    def pack_columns(self, codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint32], row0: int) -> None:
        """pack_bits, then transpose_u32 of its words: codes [rows, n] to columns row0 and up of out.

        out is [n * bits / 32, R], bits 2 to 8; n * bits must be a multiple of 32 (ValueError naming codes otherwise).
        The rest of out stays as it is.
        """
        ...

    def dequantize_int(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        group: int,
        out: NDArray[np.float32],
    ) -> None:
        """fp32 scale * (code - zero), rounded once: codes and out [rows, cols], scales and zeros [rows, G]."""
        ...

    def error_int(
        self,
        src: RawWeights,
        dtype: str,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        group: int,
        stats: NDArray[np.float64],
    ) -> None:
        """Per row: sum of (w - q)^2, sum of w^2, largest |w - q|, with q from dequantize_int; stats [rows, 3].

        Differences are fp32. Sums run over blocks of 128 columns, padded with zeros: the fp32 squares of columns 2i and
        2i + 1 are added, then of the 64 sums i + 32 to i, then i + 16 to i; the 16 sums go to 16 doubles, block by
        block, which are added in halves (i + 8 to i, and so on) at the end of the row. Blocks do not depend on the
        group. A NaN among the differences makes the first and the third figure NaN; fp32 squares beyond 3.4e38 make a
        sum infinite.
        """
        ...

    def narrow_columns(self, src: NDArray[np.float32], out: NDArray[np.uint16], row0: int) -> None:
        """out[:, row0 : row0 + rows] = src.T as fp16 patterns, src [rows, n], out [n, R]; the rest of out stays.

        Rounded to nearest, half to even; beyond fp16 infinity. A NaN keeps its sign and becomes 0x7e00.
        """
        ...

    def sum_errors(self, stats: NDArray[np.float64]) -> tuple[float, float, float]:
        """The figures of error_int over all rows of stats [rows, 3], no entry negative: both sums and the largest.

        The sums are rounded once, as those of math.fsum, so that they do not depend on how rows were cut; a sum beyond
        double is infinite. A NaN makes its figure NaN.
        """
        ...

    def checksum(self, data: Bytes) -> int:
        """A 64-bit digest of bytes [n], n >= 0, against torn and misplaced writes; not cryptographic.

        All numbers are unsigned 64-bit and wrap. There are 16 lanes; lane i starts as (i + 1) * 0x9e3779b97f4a7c15. The
        data, padded with zeros to a multiple of 128 bytes, is read as little-endian words; word j goes to lane j % 16:
            x = lane + word;  x = x ^ (x >> 29);  lane = x * 0x9e3779b97f4a7c15
        The digest starts as n; for each lane in order: d = (d ^ lane) * 0xff51afd7ed558ccd;  d = d ^ (d >> 32).
        Every step is a bijection, so data of equal length that differs within one 8-byte word has another digest for
        certain; any other change goes unseen with a chance of about 2^-64.
        """
        ...
