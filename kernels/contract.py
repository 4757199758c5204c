"""What every kernel set does, to the bit."""

from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from shardq.kernels.contract_blocks import BlockKernels
from shardq.kernels.contract_centering import CenteringKernels
from shardq.kernels.raw import Bytes, RawWeights

Dtype = Literal["BF16", "F16", "F32"]
DTYPES: Final[tuple[Dtype, ...]] = ("BF16", "F16", "F32")

Element = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "e0m3", "e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2"
]  # fmt: skip
ELEMENTS: Final[tuple[Element, ...]] = get_args(Element)
EncodingRule = Literal["round_add", "add_round", "subtract"]
ENCODING_RULES: Final[tuple[EncodingRule, ...]] = get_args(EncodingRule)
DecodingRule = Literal["zero", "bias"]
DECODING_RULES: Final[tuple[DecodingRule, ...]] = get_args(DecodingRule)
Objective = Literal["none", "square", "root"]
OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)
Signs = Literal["range", "both", "positive"]
SIGNS: Final[tuple[Signs, ...]] = get_args(Signs)
ScaleFormat = Literal["fp16", "bf16", "fp32"]
SCALE_FORMATS: Final[tuple[ScaleFormat, ...]] = get_args(ScaleFormat)

FIGURES: Final = 6  # of each row: what error_int writes


class KernelSet(BlockKernels, CenteringKernels, Protocol):
    """The kernels of one instruction set; those of ggml's blocks are in contract_blocks.py, and one that
    follows search_int in contract_centering.py.

    Arrays are C-contiguous and have the shape and dtype given; the caller allocates outputs, which must not overlap
    inputs. TypeError for what is no array; ValueError, naming the argument, for a wrong dtype, shape, layout or number,
    for no rows, and for no columns. A group is `group` consecutive columns of a row; the last one may be short, and a
    group wider than the row is the row. G is the number of groups of a row. Kernels are thread-safe and run without the
    GIL.

    Scaled codes hold one element of a symmetric scheme each, with one scale per group. Element `intb`, b from 2 to 8,
    has the values -2^(b-1) to 2^(b-1) - 1, and its code is the value plus 2^(b-1). The others are floats of the OCP
    formats, named by the bits of exponent and significand; the code is their bit pattern, sign on top, in the low bits
    of the byte: e2m1 (largest value 6), e2m3 (7.5), e3m2 (28), e4m3fn (448, no infinity), e5m2 (57344). e0m3 is
    MXINT4 of auto-round 0.16.1: a sign and 0 to 7 quarters, no exponent. Affine codes are plain numbers with one scale
    and one fp32 offset per group.

    Encoders and decoders take scales as they are: NaN, infinite and negative ones follow the formulas, and no sum or
    product is wider than fp32. Which NaN a result is, is not specified.
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
        """rtn_int, then error_int on its codes: equal codes, scales, zeros, stats [rows, 6] and count, in one pass.

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

    def split_words(self, words: NDArray[np.uint32], bits: int, out: NDArray[np.uint8]) -> None:
        """The codes in words [rows, n], to rows of their own: out [rows * 32 / bits, n], bits 2, 4 or 8.

        Row r * 32 / bits + k of out has bits k * bits and up of the words of row r.
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
        bits: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        group: int,
        stats: NDArray[np.float64],
    ) -> None:
        """Figures of each row, to stats [rows, 6], with q from dequantize_int.

            sum of (w - q)^2, sum of w^2, largest |w - q|, sum of w * (w - q)
            codes at an end of their range: 0, and 2^bits - 1 or above
            zeroed groups: all q are 0, and some w is not (a NaN is not)

        Differences are fp32. Sums run over blocks of 128 columns, padded with zeros: the fp32 products of columns 2i
        and 2i + 1 are added, then of the 64 sums i + 32 to i, then i + 16 to i; the 16 sums go to 16 doubles, block by
        block, which are added in halves (i + 8 to i, and so on) at the end of the row. Blocks do not depend on the
        group. A NaN among the differences makes the first, the third and the fourth figure NaN; fp32 products beyond
        3.4e38 make a sum infinite, or NaN where they have both signs.
        """
        ...

    def group_absmax(self, src: RawWeights, dtype: str, group: int, out: NDArray[np.float32]) -> int:
        """Largest |w| of each group of raw weights [rows, cols] to out [rows, G], exactly.

        Returns the number of bad groups: those that hold NaN or infinity; each gets +Inf.
        """
        ...

    def group_range(
        self, src: RawWeights, dtype: str, group: int, out_min: NDArray[np.float32], out_max: NDArray[np.float32]
    ) -> int:
        """Smallest and largest w of each group of raw weights [rows, cols] to [rows, G], exactly; a zero result is +0.

        Zero is not forced into the range. Returns the number of bad groups: those that hold NaN or infinity; each gets
        -Inf and +Inf.
        """
        ...

    def encode_scaled(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        scales: NDArray[np.float32],
        codes: NDArray[np.uint8],
    ) -> None:
        """Raw weights [rows, cols] to the nearest element over their scale [rows, G]: codes [rows, cols].

            v = w / s in fp32, rounded once; a NaN v, and any v where s is 0, is +0
            v is clamped to the smallest and largest finite value of the element
            the nearest element, halves to the even code: 2.5 is 2 in int4 and in e2m1, where 0.25 is 0 and 5 is 4

        Floats keep the sign of v when they round to zero; a v of -0 counts as +0, but in six bits, as in
        compressed-tensors; an infinite v is the largest value.
        So scale 0 makes a group that decodes to zeros, whatever its weights. ValueError naming element if unknown.
        Sources: OCP Microscaling Formats 1.0 (elements, saturation); compressed-tensors 0.20, on fp32.
        """
        ...

    def encode_affine(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        rule: str,
        codes: NDArray[np.uint8],
    ) -> None:
        """Raw weights [rows, cols] to codes [rows, cols] of `bits` bits, 2 to 8; scales and offsets o [rows, G].

        All arithmetic is fp32, each operation rounded once; RNE is rounding half to even, top = 2^bits - 1.
            round_add: clamp(RNE(w / s) + o, 0, top), o a whole number (auto-round)
            add_round: clamp(RNE(w / s + o), 0, top) (compressed-tensors 0.20, o = zero point + 2^(bits-1))
            subtract: clamp(RNE((w - o) / s), 0, top) (MLX 0.32, o = bias)
        A quotient that is NaN, or whose s is 0, is 0, and a sum that is NaN gives code 0. So scale 0 makes a group of
        equal codes. RNE(w / s) in round_add is found as (w / s + 1.5 * 2^23) - 1.5 * 2^23, which matters only for an o
        beyond 2^20; a sum that is no whole number is rounded (RNE). ValueError naming rule if it is none of the three.
        """
        ...

    def decode_scaled(
        self,
        codes: NDArray[np.uint8],
        element: str,
        scales: NDArray[np.float32],
        group: int,
        out: NDArray[np.float32],
    ) -> None:
        """fp32 value * s, rounded once: codes and out [rows, cols], scales [rows, G].

        Bits of a float's code above its sign are ignored; patterns of infinity and NaN (e4m3fn, e5m2) are decoded as
        that. An integer's value is code - 2^(b-1) for every byte.
        """
        ...

    def decode_affine(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        group: int,
        rule: str,
        out: NDArray[np.float32],
    ) -> None:
        """Codes [rows, cols] to fp32 out [rows, cols]; scales and offsets o [rows, G]; each operation rounded once.

            zero: s * (code - o)
            bias: (s * code) + o (MLX)
        ValueError naming rule if it is neither.
        """
        ...

    def error_scaled(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        group: int,
        stats: NDArray[np.float64],
    ) -> None:
        """The figures of error_int, to stats [rows, 6], with q from decode_scaled. At an end of its range is a float's
        code of largest magnitude, either sign, and one of infinity or NaN.
        """
        ...

    def error_affine(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        group: int,
        rule: str,
        stats: NDArray[np.float64],
    ) -> None:
        """The figures of error_int, to stats [rows, 6], with q from decode_affine."""
        ...

    def narrow_columns(self, src: NDArray[np.float32], out: NDArray[np.uint16], row0: int) -> None:
        """out[:, row0 : row0 + rows] = src.T as fp16 patterns, src [rows, n], out [n, R]; the rest of out stays.

        Rounded to nearest, half to even; beyond fp16 infinity. A NaN keeps its sign and becomes 0x7e00.
        """
        ...

    def sum_errors(self, stats: NDArray[np.float64]) -> tuple[float, float, float, float, float, float]:
        """The figures of error_int over all rows of stats [rows, 6], none negative but the fourth.

        Sums are rounded once, as those of math.fsum, so that they do not depend on how rows were cut; a sum beyond
        double is infinite. A NaN makes its figure NaN.
        """
        ...

    def weigh_squares(
        self,
        src: RawWeights,
        dtype: str,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        out: NDArray[np.float64],
    ) -> None:
        """Per row of src [rows, cols] what its weights count where errors count as in search_int: the sum of (e * w) *
        w, to out [rows]; sums as those of losses there. NaN or infinite where a group's is."""
        ...

    def search_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        factors: NDArray[np.float32],
        signs: str,
        sweeps: int,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None:
        """Better scales for symmetric integers of src [rows, cols]: `scales` [rows, G] are those of round-to-nearest,
        and are replaced where another one, stored, has a smaller weighted error.

        A column's weighted error is e * (w - s * q)^2, q = level(w / s) = RNE(w / s) from -h to h - 1, h = 2^(bits-1).
        e is the column's importance [cols] (None: 1; finite, from 0 up) times, by `objective`, none: 1; square: w^2;
        root: sqrt(mean + w^2), mean that of w^2 over the group. All arithmetic is fp32, each operation rounded once.

            x = largest |w|; r = -h / x, or h / x where the smallest w has it alone or `signs` is positive
            for each factor c [K], K from 1 to 256, and for `signs` both then for -r as well:
                q = level(w * (r * c)); A = sum e*w*q; B = sum e*q*q; A/B wins where A * (A/B) is above all before
            `sweeps` times, 0 to 64: q = level(w * (1/s)); s = A/B
            s, rounded to the format `scale` (fp16, bf16 or fp32), half to even, replaces the old scale where
                least <= |s| < infinity and its weighted error is below the old one's

        Sums run over 128 columns of a group in order, and these sums are added in order. A NaN q is -h. NaN and
        infinity among the weights, and sums beyond fp32, leave the old scale: all comparisons with them fail.
        losses [rows, 2]: the weighted errors of all groups of a row, in order, in double: under the old scales, and
        under the new ones; NaN or infinite where a sum is.
        Sources: least squares as in llama.cpp's make_qx_quants; weights of the error as in its importance matrix.
        """
        ...

    def search_affine(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        factors: NDArray[np.float32],
        rule: str,
        sweeps: int,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None:
        """Better scales and offsets for affine codes of src [rows, cols]: as search_int, for `scales` and `offsets`
        [rows, G], which by `rule` are zero points (zero: w = s * (q - o), o a whole number) or biases (bias: w =
        s * q + o); top = 2^bits - 1, level(x, a, b) = RNE(x) from a to b, a NaN is a.

            low, high = the extremes of the group, with 0 between them for zero points
            for each factor c [K]: s = (high * c - low * c) / top; o = low * c
                `sweeps` times: q = level((w - o) * (1/s), 0, top); by the sums over the group E = sum e,
                    W = sum e*w, Q = sum e*q, S = sum (e*q)*q, P = sum q*(e*w): d = E*S - Q*Q, and where d > 0
                    s = (E*P - Q*W) / d; o = (W - s*Q) / E
                zero: o = level(-o / s, 0, top); q = level(w * (1/s), -o, top - o); s = sum q*(e*w) / sum (e*q)*q
                s, and a bias, rounded to the format `scale`
                the error is that of q = level(w * (1/s), -o, top - o), or level((w - o) * (1/s), 0, top)
            the candidate with the least error, and least <= |s| < infinity and a finite o, replaces the old numbers
            where its weighted error is below theirs, both by division: level(w / s, ...), level((w - o) / s, ...)

        Scales that are given may be negative; those found from the range are not. e, sums, losses, NaN and infinity as
        in search_int. Source: the normal equations of a line, as in llama.cpp's make_qkx2_quants.
        """
        ...

    def search_ladder(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        ladder: NDArray[np.float32],
        first: NDArray[np.uint8],
        last: NDArray[np.uint8],
        chosen: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> None:
        """Better scales for a float element of src [rows, cols], among those of a format: `ladder` [256] has the scales
        by their code (finite, from 0 up), and `chosen` [rows, G] the codes of round-to-nearest. Another code from
        `first` to `last` [rows, G], both included, replaces one where its weighted error is smaller; none where `last`
        is below `first`.

            the error of code i: sum of e * d * d, d = |w| - s * q, s = ladder[i], q = the element nearest to
            |w| * (1/s), half to even, at most the largest (a NaN too)
            the codes in order, each where its error is below that of all before, `chosen` first of all
            the best replaces `chosen` where its error is below that of it, both with q from |w| / s

        e, sums, losses, NaN and infinity as in search_int. ValueError naming element if it is no float.
        Sources: the exponents of auto-round 0.16.1 (search_mx_scale); sweeps of all scales as in ScaleSweep.
        """
        ...

    def search_grid(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        factors: NDArray[np.float32],
        scales: NDArray[np.float32],
        codes: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> int:
        """Scales [rows, G] and codes [rows, cols] of symmetric integers of src [rows, cols] as auto-round 0.16.1 finds
        them (quant_tensor_opt_rtn_sym), bit for bit as torch computes that on one thread of an x86 CPU.

        Every operation but on errors is rounded to the weights' own type, t(); h = 2^(bits-1); 1/x is t(1 / x), and 0
        for an |x| below 1e-30, 1e-5 in fp16. m is the first weight of largest magnitude.
            for each factor c [K], K from 1 to 256: r = t(-c * (1/m)); s = 1/r; q = RNE(t(r * w)) from -h to h - 1;
                the error is sum e * d^2, d = t(t(s * q) - w), e the column's importance (None: 1), in fp32
            the first s, or the first with an error below all before; then s = min(s, -f) if s < 0, else max(s, f), with
            f = t(1e-5); code = RNE(t(w / s)) from -h to h - 1, plus h

        The errors of a group, zeros behind a short last one, are added as torch adds them where it has AVX2: from the
        first on eight at a time, each eight to one of four sums in turn, which every 2^p steps, p = max(4, a quarter of
        the bits of their number), move up one of four levels; then the levels, the eights that are left over, the four
        sums, the numbers behind the last eight in order, and the eight sums in order. Groups below 8 columns: one at a
        time.
        Returns the number of bad groups: those that hold NaN or infinity; each gets the scale f and the codes h.
        losses [rows, 2]: the errors of all groups of a row, in order, in double: with the first factor, and with the
        best. Of importance that is 0 auto-round makes something else; it is used as it is here.
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
