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
inline bool product_is_exact(float scale) {
    const uint32_t bits = bits_of_float(scale);
    const uint32_t exponent = (bits >> 23) & 0xffu;
    return (bits & 0xffu) == 0 && exponent > 30 && exponent < 230;
}

// levels holds codes on entry, and weights minus scale * (code - zero) on return.
template <bool kExact>
inline void subtract_codes(const float* SHARDQ_RESTRICT weights, int64_t cols, float scale, float zero,
                           float* SHARDQ_RESTRICT levels) {
    for (int64_t i = 0; i < cols; i++) {
        const float level = levels[i] - zero;
        levels[i] = kExact ? multiply_add(level, -scale, weights[i]) : weights[i] - scale * level;
    }
}

inline void subtract_group(const float* weights, int64_t cols, float scale, float zero, float* levels) {
    if (!product_is_exact(scale)) {
        subtract_codes<false>(weights, cols, scale, zero, levels);
    } else if (cols == 128) {  // known widths unroll without a remainder
        subtract_codes<true>(weights, 128, scale, zero, levels);
    } else if (cols == 32) {
        subtract_codes<true>(weights, 32, scale, zero, levels);
    } else {
        subtract_codes<true>(weights, cols, scale, zero, levels);
    }
}

// Squares of each 128 columns, added in halves until 16 sums remain: column i + 64 to column i, then i + 32, then i + 16.
inline void add_squares(const float* SHARDQ_RESTRICT x, int64_t blocks, float* SHARDQ_RESTRICT sums) {
    for (int64_t k = 0; k < blocks; k++) {
        const float* SHARDQ_RESTRICT v = x + k * kBlock;
        float a[64], b[32];
        for (int i = 0; i < 64; i++) a[i] = v[i] * v[i] + v[i + 64] * v[i + 64];
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

// Bits of the largest magnitude: above those of infinity when there is a NaN.
inline int32_t largest_magnitude(const float* SHARDQ_RESTRICT x, int64_t count, int32_t largest) {
    for (int64_t i = 0; i < count; i++) {
        const int32_t magnitude = static_cast<int32_t>(bits_of_float(x[i]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

template <class T>
inline void load_piece(const typename T::Raw* SHARDQ_RESTRICT src, const uint8_t* SHARDQ_RESTRICT codes, int64_t cols,
                       int64_t padded, float* SHARDQ_RESTRICT weights, float* SHARDQ_RESTRICT levels) {
    for (int64_t i = 0; i < cols; i++) weights[i] = widen_value<T>(src[i]);
    for (int64_t i = 0; i < cols; i++) levels[i] = static_cast<float>(codes[i]);
    for (int64_t i = cols; i < padded; i++) weights[i] = levels[i] = 0.0f;
}

template <class T>
inline void error_row(const typename T::Raw* src, const uint8_t* codes, const float* scales, const uint8_t* zeros,
                      int64_t cols, int64_t group, double* stats) {
    float weights[kPiece], differences[kPiece], sums[kPiece / kBlock * kLanes];
    double square_lanes[kLanes] = {}, weight_lanes[kLanes] = {};
    int32_t largest = 0;
    for (int64_t at = 0; at < cols; at += kPiece) {
        const int64_t width = least(kPiece, cols - at), blocks = ceil_div(width, kBlock);
        load_piece<T>(src + at, codes + at, width, blocks * kBlock, weights, differences);
        for (int64_t g = at / group, i = 0; i < width; g++) {
            const int64_t end = least(width, (g + 1) * group - at);
            subtract_group(weights + i, end - i, scales[g], static_cast<float>(zeros[g]), differences + i);
            i = end;
        }
        add_squares(differences, blocks, sums);
        add_to_double(sums, blocks, square_lanes);
        add_squares(weights, blocks, sums);
        add_to_double(sums, blocks, weight_lanes);
        largest = largest_magnitude(differences, width, largest);
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
