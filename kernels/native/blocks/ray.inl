// ggml's searches for scales of signed codes, a sub-block in each lane (make_qx_quants with its first kind of error, of
// ggml 0.25.3). Part of bodies.inl; contract_blocks.py has the formulas.

// What the search found: w = scale * (code - half). Its codes are nearest(inverse * x) + offset; see LineFound.
struct alignas(64) RayFound {
    float scale[kTileSubs], inverse[kTileSubs], offset[kTileSubs];

    void take(const RayFound& from, int at, int to) {
        scale[to] = from.scale[at];
        inverse[to] = from.inverse[at];
        offset[to] = from.offset[at];
    }
    void clear(int sub, float) { scale[sub] = inverse[sub] = offset[sub] = 0.0f; }
};

struct RaySums {
    Reals product, square;
};

// The first number of largest magnitude.
template <int kCols>
inline Reals lane_leader(const float* x) {
    Reals leader = {}, most = {};
    for (int i = 0; i < kCols; i++) {
        const Reals value = load_lanes(x + i * kStrip), size = magnitude_lanes(value);
        leader = size > most ? value : leader;
        most = size > most ? size : most;
    }
    return leader;
}

// Of kCount candidates.
template <int kCols, int kHalf, int kCount>
inline void sum_rays(const float* x, const float* w, const float* wx, const Reals* inverse, RaySums* sums) {
    Reals product[kCount] = {}, square[kCount] = {};
    for (int i = 0; i < kCols; i++) {
        const Reals value = load_lanes(x + i * kStrip), weight = load_lanes(w + i * kStrip);
        const Reals weighed = load_lanes(wx + i * kStrip);
        for (int k = 0; k < kCount; k++) {
            const Reals level = nearest_lanes(inverse[k] * value, -kHalf, kHalf - 1);
            product[k] += weighed * level;
            square[k] += weight * level * level;
        }
    }
    for (int k = 0; k < kCount; k++) sums[k] = {product[k], square[k]};
}

constexpr int kRaysAtOnce = 3, kRays = 18;

// -9 to 9 but for 0.
inline float ray_step(int n) { return static_cast<float>(n < 9 ? n - 9 : n - 8); }

template <int kCols, int kHalf>
inline void search_ray(const float* x, const float* w, int at, RayFound& found) {
    constexpr auto kLargest = static_cast<float>(kHalf);
    alignas(64) float wx[kCols * kStrip];
    for (int i = 0; i < kCols; i++) {
        store_lanes(wx + i * kStrip, load_lanes(w + i * kStrip) * load_lanes(x + i * kStrip));
    }
    const Reals leader = lane_leader<kCols>(x);
    Reals inverse = -kLargest / leader;
    RaySums first;
    sum_rays<kCols, kHalf, 1>(x, w, wx, &inverse, &first);
    Reals scale = first.square != 0.0f ? first.product / first.square : Reals{};
    Reals best = scale * first.product;
    for (int n = 0; n < kRays; n += kRaysAtOnce) {
        Reals tried[kRaysAtOnce];
        RaySums sums[kRaysAtOnce];
        for (int k = 0; k < kRaysAtOnce; k++) tried[k] = -(kLargest + 0.1f * ray_step(n + k)) / leader;
        sum_rays<kCols, kHalf, kRaysAtOnce>(x, w, wx, tried, sums);
        for (int k = 0; k < kRaysAtOnce; k++) {
            const Reals product = sums[k].product, square = sums[k].square, fit = product / square;
            const auto better = (square > 0.0f) & (product * product > best * square);
            scale = better ? fit : scale;
            best = better ? fit * product : best;
            inverse = better ? tried[k] : inverse;
        }
    }
    store_lanes(found.scale + at, scale);
    store_lanes(found.inverse + at, inverse);
    store_lanes(found.offset + at, all_lanes(kLargest));
}

template <int kCols, int kHalf>
inline void search_rays(const Tile& t, RayFound& found) {
    for (int at = 0; at < t.active; at += kStrip) {
        search_ray<kCols, kHalf>(t.turned + at * kCols, t.turned_weights + at * kCols, at, found);
    }
}

// w = x^2, what ggml weighs with where there is no importance.
inline void weigh_by_squares(int sub_cols, Tile& t) {
    const int lanes = static_cast<int>(ceil_div(t.active, kSide * kStrip)) * kSide * kStrip;
    for (int i = 0; i < lanes * sub_cols; i++) t.turned_weights[i] = t.turned[i] * t.turned[i];
}

// Codes from -half to half - 1, plus half, by the stored scale; where that is 0, those of the search.
inline void put_ray_codes(const float* SHARDQ_RESTRICT x, int cols, float d, int half,
                          uint8_t* SHARDQ_RESTRICT codes) {
    for (int i = 0; i < cols; i++) {
        const float level = nearest_held(x[i] / d, -half, half - 1);
        codes[i] = static_cast<uint8_t>(static_cast<int>(level) + half);
    }
}

inline void put_found_codes(const float* SHARDQ_RESTRICT x, int cols, int half, const RayFound& found, int sub,
                            uint8_t* SHARDQ_RESTRICT codes) {
    const float inverse = found.inverse[sub], offset = found.offset[sub];
    for (int i = 0; i < cols; i++) {
        const float level = nearest_held(inverse * x[i], -half, half - 1) + offset;
        codes[i] = static_cast<uint8_t>(static_cast<int>(level));
    }
}
