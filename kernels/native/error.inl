// Dequantization, and the error that quantization made. Part of bodies.inl.

constexpr int kBlock = 128;   // columns summed in fp32 before the sums move to double
constexpr int kLanes = 16;    // sums per block, in every instruction set
constexpr int kPiece = 1024;  // columns at a time; the buffers stay in L1

void dequantize_int(const IntCodes& q, float* out) {
    const int64_t groups = ceil_div(q.cols, q.group);
    for (int64_t row = 0; row < q.rows; row++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = row * q.cols + g * q.group, width = least(q.group, q.cols - g * q.group);
            const float scale = q.scales[row * groups + g];
            const int32_t zero = q.zeros[row * groups + g];
            const uint8_t* SHARDQ_RESTRICT codes = q.codes + at;
            float* SHARDQ_RESTRICT values = out + at;
            for (int64_t i = 0; i < width; i++) values[i] = scale * static_cast<float>(codes[i] - zero);
        }
    }
}

// Fusing the multiplication into the subtraction changes nothing while the product is exact: a scale of at most 16
// significant bits (any fp16 or bf16 value) times a difference of at most 8, away from underflow and overflow.
inline bool products_are_exact(const float* SHARDQ_RESTRICT scales, int64_t count) {
    int32_t inexact = 0;
    for (int64_t i = 0; i < count; i++) {
        const int32_t bits = static_cast<int32_t>(bits_of_float(scales[i]));
        const int32_t exponent = (bits >> 23) & 0xff;
        inexact |= (bits & 0xff) | ((exponent - 31) >> 31) | ((229 - exponent) >> 31);  // 31 <= exponent <= 229
    }
    return inexact == 0;
}

// Columns lie in two planes, even and odd ones: a 32-bit word of two bf16 then widens with one operation per plane, and a
// 16-bit word of two codes likewise. Index i of a plane is column 2 * i or 2 * i + 1 of the piece.
struct alignas(64) Planes {  // a vector that straddles cache lines costs twice
    float even[kPiece / 2], odd[kPiece / 2];
};

struct Piece {
    int64_t at, width;  // columns of the row
    Planes weights;
    Planes differences;  // codes, until subtract_groups
    alignas(64) float zeros[kPiece];
    alignas(64) float sums[kPiece / kBlock * kLanes];
};

// levels holds codes on entry, and weights minus scale * (code - zero) on return.
template <bool kExact>
inline void subtract_codes(const float* SHARDQ_RESTRICT weights, int64_t count, float scale, float zero,
                           float* SHARDQ_RESTRICT levels) {
    for (int64_t i = 0; i < count; i++) {
        const float level = levels[i] - zero;
        levels[i] = kExact ? multiply_add(level, -scale, weights[i]) : weights[i] - scale * level;
    }
}

// Columns begin..end of the piece, which share a scale.
template <bool kExact>
inline void subtract_columns(Piece& p, int64_t begin, int64_t end, float scale, float zero) {
    const int64_t even = (begin + 1) / 2, odd = begin / 2;
    subtract_codes<kExact>(p.weights.even + even, (end + 1) / 2 - even, scale, zero, p.differences.even + even);
    subtract_codes<kExact>(p.weights.odd + odd, end / 2 - odd, scale, zero, p.differences.odd + odd);
}

// Whole groups of a known width from the start of the piece; returns how many columns they are.
template <bool kExact, int kWidth>
inline int64_t subtract_whole_groups(Piece& p, const float* scales) {
    constexpr int kHalf = kWidth / 2;
    const int64_t count = p.width / kWidth;
    for (int64_t g = 0; g < count; g++) {
        subtract_codes<kExact>(p.weights.even + g * kHalf, kHalf, scales[g], p.zeros[g], p.differences.even + g * kHalf);
        subtract_codes<kExact>(p.weights.odd + g * kHalf, kHalf, scales[g], p.zeros[g], p.differences.odd + g * kHalf);
    }
    return count * kWidth;
}

// `scales` belongs to the first group that the piece touches.
template <bool kExact>
inline void subtract_groups(Piece& p, int64_t group, const float* scales) {
    int64_t i = 0;
    if (group == 128) i = subtract_whole_groups<kExact, 128>(p, scales);
    while (i < p.width) {
        const int64_t g = (p.at + i) / group - p.at / group;
        const int64_t end = least(p.width, (p.at / group + g + 1) * group - p.at);
        subtract_columns<kExact>(p, i, end, scales[g], p.zeros[g]);
        i = end;
    }
}

// Squares of each 128 columns: neighbours are added, then of 64 sums i + 32 to i, then i + 16 to i.
inline void add_squares(const Planes& x, int64_t blocks, float* SHARDQ_RESTRICT sums) {
    for (int64_t k = 0; k < blocks; k++) {
        const float* even = x.even + k * (kBlock / 2);
        const float* odd = x.odd + k * (kBlock / 2);
        float a[64], b[32];
        for (int i = 0; i < 64; i++) a[i] = even[i] * even[i] + odd[i] * odd[i];
        for (int i = 0; i < 32; i++) b[i] = a[i] + a[i + 32];
        for (int i = 0; i < kLanes; i++) sums[k * kLanes + i] = b[i] + b[i + 16];
    }
}

inline void add_to_double(const float* SHARDQ_RESTRICT sums, int64_t blocks, double* SHARDQ_RESTRICT lanes) {
    for (int64_t k = 0; k < blocks; k++) {
        for (int i = 0; i < kLanes; i++) lanes[i] += static_cast<double>(sums[k * kLanes + i]);
    }
}

// Lanes 8..15 are added to lanes 0..7, then 4..7 to 0..3, and so on.
inline double add_lanes(double* lanes) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

inline int32_t magnitude_bits(float x) { return static_cast<int32_t>(bits_of_float(x) & 0x7fffffffu); }

// Bits of the largest magnitude: above those of infinity when there is a NaN.
inline int32_t largest_magnitude(const Planes& x, int64_t pairs, int32_t largest) {
    for (int64_t i = 0; i < pairs; i++) {
        const int32_t even = magnitude_bits(x.even[i]), odd = magnitude_bits(x.odd[i]);
        const int32_t larger = even > odd ? even : odd;
        largest = larger > largest ? larger : largest;
    }
    return largest;
}

template <class T>
inline void load_weights(const typename T::Raw* SHARDQ_RESTRICT src, int64_t pairs, Planes& weights) {
    for (int64_t i = 0; i < pairs; i++) {
        weights.even[i] = widen_value<T>(src[2 * i]);
        weights.odd[i] = widen_value<T>(src[2 * i + 1]);
    }
}

template <>
inline void load_weights<Bf16>(const uint16_t* SHARDQ_RESTRICT src, int64_t pairs, Planes& weights) {
    for (int64_t i = 0; i < pairs; i++) {
        uint32_t raw;
        std::memcpy(&raw, src + 2 * i, sizeof raw);
        weights.even[i] = float_of_bits(raw << 16);
        weights.odd[i] = float_of_bits(raw & 0xffff0000u);
    }
}

inline void load_codes(const uint8_t* SHARDQ_RESTRICT codes, int64_t pairs, Planes& levels) {
    for (int64_t i = 0; i < pairs; i++) {
        uint16_t both;
        std::memcpy(&both, codes + 2 * i, sizeof both);
        const int32_t wide = both;
        levels.even[i] = static_cast<float>(wide & 0xff);
        levels.odd[i] = static_cast<float>(wide >> 8);
    }
}

// The columns of the piece, and zeros behind them to the end of the last block.
template <class T>
inline void load_piece(const typename T::Raw* src, const uint8_t* codes, int64_t blocks, Piece& p) {
    const int64_t pairs = p.width / 2;
    load_weights<T>(src, pairs, p.weights);
    load_codes(codes, pairs, p.differences);
    for (int64_t i = pairs; i < blocks * (kBlock / 2); i++) {
        p.weights.even[i] = p.weights.odd[i] = p.differences.even[i] = p.differences.odd[i] = 0.0f;
    }
    if (p.width % 2 != 0) {
        p.weights.even[pairs] = widen_value<T>(src[p.width - 1]);
        p.differences.even[pairs] = static_cast<float>(codes[p.width - 1]);
    }
}

template <class T>
inline void error_row(const typename T::Raw* src, const uint8_t* codes, const float* scales, const uint8_t* zeros,
                      int64_t cols, int64_t group, double* stats) {
    Piece p;
    alignas(64) double square_lanes[kLanes] = {}, weight_lanes[kLanes] = {};
    int32_t largest = 0;
    for (p.at = 0; p.at < cols; p.at += kPiece) {
        p.width = least(kPiece, cols - p.at);
        const int64_t blocks = ceil_div(p.width, kBlock), first = p.at / group;
        const int64_t groups = ceil_div(p.at + p.width, group) - first;
        load_piece<T>(src + p.at, codes + p.at, blocks, p);
        for (int64_t g = 0; g < groups; g++) p.zeros[g] = static_cast<float>(zeros[first + g]);
        if (products_are_exact(scales + first, groups)) {
            subtract_groups<true>(p, group, scales + first);
        } else {
            subtract_groups<false>(p, group, scales + first);
        }
        add_squares(p.differences, blocks, p.sums);
        add_to_double(p.sums, blocks, square_lanes);
        add_squares(p.weights, blocks, p.sums);
        add_to_double(p.sums, blocks, weight_lanes);
        largest = largest_magnitude(p.differences, blocks * (kBlock / 2), largest);
    }
    stats[0] = add_lanes(square_lanes);
    stats[1] = add_lanes(weight_lanes);
    stats[2] = static_cast<double>(float_of_bits(static_cast<uint32_t>(largest)));
}

template <class T>
inline void error_rows(const Weights& w, const IntCodes& q, double* stats) {
    const int64_t groups = ceil_div(q.cols, q.group);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    for (int64_t row = 0; row < w.rows; row++) {
        error_row<T>(src + row * w.cols, q.codes + row * w.cols, q.scales + row * groups, q.zeros + row * groups, w.cols,
                     q.group, stats + row * 3);
    }
}

void error_int(const Weights& w, const IntCodes& q, double* stats) {
    if (w.dtype == Dtype::BF16) return error_rows<Bf16>(w, q, stats);
    if (w.dtype == Dtype::F16) return error_rows<F16>(w, q, stats);
    return error_rows<F32>(w, q, stats);
}
