// ggml's searches for scales of signed codes, a sub-block in each lane (make_qx_quants with its first kind of error, and
// make_q3_quants, of ggml 0.25.3). Part of bodies.inl; contract_blocks.py has the formulas.

// What the search found: w = scale * (code - half). Its codes are nearest(inverse * x) + offset; see LineFound.
struct alignas(64) RayFound {
    float scale[kTileSubs], inverse[kTileSubs], offset[kTileSubs];
};

struct RaySums {
    Reals product, square;
};

// The first number of largest magnitude, and that magnitude.
struct LaneLeader {
    Reals value, size;
};

template <int kCols>
inline LaneLeader lane_leader(const float* x) {
    LaneLeader found = {};
    for (int i = 0; i < kCols; i++) {
        const Reals value = load_lanes(x + i * kStrip), size = magnitude_lanes(value);
        found.value = size > found.size ? value : found.value;
        found.size = size > found.size ? size : found.size;
    }
    return found;
}

template <int kCols, int kHalf>
inline RaySums sum_ray(const float* x, const float* w, const float* wx, Reals inverse) {
    RaySums sums = {};
    for (int i = 0; i < kCols; i++) {
        const Reals level = clamp_lanes(nearest_lanes(inverse * load_lanes(x + i * kStrip)),
                                        static_cast<float>(-kHalf), static_cast<float>(kHalf - 1));
        sums.product += load_lanes(wx + i * kStrip) * level;
        sums.square += load_lanes(w + i * kStrip) * level * level;
    }
    return sums;
}

template <int kCols, int kHalf>
inline void search_ray(const float* x, const float* w, int at, RayFound& found) {
    constexpr auto kLargest = static_cast<float>(kHalf);
    alignas(64) float wx[kCols * kStrip];
    for (int i = 0; i < kCols; i++) {
        store_lanes(wx + i * kStrip, load_lanes(w + i * kStrip) * load_lanes(x + i * kStrip));
    }
    const LaneLeader leader = lane_leader<kCols>(x);
    Reals inverse = -kLargest / leader.value;
    const RaySums first = sum_ray<kCols, kHalf>(x, w, wx, inverse);
    Reals scale = first.square != 0.0f ? first.product / first.square : Reals{};
    Reals best = scale * first.product;
    for (int i = -9; i <= 9; i++) {
        if (i == 0) continue;
        const Reals tried = -(kLargest + 0.1f * static_cast<float>(i)) / leader.value;
        const RaySums sums = sum_ray<kCols, kHalf>(x, w, wx, tried);
        const auto better = (sums.square > 0.0f) & (sums.product * sums.product > best * sums.square);
        const Reals fit = sums.product / sums.square;
        scale = better ? fit : scale;
        best = better ? fit * sums.product : best;
        inverse = better ? tried : inverse;
    }
    const auto tiny = leader.size < kTiny;
    store_lanes(found.scale + at, tiny ? Reals{} : scale);
    store_lanes(found.inverse + at, tiny ? Reals{} : inverse);
    store_lanes(found.offset + at, tiny ? Reals{} : all_lanes(kLargest));
}

template <int kCols, int kHalf>
inline void search_rays(const Tile& t, RayFound& found) {
    for (int at = 0; at < kTileSubs; at += kStrip) {
        search_ray<kCols, kHalf>(t.turned + at * kCols, t.turned_weights + at * kCols, at, found);
    }
}

// w = x^2, what ggml weighs with where there is no importance.
inline void weigh_by_squares(int cols, Tile& t) {
    for (int i = 0; i < kTileSubs * cols; i++) t.turned_weights[i] = t.turned[i] * t.turned[i];
}

// Codes from -half to half - 1, plus half, by the stored scale; where that is 0, those of the search.
inline void put_ray_codes(const float* SHARDQ_RESTRICT x, int cols, float d, float half,
                          uint8_t* SHARDQ_RESTRICT codes) {
    for (int i = 0; i < cols; i++) {
        const float level = clamp_whole(nearest_whole(x[i] / d), -half, half - 1.0f) + half;
        codes[i] = static_cast<uint8_t>(static_cast<int>(level));
    }
}

inline void put_found_codes(const float* SHARDQ_RESTRICT x, int cols, float half, const RayFound& found, int sub,
                            uint8_t* SHARDQ_RESTRICT codes) {
    const float inverse = found.inverse[sub], offset = found.offset[sub];
    for (int i = 0; i < cols; i++) {
        const float level = clamp_whole(nearest_whole(inverse * x[i]), -half, half - 1.0f) + offset;
        codes[i] = static_cast<uint8_t>(static_cast<int>(level));
    }
}

// make_q3_quants: one level at a time is changed where that makes the error smaller, at most five times over all of
// them. A lane that a pass leaves as it was is left by all later ones, so lanes go on together. The levels [16][16] are
// by sub-block, from 0 to 7.
template <int kCols, int kHalf>
inline void descend_ray(const float* x, int at, float* scales, uint8_t* codes) {
    constexpr auto kLowest = static_cast<float>(-kHalf), kHighest = static_cast<float>(kHalf - 1);
    alignas(64) float levels[kCols * kStrip];
    const LaneLeader leader = lane_leader<kCols>(x);
    const Reals inverse = -static_cast<float>(kHalf) / leader.value;
    Reals product = {}, square = {};
    for (int i = 0; i < kCols; i++) {
        const Reals value = load_lanes(x + i * kStrip), w = value * value;
        const Reals level = clamp_lanes(nearest_lanes(inverse * value), kLowest, kHighest);
        store_lanes(levels + i * kStrip, level);
        product += w * value * level;
        square += w * level * level;
    }
    for (int pass = 0; pass < 5; pass++) {
        Reals changed = {};
        for (int i = 0; i < kCols; i++) {
            const Reals value = load_lanes(x + i * kStrip), w = value * value, wx = w * value;
            const Reals level = load_lanes(levels + i * kStrip);
            const Reals less_product = product - wx * level, less_square = square - w * level * level;
            const Reals other =
                clamp_lanes(nearest_lanes(value * less_square / less_product), kLowest, kHighest);
            const Reals new_product = less_product + wx * other, new_square = less_square + w * other * other;
            const auto better = (less_product > 0.0f) & (other != level) & (new_square > 0.0f) &
                                (new_product * new_product * square > product * product * new_square);
            store_lanes(levels + i * kStrip, better ? other : level);
            product = better ? new_product : product;
            square = better ? new_square : square;
            changed = better ? all_lanes(1.0f) : changed;
        }
        alignas(64) float any[kStrip];
        store_lanes(any, changed);
        float most = 0.0f;
        for (int i = 0; i < kStrip; i++) most = any[i] > most ? any[i] : most;
        if (most == 0.0f) break;
    }
    const auto tiny = leader.size < kTiny;
    const Reals scale = square > 0.0f ? product / square : Reals{};
    store_lanes(scales + at, tiny ? Reals{} : scale);
    for (int i = 0; i < kCols; i++) {
        const Reals level = load_lanes(levels + i * kStrip) + static_cast<float>(kHalf);
        store_lanes(levels + i * kStrip, tiny ? Reals{} : level);
    }
    for (int lane = 0; lane < kStrip; lane++) {
        for (int i = 0; i < kCols; i++) {
            codes[(at + lane) * kCols + i] = static_cast<uint8_t>(static_cast<int>(levels[i * kStrip + lane]));
        }
    }
}
