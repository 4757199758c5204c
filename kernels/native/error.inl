// Dequantization, and the error that quantization made. Part of bodies.inl.

constexpr int kBlock = 128;   // columns summed in fp32 before the sums move to double
constexpr int kLanes = 16;    // sums per block, in every instruction set
constexpr int kMostBlocks = 16;

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

struct alignas(64) Piece {  // a vector that straddles cache lines costs twice
    Spread scales, zeros;
    float squares[kPairs], weights[kPairs], products[kPairs];  // sums of a pair's two
};

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
    double squares[kLanes], weights[kLanes], products[kLanes];
    int32_t largest;  // bits of the largest |difference|, above those of infinity for a NaN
    int64_t at_ends, zeroed;

    void store(double* stats) {
        stats[0] = add_lanes(squares);
        stats[1] = add_lanes(weights);
        stats[2] = static_cast<double>(float_of_bits(static_cast<uint32_t>(largest)));
        stats[3] = add_lanes(products);
        stats[4] = static_cast<double>(at_ends);
        stats[5] = static_cast<double>(zeroed);
    }
};

// Sets one entry of squares, weights and products. Returns the larger of `largest` and the bits of both |differences|.
inline int32_t add_pair(float even_weight, float odd_weight, float even, float odd, int32_t largest, float& square,
                        float& weight, float& product) {
    square = even * even + odd * odd;
    weight = even_weight * even_weight + odd_weight * odd_weight;
    product = even_weight * even + odd_weight * odd;
    const int32_t even_bits = static_cast<int32_t>(bits_of_float(even) & 0x7fffffffu);
    const int32_t odd_bits = static_cast<int32_t>(bits_of_float(odd) & 0x7fffffffu);
    const int32_t larger = even_bits > odd_bits ? even_bits : odd_bits;
    return larger > largest ? larger : largest;
}

// The difference between a weight and what its code decodes to: scale * (code - zero).
template <bool kExact>
struct IntDecoder {
    static constexpr bool kHasZeros = true;

    float value(int32_t code, float scale, float zero) const { return scale * (static_cast<float>(code) - zero); }
    float difference_of(float weight, int32_t code, float scale, float zero) const {
        return difference<kExact>(weight, static_cast<float>(code) - zero, scale);
    }
};

// Fills squares, weights and products of `pairs` pairs; returns as add_pair does.
template <class T, class Decoder>
inline int32_t add_pairs(const Decoder& decoder, const typename T::Raw* SHARDQ_RESTRICT src,
                         const uint8_t* SHARDQ_RESTRICT codes, int64_t pairs, int64_t group, int32_t largest,
                         Piece& p) {
    const float* even_scales = p.scales.even;
    const float* even_zeros = p.zeros.even;
    const float* odd_scales = p.scales.of_odd(group);
    const float* odd_zeros = p.zeros.of_odd(group);
    float* SHARDQ_RESTRICT squares = p.squares;
    float* SHARDQ_RESTRICT weights = p.weights;
    float* SHARDQ_RESTRICT products = p.products;
    const Decoder d = decoder;
    for (int64_t i = 0; i < pairs; i++) {
        const Pair<T> w = Pair<T>::load(src + 2 * i);
        uint16_t both;
        std::memcpy(&both, codes + 2 * i, sizeof both);
        const float even_zero = Decoder::kHasZeros ? even_zeros[i] : 0.0f;
        const float odd_zero = Decoder::kHasZeros ? odd_zeros[i] : 0.0f;
        const float even = d.difference_of(w.even, both & 0xff, even_scales[i], even_zero);
        const float odd = d.difference_of(w.odd, both >> 8, odd_scales[i], odd_zero);
        largest = add_pair(w.even, w.odd, even, odd, largest, squares[i], weights[i], products[i]);
    }
    return largest;
}

// Nothing behind a piece's whole pairs to the end of the block.
inline void clear_rest(int64_t width, Piece& p) {
    const int64_t block_end = ceil_div(width, kBlock) * (kBlock / 2);
    for (int64_t i = width / 2; i < block_end; i++) p.squares[i] = p.weights[i] = p.products[i] = 0.0f;
}

// A row's last column when it has no neighbour; returns as add_pair does.
inline int32_t add_last(float weight, float difference, int64_t width, int32_t largest, Piece& p) {
    const int64_t last = width / 2;
    return add_pair(weight, 0.0f, difference, 0.0f, largest, p.squares[last], p.weights[last], p.products[last]);
}

template <class T, class Decoder>
inline int32_t add_rest(const Decoder& decoder, const typename T::Raw* src, const uint8_t* codes, int64_t width,
                        int32_t largest, Piece& p) {
    clear_rest(width, p);
    if (width % 2 == 0) return largest;
    const float weight = widen_value<T>(src[width - 1]);
    const float zero = Decoder::kHasZeros ? p.zeros.even[width / 2] : 0.0f;
    const float last = decoder.difference_of(weight, codes[width - 1], p.scales.even[width / 2], zero);
    return add_last(weight, last, width, largest, p);
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

// A piece whose pairs are filled.
inline void add_sums(const Piece& p, int64_t width, RowSums& sums) {
    add_blocks(p.squares, ceil_div(width, kBlock), sums.squares);
    add_blocks(p.weights, ceil_div(width, kBlock), sums.weights);
    add_blocks(p.products, ceil_div(width, kBlock), sums.products);
}

// A piece whose scales and zeros are spread.
template <class T, class Decoder>
inline void add_piece(const Decoder& decoder, const typename T::Raw* src, const uint8_t* codes, int64_t width,
                      int64_t group, Piece& p, RowSums& sums) {
    sums.largest = add_pairs<T>(decoder, src, codes, width / 2, group, sums.largest, p);
    sums.largest = add_rest<T>(decoder, src, codes, width, sums.largest, p);
    add_sums(p, width, sums);
}

// Columns `begin` to `end` of a row; `begin` is the first of a block, `end` is too or is the end of the row.
template <class T>
inline void add_columns(const typename T::Raw* src, const uint8_t* codes, const float* scales, const uint8_t* zeros,
                        int64_t begin, int64_t end, int64_t group, Piece& p, RowSums& sums) {
    for (int64_t at = begin; at < end; at += 2 * kPairs) {
        const int64_t width = least(2 * kPairs, end - at), first = at / group;
        spread_groups(p.scales, at, width, group, scales + first);
        spread_groups(p.zeros, at, width, group, zeros + first);
        if (products_are_exact(scales + first, ceil_div(at + width, group) - first)) {
            add_piece<T>(IntDecoder<true>{}, src + at, codes + at, width, group, p, sums);
        } else {
            add_piece<T>(IntDecoder<false>{}, src + at, codes + at, width, group, p, sums);
        }
    }
}

// Of columns `begin`, the first of a group, to `end` of a row.
template <class T>
inline int64_t count_zeroed_int(const typename T::Raw* src, const uint8_t* codes, const float* scales,
                                const uint8_t* zeros, int64_t begin, int64_t end, int64_t group) {
    const int64_t first = begin / group;
    return count_zeroed<T>(IntDecoder<false>{}, src + begin, codes + begin, end - begin, group, scales + first,
                           zeros + first, 0xff);
}

template <class T>
inline void error_rows(const Weights& w, const IntCodes& q, int bits, double* stats) {
    const int64_t groups = ceil_div(q.cols, q.group);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    Piece p;
    for (int64_t row = 0; row < w.rows; row++) {
        const auto* from = src + row * w.cols;
        const uint8_t* codes = q.codes + row * w.cols;
        const float* scales = q.scales + row * groups;
        const uint8_t* zeros = q.zeros + row * groups;
        RowSums sums = {};
        add_columns<T>(from, codes, scales, zeros, 0, w.cols, q.group, p, sums);
        sums.zeroed = count_zeroed_int<T>(from, codes, scales, zeros, 0, w.cols, q.group);
        sums.at_ends = count_ends(codes, w.cols, ends_of_bits(bits));
        sums.store(stats + row * kFigures);
    }
}

void error_int(const Weights& w, const IntCodes& q, int bits, double* stats) {
    if (w.dtype == Dtype::BF16) return error_rows<Bf16>(w, q, bits, stats);
    if (w.dtype == Dtype::F16) return error_rows<F16>(w, q, bits, stats);
    return error_rows<F32>(w, q, bits, stats);
}
