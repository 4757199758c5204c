// Some blocks at once, and the arithmetic that all block formats share. Part of bodies.inl.
//
// Searches put a sub-block into each lane. What ggml sums, it sums over the columns of a sub-block in order: so does a
// lane, and gives the same bits.

constexpr int kTileSubs = 16;                   // sub-blocks
constexpr int kTileCols = kTileSubs * 32;       // at most
constexpr float kTiny = 1e-15f;                 // ggml's GROUP_MAX_EPS

struct alignas(64) Tile {
    float x[kTileCols];           // one sub-block behind the other; zeros where there is none
    float importance[kTileCols];  // likewise, if there is importance
    float weights[kTileCols];     // of the errors, likewise
    float turned[kTileCols];      // x by lanes: [16 / kStrip][column][kStrip]
    float turned_weights[kTileCols];
    float mean[kTileSubs];        // of the squares of a block's row, for the formats that weigh with it
    bool bad[kTileSubs];          // blocks with NaN or infinity; their x is 0
};

// ggml's nearest_int: half to even up to 4194303, wrapped beyond; 0 for the NaN that arithmetic makes.
inline int32_t nearest_int(float v) {
    return static_cast<int32_t>(bits_of_float(v + kRound) & 0x7fffffu) - 0x400000;
}

// The same as a float, which 2^23 + n less 1.5 * 2^23 is exactly.
inline float nearest_whole(float v) {
    return float_of_bits((bits_of_float(v + kRound) & 0x7fffffu) | 0x4b000000u) - kRound;
}

inline Reals nearest_lanes(Reals v) {
    return reals_of((bits_of(v + kRound) & 0x7fffff) | 0x4b000000) - kRound;
}

inline float clamp_whole(float v, float lowest, float highest) {
    v = v > lowest ? v : lowest;
    return v < highest ? v : highest;
}

inline Reals clamp_lanes(Reals v, float lowest, float highest) {
    const Reals low = all_lanes(lowest), high = all_lanes(highest);
    v = v > low ? v : low;
    return v < high ? v : high;
}

inline int clamp_int(int v, int lowest, int highest) { return v < lowest ? lowest : v > highest ? highest : v; }

inline float float_of_half(uint16_t half) { return widen_value<F16>(half); }

inline void put_half(uint8_t* out, uint16_t half) { std::memcpy(out, &half, sizeof half); }

inline uint16_t get_half(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return half;
}

inline bool is_finite_half(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

inline int32_t magnitude_bits(float x) { return static_cast<int32_t>(bits_of_float(x) & 0x7fffffffu); }

// The largest magnitude; as integers, magnitudes have their order.
inline float largest_magnitude(const float* x, int cols) {
    int32_t most = 0;
    for (int i = 0; i < cols; i++) {
        const int32_t bits = magnitude_bits(x[i]);
        most = bits > most ? bits : most;
    }
    return float_of_bits(static_cast<uint32_t>(most));
}

// The first number of largest magnitude: ties between signs are rare enough to look for.
inline float leader_of(const float* x, int cols) {
    const float most = largest_magnitude(x, cols);
    int32_t positive = 0, negative = 0;
    for (int i = 0; i < cols; i++) {
        positive |= x[i] == most ? 1 : 0;
        negative |= x[i] == -most ? 1 : 0;
    }
    if (positive == 0) return -most;
    if (negative == 0 || most == 0.0f) return most;
    int i = 0;
    while (x[i] != most && x[i] != -most) i++;
    return x[i];
}

template <class T>
inline void widen_columns(const void* data, int64_t at, int64_t cols, float* SHARDQ_RESTRICT out) {
    const auto* SHARDQ_RESTRICT src = static_cast<const typename T::Raw*>(data) + at;
    for (int64_t i = 0; i < cols; i++) out[i] = widen_value<T>(src[i]);
}

inline void widen_any(const Weights& w, int64_t at, int64_t cols, float* out) {
    if (w.dtype == Dtype::BF16) return widen_columns<Bf16>(w.data, at, cols, out);
    if (w.dtype == Dtype::F16) return widen_columns<F16>(w.data, at, cols, out);
    widen_columns<F32>(w.data, at, cols, out);
}

// Columns `at` and up of the matrix as one row, `count` blocks.
inline void load_tile(const Weights& w, int64_t at, int count, int block_cols, Tile& t) {
    const int cols = count * block_cols;
    widen_any(w, at, cols, t.x);
    for (int i = cols; i < kTileCols; i++) t.x[i] = 0.0f;
    for (int b = 0; b < count; b++) {
        float* x = t.x + b * block_cols;
        t.bad[b] = magnitude_bits(largest_magnitude(x, block_cols)) >= 0x7f800000;
        if (t.bad[b]) std::memset(x, 0, static_cast<size_t>(block_cols) * sizeof *x);
    }
}

// Of the same columns; the importance of a row is that of every row. Lanes without a block get 0.
inline void load_importance(const float* importance, int64_t row_cols, int64_t at, int count, int block_cols, Tile& t) {
    for (int b = 0; b < count; b++) {
        const float* from = importance + (at + b * block_cols) % row_cols;
        std::memcpy(t.importance + b * block_cols, from, static_cast<size_t>(block_cols) * sizeof *from);
    }
    for (int i = count * block_cols; i < kTileCols; i++) t.importance[i] = 0.0f;
}

// In order, as one sum.
inline float sum_of_squares(const float* x, int cols) {
    float sum = 0.0f;
    for (int i = 0; i < cols; i++) sum += x[i] * x[i];
    return sum;
}

// weights = importance * sqrt(mean + x^2)
inline void weigh_block(const float* SHARDQ_RESTRICT x, const float* SHARDQ_RESTRICT importance, float mean, int cols,
                        float* SHARDQ_RESTRICT weights) {
    for (int i = 0; i < cols; i++) weights[i] = importance[i] * __builtin_sqrtf(mean + x[i] * x[i]);
}

inline void load_words(const float* from, uint32_t* to) { std::memcpy(to, from, kStrip * sizeof *to); }

// Sub-blocks [16][sub_cols] by lanes.
inline void turn_subs(const float* SHARDQ_RESTRICT x, int sub_cols, float* SHARDQ_RESTRICT out) {
    alignas(64) uint32_t a[kSquare], b[kSquare];
    for (int first = 0; first < kTileSubs; first += kStrip) {
        for (int j = 0; j < sub_cols; j += kStrip) {
            for (int lane = 0; lane < kStrip; lane++) load_words(x + (first + lane) * sub_cols + j, a + lane * kStrip);
            const uint32_t* turned = turn_square(a, b);
            std::memcpy(out + first * sub_cols + j * kStrip, turned, sizeof a);
        }
    }
}
