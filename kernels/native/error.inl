// Dequantization, and the error that quantization made. Part of bodies.inl.

constexpr int kBlock = 128;   // columns summed in fp32 before the sums move to double
constexpr int kLanes = 16;    // sums per block, in every instruction set
constexpr int kMostBlocks = 16;
constexpr int kPairs = 512;   // pairs of columns at a time; the buffers stay in L1

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

// Columns go in pairs: a 32-bit word of two bf16 widens with one operation per column, and two codes are one 16-bit
// word.
struct alignas(64) Piece {  // a vector that straddles cache lines costs twice
    float even_scales[kPairs], even_zeros[kPairs];
    float odd_scales[kPairs], odd_zeros[kPairs];  // used only where groups are odd, so that a pair may lie in two
    float squares[kPairs], weights[kPairs];       // sums of a pair's two squares
};

inline void fill(float* SHARDQ_RESTRICT out, int64_t count, float value) {
    for (int64_t i = 0; i < count; i++) out[i] = value;
}

// Even groups of a known width, which becomes a few wide stores; returns how many columns they are.
template <int kWidth>
inline int64_t spread_whole_groups(Piece& p, int64_t width, const float* scales, const uint8_t* zeros) {
    const int64_t count = width / kWidth;
    for (int64_t g = 0; g < count; g++) {
        fill(p.even_scales + g * (kWidth / 2), kWidth / 2, scales[g]);
        fill(p.even_zeros + g * (kWidth / 2), kWidth / 2, static_cast<float>(zeros[g]));
    }
    return count * kWidth;
}

// One scale and zero per column, so that what follows knows no groups. The piece starts at column `at`; scales and
// zeros start at the group of that column.
inline void spread_groups(Piece& p, int64_t at, int64_t width, int64_t group, const float* scales,
                          const uint8_t* zeros) {
    const int64_t first = at / group;
    int64_t i = 0;
    if (group == 32) i = spread_whole_groups<32>(p, width, scales, zeros);
    if (group == 128) i = spread_whole_groups<128>(p, width, scales, zeros);
    for (int64_t g = i / group; i < width; g++) {
        const int64_t end = least(width, (first + g + 1) * group - at), even = (i + 1) / 2, odd = i / 2;
        fill(p.even_scales + even, (end + 1) / 2 - even, scales[g]);
        fill(p.even_zeros + even, (end + 1) / 2 - even, static_cast<float>(zeros[g]));
        if (group % 2 != 0) {
            fill(p.odd_scales + odd, end / 2 - odd, scales[g]);
            fill(p.odd_zeros + odd, end / 2 - odd, static_cast<float>(zeros[g]));
        }
        i = end;
    }
}

template <class T>
struct Pair {
    float even, odd;
    static Pair load(const typename T::Raw* src) { return {widen_value<T>(src[0]), widen_value<T>(src[1])}; }
};

template <>
inline Pair<Bf16> Pair<Bf16>::load(const uint16_t* src) {
    uint32_t raw;
    std::memcpy(&raw, src, sizeof raw);
    return {float_of_bits(raw << 16), float_of_bits(raw & 0xffff0000u)};
}

template <bool kExact>
inline float difference(float weight, float level, float scale) {
    return kExact ? multiply_add(level, -scale, weight) : weight - scale * level;
}

// Lanes 8..15 are added to lanes 0..7, then 4..7 to 0..3, and so on.
inline double add_lanes(double* lanes) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

// The figures of a row so far.
struct RowSums {
    double squares[kLanes], weights[kLanes];
    int32_t largest;  // bits of the largest |difference|, above those of infinity for a NaN

    void store(double* stats) {
        stats[0] = add_lanes(squares);
        stats[1] = add_lanes(weights);
        stats[2] = static_cast<double>(float_of_bits(static_cast<uint32_t>(largest)));
    }
};

// Sets one entry of squares and weights. Returns the larger of `largest` and the bits of both |differences|.
inline int32_t add_pair(float even_weight, float odd_weight, float even, float odd, int32_t largest, float& square,
                        float& weight) {
    square = even * even + odd * odd;
    weight = even_weight * even_weight + odd_weight * odd_weight;
    const int32_t even_bits = static_cast<int32_t>(bits_of_float(even) & 0x7fffffffu);
    const int32_t odd_bits = static_cast<int32_t>(bits_of_float(odd) & 0x7fffffffu);
    const int32_t larger = even_bits > odd_bits ? even_bits : odd_bits;
    return larger > largest ? larger : largest;
}

// Fills squares and weights of `pairs` pairs; returns as add_pair does.
template <class T, bool kExact>
inline int32_t add_pairs(const typename T::Raw* SHARDQ_RESTRICT src, const uint8_t* SHARDQ_RESTRICT codes,
                         int64_t pairs, bool odd_groups, int32_t largest, Piece& p) {
    const float* even_scales = p.even_scales;
    const float* even_zeros = p.even_zeros;
    const float* odd_scales = odd_groups ? p.odd_scales : p.even_scales;
    const float* odd_zeros = odd_groups ? p.odd_zeros : p.even_zeros;
    float* SHARDQ_RESTRICT squares = p.squares;
    float* SHARDQ_RESTRICT weights = p.weights;
    for (int64_t i = 0; i < pairs; i++) {
        const Pair<T> w = Pair<T>::load(src + 2 * i);
        uint16_t both;
        std::memcpy(&both, codes + 2 * i, sizeof both);
        const int32_t even_code = both & 0xff, odd_code = both >> 8;
        const float even = difference<kExact>(w.even, static_cast<float>(even_code) - even_zeros[i], even_scales[i]);
        const float odd = difference<kExact>(w.odd, static_cast<float>(odd_code) - odd_zeros[i], odd_scales[i]);
        largest = add_pair(w.even, w.odd, even, odd, largest, squares[i], weights[i]);
    }
    return largest;
}

// A row's last column when it has no neighbour, and nothing behind it to the end of the block.
template <class T, bool kExact>
inline int32_t add_rest(const typename T::Raw* src, const uint8_t* codes, int64_t width, int32_t largest, Piece& p) {
    const int64_t pairs = width / 2, block_end = ceil_div(width, kBlock) * (kBlock / 2);
    for (int64_t i = pairs; i < block_end; i++) p.squares[i] = p.weights[i] = 0.0f;
    if (width % 2 == 0) return largest;
    const float weight = widen_value<T>(src[width - 1]);
    const float level = static_cast<float>(codes[width - 1]) - p.even_zeros[pairs];
    const float last = difference<kExact>(weight, level, p.even_scales[pairs]);
    p.squares[pairs] = last * last;
    p.weights[pairs] = weight * weight;
    const int32_t bits = static_cast<int32_t>(bits_of_float(last) & 0x7fffffffu);
    return bits > largest ? bits : largest;
}

// Of each block's 64 sums, i + 32 is added to i, then i + 16 to i; the 16 that remain go to the lanes. At most
// kMostBlocks blocks.
inline void add_blocks(const float* SHARDQ_RESTRICT pair_sums, int64_t blocks, double* SHARDQ_RESTRICT lanes) {
    alignas(64) float sums[kMostBlocks * kLanes];
    for (int64_t k = 0; k < blocks; k++) {
        const float* x = pair_sums + k * (kBlock / 2);
        float half[32];
        for (int i = 0; i < 32; i++) half[i] = x[i] + x[i + 32];
        for (int i = 0; i < kLanes; i++) sums[k * kLanes + i] = half[i] + half[i + 16];
    }
    for (int64_t k = 0; k < blocks; k++) {
        for (int i = 0; i < kLanes; i++) lanes[i] += static_cast<double>(sums[k * kLanes + i]);
    }
}

// Columns `begin` to `end` of a row; `begin` is the first of a block, `end` is too or is the end of the row.
template <class T>
inline void add_columns(const typename T::Raw* src, const uint8_t* codes, const float* scales, const uint8_t* zeros,
                        int64_t begin, int64_t end, int64_t group, Piece& p, RowSums& sums) {
    const bool odd_groups = group % 2 != 0;
    for (int64_t at = begin; at < end; at += 2 * kPairs) {
        const int64_t width = least(2 * kPairs, end - at), first = at / group;
        const int64_t groups = ceil_div(at + width, group) - first;
        spread_groups(p, at, width, group, scales + first, zeros + first);
        if (products_are_exact(scales + first, groups)) {
            sums.largest = add_pairs<T, true>(src + at, codes + at, width / 2, odd_groups, sums.largest, p);
            sums.largest = add_rest<T, true>(src + at, codes + at, width, sums.largest, p);
        } else {
            sums.largest = add_pairs<T, false>(src + at, codes + at, width / 2, odd_groups, sums.largest, p);
            sums.largest = add_rest<T, false>(src + at, codes + at, width, sums.largest, p);
        }
        add_blocks(p.squares, ceil_div(width, kBlock), sums.squares);
        add_blocks(p.weights, ceil_div(width, kBlock), sums.weights);
    }
}

template <class T>
inline void error_rows(const Weights& w, const IntCodes& q, double* stats) {
    const int64_t groups = ceil_div(q.cols, q.group);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    Piece p;
    for (int64_t row = 0; row < w.rows; row++) {
        const int64_t at = row * w.cols, first = row * groups;
        RowSums sums = {};
        add_columns<T>(src + at, q.codes + at, q.scales + first, q.zeros + first, 0, w.cols, q.group, p, sums);
        sums.store(stats + row * 3);
    }
}

void error_int(const Weights& w, const IntCodes& q, double* stats) {
    if (w.dtype == Dtype::BF16) return error_rows<Bf16>(w, q, stats);
    if (w.dtype == Dtype::F16) return error_rows<F16>(w, q, stats);
    return error_rows<F32>(w, q, stats);
}
