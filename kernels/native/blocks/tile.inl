// Some blocks at once, and the arithmetic that all block formats share. Part of bodies.inl.
//
// Searches put a sub-block into each lane. What ggml sums, it sums over the columns of a sub-block in order: so does a
// lane, and gives the same bits.

constexpr int kTileCols = 4096;
constexpr int kTileSubs = kTileCols / 16;    // sub-blocks of a tile
constexpr int kTileBlocks = kTileCols / 32;
constexpr int kSide = 2;                     // vectors of sub-blocks at once, so that one waits while the other works
constexpr int kDescents = 4;                 // likewise, where a step waits longer
constexpr float kTiny = 1e-15f;              // ggml's GROUP_MAX_EPS
constexpr float kAnything = 1e-45f;          // the smallest number above 0
constexpr float kSmall = 1e-18f;             // products of smaller numbers are subnormal, which takes processors long

struct alignas(64) Tile {
    float x[kTileCols];           // one sub-block behind the other; zeros where there is none
    float importance[kTileCols];  // likewise, if there is importance
    float weights[kTileCols];     // of the errors, likewise
    int32_t most[kTileSubs];      // the pattern of the largest magnitude of a sub-block
    int order[kTileSubs];         // the sub-blocks that are searched, and the last of them again to fill vectors
    int active;                   // how many they are
    int large;                    // how many come first that are not kSmall; all of them where kSmall are not searched
    float turned[kTileCols];      // their x by lanes: [sub-block / kStrip][column][kStrip]
    float turned_weights[kTileCols];
    float mean[kTileBlocks];        // of the squares of a block's row, for the formats that weigh with it
    bool bad[kTileBlocks];          // blocks with NaN or infinity; their x is 0
};

// ggml's nearest_int: half to even up to 4194303, wrapped beyond; 0 for the NaN that arithmetic makes.
inline int32_t nearest_int(float v) {
    return static_cast<int32_t>(bits_of_float(v + kRound) & 0x7fffffu) - 0x400000;
}

// The same, held between two whole numbers, as a float: 2^23 + n less 1.5 * 2^23 is n less 2^22 exactly. As integers
// the patterns have the order of the numbers, and compilers know what the larger of two integers is.
inline float nearest_held(float v, int lowest, int highest) {
    const int32_t low = 0x4b400000 + lowest, high = 0x4b400000 + highest;
    int32_t bits = static_cast<int32_t>((bits_of_float(v + kRound) & 0x7fffffu) | 0x4b000000u);
    bits = bits > low ? bits : low;
    bits = bits < high ? bits : high;
    return float_of_bits(static_cast<uint32_t>(bits)) - kRound;
}

inline Ints larger_int(Ints a, Ints b) { return a > b ? a : b; }
inline Ints smaller_int(Ints a, Ints b) { return a < b ? a : b; }

inline Reals nearest_lanes(Reals v, int lowest, int highest) {
    const Ints bits = (bits_of(v + kRound) & 0x7fffff) | 0x4b000000;
    const Ints low = Ints{} + (0x4b400000 + lowest), high = Ints{} + (0x4b400000 + highest);
    return reals_of(smaller_int(larger_int(bits, low), high)) - kRound;
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

// Columns `at` and up of the matrix as one row, `count` blocks. Bad blocks are silent.
inline void load_tile(const Weights& w, int64_t at, int count, int block_cols, int sub_cols, Tile& t) {
    const int cols = count * block_cols, subs = block_cols / sub_cols;
    widen_any(w, at, cols, t.x);
    for (int i = cols; i < kTileCols; i++) t.x[i] = 0.0f;
    for (int s = 0; s < count * subs; s++) {
        t.most[s] = magnitude_bits(largest_magnitude(t.x + s * sub_cols, sub_cols));
    }
    for (int s = count * subs; s < kTileCols / sub_cols; s++) t.most[s] = 0;
    for (int b = 0; b < count; b++) {
        t.bad[b] = false;
        for (int s = b * subs; s < (b + 1) * subs; s++) t.bad[b] |= t.most[s] >= 0x7f800000;
        if (!t.bad[b]) continue;
        std::memset(t.x + b * block_cols, 0, static_cast<size_t>(block_cols) * sizeof *t.x);
        for (int s = b * subs; s < (b + 1) * subs; s++) t.most[s] = 0;
    }
}

// Sub-blocks whose largest magnitude is below `least` are not searched: ggml has nothing to find there either. Small ones
// come last, so that few vectors have some: what a lane takes long for, all wait for.
inline void choose_subs(float least, int sub_cols, Tile& t) {
    const int32_t bits = magnitude_bits(least), small = magnitude_bits(kSmall), large = bits > small ? bits : small;
    const int subs = kTileCols / sub_cols;
    int others = 0;
    t.active = 0;
    for (int s = 0; s < subs; s++) others += t.most[s] >= bits && t.most[s] < large ? 1 : 0;
    for (int s = 0; s < subs; s++) {
        t.order[t.active] = s;
        t.active += t.most[s] >= large ? 1 : 0;
    }
    t.large = t.active;
    for (int s = 0; others > 0; s++) {
        t.order[t.active] = s;
        const int is_other = t.most[s] >= bits && t.most[s] < large ? 1 : 0;
        t.active += is_other;
        others -= is_other;
    }
    for (int i = t.active; i > 0 && i % (kSide * kStrip) != 0; i++) t.order[i] = t.order[i - 1];
}

// Whether none of some sub-blocks is searched.
inline bool is_blank(const Tile& t, float least, int first, int count) {
    int32_t most = 0;
    for (int s = first; s < first + count; s++) most = t.most[s] > most ? t.most[s] : most;
    return most < magnitude_bits(least);
}

// From the order of the search to that of the sub-blocks; the others get what ggml has for them.
template <class Found>
inline void place_found(const Tile& t, int sub_cols, Found& found) {
    if (t.large < t.active) {
        const Found searched = found;
        for (int s = 0; s < kTileCols / sub_cols; s++) found.clear(s, t.x[s * sub_cols]);
        for (int i = 0; i < t.active; i++) found.take(searched, i, t.order[i]);
        return;
    }
    int next = t.active;
    for (int s = kTileCols / sub_cols - 1; s >= next; s--) {
        if (next > 0 && t.order[next - 1] == s) {
            found.take(found, --next, s);
        } else {
            found.clear(s, t.x[s * sub_cols]);
        }
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

// The sub-blocks of a tile that are searched, by lanes.
inline void turn_subs(const Tile& t, const float* SHARDQ_RESTRICT x, int sub_cols, float* SHARDQ_RESTRICT out) {
    alignas(64) uint32_t a[kSquare], b[kSquare];
    for (int first = 0; first < t.active; first += kStrip) {
        for (int j = 0; j < sub_cols; j += kStrip) {
            for (int lane = 0; lane < kStrip; lane++) {
                load_words(x + t.order[first + lane] * sub_cols + j, a + lane * kStrip);
            }
            const uint32_t* turned = turn_square(a, b);
            std::memcpy(out + first * sub_cols + j * kStrip, turned, sizeof a);
        }
    }
}
