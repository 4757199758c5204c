"""What the kernels of ggml's block formats do, to the byte."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shardq.kernels.raw import RawWeights


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A block of columns of one row, with its scales and codes."""

    cols: int
    size_bytes: int


BLOCK_FORMATS: Final[Mapping[str, BlockFormat]] = MappingProxyType(
    {
        "Q4_0": BlockFormat(32, 18),
        "Q4_1": BlockFormat(32, 20),
        "Q5_0": BlockFormat(32, 22),
        "Q5_1": BlockFormat(32, 24),
        "Q8_0": BlockFormat(32, 34),
        "Q2_K": BlockFormat(256, 84),
        "Q3_K": BlockFormat(256, 110),
        "Q4_K": BlockFormat(256, 144),
        "Q5_K": BlockFormat(256, 176),
        "Q6_K": BlockFormat(256, 210),
        "IQ4_NL": BlockFormat(32, 18),
        "IQ4_XS": BlockFormat(256, 136),
        "TQ1_0": BlockFormat(256, 54),
        "TQ2_0": BlockFormat(256, 66),
        "MXFP4": BlockFormat(32, 17),
    }
)


class BlockKernels(Protocol):
    """Weights to blocks of ggml and back, and the error. Source of the formulas of blocks: ggml 0.25.3 (ggml-quants.c,
    in llama-cpp-python 0.3.36), whose x86-64 builds, which never fuse operations, make the same bytes.

    Arithmetic is fp32, every operation is rounded once, and a product or sum of three goes from left to right. Sums
    start at 0 and run in the order of the columns. Subnormal numbers are numbers, whatever the thread's mode is.

        half(x)   x as fp16, half to even; beyond fp16 infinity
        near(x)   the integer next to x, half to even, from -4194304 to 4194303, beyond which it wraps; 0 for a NaN
        byte(n)   the low eight bits of the integer n
        hold(n, a, b)   n, but not below a or above b
        leader    the first number of largest magnitude, with its sign; 0 of none
        1/d       of 0 it is 0, where it is written inv(d)

    Nibbles of 32 columns: byte j has the codes of column j (low) and j + 16. Pairs of 256 columns: byte 32 h + l has,
    from the low bits up, two bits each of columns 128 h + l, + 32, + 64 and + 96. fp16 numbers are little-endian.
    """

    def quantize_blocks(
        self,
        src: RawWeights,
        dtype: str,
        block_type: str,
        importance: NDArray[np.float32] | None,
        out: NDArray[np.uint8],
    ) -> int:
        """Weights [rows, cols] to blocks [rows, cols / block * bytes] of `block_type`, a name of BLOCK_FORMATS.

        `importance` [cols], finite and from 0 up, is what llama.cpp calls an importance matrix; None is not the same
        as equal numbers. Returns the number of bad blocks, which are all zero bytes and so decode to zeros: those that
        hold NaN or infinity, and those with a scale that is not finite in fp16. llama.cpp refuses to write such a file.

        Without importance. amax is the largest magnitude.
            Q4_0, h = 8, and Q5_0, h = 16: d = leader / -h; code = trunc(x * inv(d) + (h + 0.5)), at most 2h - 1
            Q4_1, top = 15, and Q5_1, top = 31: m = smallest; d = (largest - m) / top;
                code = trunc((x - m) * inv(d) + 0.5), at most top. Of equal zeros the first is m.
            Q8_0: d = amax / 127; code = round(x * inv(d)), half away from zero
                In these five the d that divides is not the rounded one; an infinite 1/d makes all codes 0.
            TQ1_0, TQ2_0: d = amax; trit = round(x * inv(d)) + 1, half away from zero; infinite 1/d: 1
            MXFP4: e = floor(log2(amax)) + 125, log2 rounded to fp32 first, as a byte, 0 for amax = 0; the element of
                0, 1, 2, 3, 4, 6, 8, 12 times 2^(e - 128) next to |x|, of two the smaller, none that is infinite; the
                sign of what is not 0
            Q4_K, top = 15, and Q5_K, top = 31: line(x, w) of 32 columns each, w = sqrt(sum x^2 / 32) + |x|, with
                squares, steps -1 + 0.1 i, i = 0..20, and -0.5 + 0.1 i, i = 0..15; S, M the largest scale and minimum,
                or 0: d = half(S / 63), code = min(byte(near((63 / S) * scale)), 63), 0 for S = 0; likewise minima by M
            Q2_K, top = 3: line(x, w) of 16 columns each, w = |x|, with magnitudes, -0.5 + 0.1 i, i = 0..15;
                as Q4_K with 15 for 63, and nothing is held
            Q6_K: ray(x, w, 32) of 16 columns each, w = x^2. S = leader of the scales; |S| < 1e-15: all bytes 0.
                d = half(1 / (-128 / S)); code of a scale = min(near((-128 / S) * scale), 127)
            Q3_K: descent(x, 4) of 16 columns each; d = half(1 / (-32 / S)), S the leader of the scales; code of a
                scale = hold(near((-32 / S) * scale) as a signed byte, -32, 31) + 32; S = 0: all are 0, and so is d
            IQ4_NL, IQ4_XS: table(x, w) of 32 columns each, w = x^2. NL: d = scale, index of x * inv(d). XS:
                d = -S / 32, S the leader of the scales; l = hold(near(inv(d) * scale), -32, 31); index of
                x * inv(d * l). d is rounded to fp16 only where it is stored.
            With d and m as stored, of Q2_K, Q4_K, Q5_K: code = hold(near((x + m * minimum) / (d * scale)), 0, top); of
            Q3_K and Q6_K: hold(near(x / (d * scale)), -h, h - 1) + h; where d * scale is 0 the codes of the search.

        With importance v; Q8_0, TQ1_0, TQ2_0 and MXFP4 ignore it.
            w = v * sqrt(q + x^2), q: Q4_0 to Q5_1 sum x^2 / cols of the row, Q2_K sum x^2 / 256, Q3_K, Q4_K, Q5_K
            2 * sum x^2 / 256, both of the block, IQ4_NL and IQ4_XS sum x^2 * (2 / block); Q6_K: w = v. In the mean of a
            row the blocks with NaN or infinity count as zeros.
            Q4_0, Q5_0: d and the codes of ray(x, w, h). Q4_1, Q5_1, Q2_K, Q4_K, Q5_K: line with squares,
            -0.9 + 0.05 i, i = 0..36, whose scale, low and codes are those of Q4_1 and Q5_1. For the others W is the sum
            of w of a sub-block: d and codes of scales by plus(scale, W, top), top 15 or 63, likewise minima. Q3_K:
            ray(x, w, 4), d and codes of scales by ray(scale, W, 32).

        line(x, w): low = min(smallest, 0); largest = low: scale 0, codes 0. inverse = top / (largest - low);
            scale = 1 / inverse; code = hold(near(inverse * (x - low)), 0, top);
            error = sum w * e(scale * code + low - x), e a square or a magnitude. For each step t, with the low found so
            far: inverse = (t + top) / (largest - low); codes; with sums over w, w*x, w*c, w*c*c, w*c*x:
            D = w * wcc - wc * wc; if D > 0: scale = (w * wcx - wx * wc) / D; low = (wcc * wx - wc * wcx) / D;
            if low > 0: low = 0, scale = wcx / wcc; kept if the error is smaller. The minimum is -low.
        ray(x, w, h): |leader| < 1e-15: scale and codes 0. inverse = -h / leader, then -(h + 0.1 i) / leader, i = -9..9
            but 0; c = hold(near(inverse * x), -h, h - 1); A = sum w*x*c; B = sum w*c*c; the first gives scale = A / B
            (0 for B = 0), best = scale * A; another one if B > 0 and A * A > best * B. Its codes are c + h.
        descent(x, h): the first c, A and B of ray with w = x^2; up to five passes, until one changes nothing: for each
            column in order a = A - w*x*c; if a > 0: b = B - w*c*c; n = hold(near(x * b / a), -h, h - 1); if n is not c:
            a += w*x*n; b += w*n*n; if b > 0 and a*a*B > A*A*b: c = n, A = a, B = b. scale = A / B, 0 for B <= 0.
        table(x, w): values -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113; index of v: the nearest, of two
            the upper, 15 for a NaN. |leader| < 1e-15: scale 0. y = value next to x * (1 / (-leader / -127));
            A = sum w*y*x; B = sum w*y*y; scale = A / B (0 for B <= 0), best = scale * A; then of
            x * ((i - 127) / leader), i = -7..7, if B > 0 and A * A > best * B.
        plus(x, w, top): largest < 1e-15: 0. inverse = top / largest; error = sum w*e*e, e = x - (1 / inverse) *
            byte(near(inverse * x)); the inverse (0.1 i + top) / largest, i = -4..4 but 0, with codes at most top, if
            its error is smaller; then c = min(near(inverse * x), top), A and B as in ray, and passes as in descent with
            n at most top, that ask for a > 0 and b > 0 before and a * a * B > A * A * b.

        Bytes: Q4_0 half(d), nibbles. Q4_1 half(d), half(m), nibbles. Q5_0, Q5_1 the same with four bytes of fifth bits
        before the nibbles. Q8_0 half(d), codes. Q2_K 16 bytes scale | minimum << 4, pairs, d, m. Q3_K 32 bytes with bit
        k of byte l the third bit of column 32 k + l, pairs, 12 bytes of scales (low four bits of scales j and j + 8 in
        byte j, the high two of scale j in byte 8 + j % 4 from bit 2 (j / 4) up), d. Q4_K d, m, 12 bytes (0-3: scales
        0-3 | high two bits of scales 4-7 << 6; 4-7: minima likewise; 8-11: low four bits of scales and minima 4-7),
        four times 32 bytes with columns 64 p + l and 64 p + 32 + l. Q5_K the same with 32 bytes before the codes, bit
        j of byte l the fifth of column 32 j + l. Q6_K per half of 128 columns 64 bytes of low nibbles of l and l + 64;
        pairs of the high two bits; 16 scales; d. IQ4_NL d, nibbles. IQ4_XS d, 16 bits of high pairs of l + 32, 4 bytes
        of their low nibbles, eight times nibbles. TQ1_0: five trits a byte, the first the most significant, number n
        as ceil(n * 256 / 243): 32 bytes of columns l + 32 i, 16 of 160 + l + 16 i, 4 of 240 + l + 4 i (i < 4, then 0);
        d. TQ2_0: pairs, d. MXFP4: e, nibbles.
        """
        ...

    def dequantize_blocks(self, blocks: NDArray[np.uint8], block_type: str, out: NDArray[np.float32]) -> None:
        """Blocks [rows, blocks * bytes] to fp32 [rows, blocks * columns], as ggml's dequantize_row functions.

        Q4_0, Q5_0: (code - h) * d. Q4_1, Q5_1: code * d + m. Q8_0: code * d. TQ: (trit - 1) * d.
            Q2_K, Q4_K, Q5_K: (d * scale) * code - m * minimum. Q3_K, Q6_K: (d * scale) * (code - h).
            IQ4_NL: d * value. IQ4_XS: (d * l) * value. MXFP4: value * 2^(e - 128).
        """
        ...

    def error_values(
        self, src: RawWeights, dtype: str, values: NDArray[np.float32], group: int, stats: NDArray[np.float64]
    ) -> None:
        """The figures of error_int, to stats [rows, 6], with q = values [rows, cols] and w - q rounded once. None is
        at an end of its range: that figure is 0. Zeroed groups are `group` consecutive columns, the last of a row may
        be short, whose values are all 0 although some weight is not. NaN and infinity count as in error_int.
        """
        ...
