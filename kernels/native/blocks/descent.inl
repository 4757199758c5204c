// ggml's search for the scales of Q3_K, a sub-block in each lane (make_q3_quants of ggml 0.25.3). Part of bodies.inl;
// contract_blocks.py has the formulas.

// What make_q3_quants keeps of kSide vectors of sub-blocks.
template <int kCols>
struct alignas(64) Descent {
    float levels[kSide][kCols * kStrip];
    Reals product[kSide], square[kSide];
};

// One pass over all levels: each is changed where that makes the error smaller. Whether any was.
template <int kCols, int kHalf>
inline bool descend_once(const float* x, Descent<kCols>& d) {
    Ints changed = {};
    for (int i = 0; i < kCols; i++) {
        for (int k = 0; k < kSide; k++) {
            const Reals value = load_lanes(x + (k * kCols + i) * kStrip), w = value * value, wx = w * value;
            const Reals level = load_lanes(d.levels[k] + i * kStrip);
            const Reals less_product = d.product[k] - wx * level, less_square = d.square[k] - w * level * level;
            const Reals other = nearest_lanes(value * less_square / less_product, -kHalf, kHalf - 1);
            const Reals product = less_product + wx * other, square = less_square + w * other * other;
            const auto better = (less_product > 0.0f) & (other != level) & (square > 0.0f) &
                                (product * product * d.square[k] > d.product[k] * d.product[k] * square);
            store_lanes(d.levels[k] + i * kStrip, better ? other : level);
            d.product[k] = better ? product : d.product[k];
            d.square[k] = better ? square : d.square[k];
            changed = better ? Ints{} + 1 : changed;
        }
    }
    alignas(64) int32_t any[kStrip];
    std::memcpy(any, &changed, sizeof any);
    int32_t sum = 0;
    for (int i = 0; i < kStrip; i++) sum += any[i];
    return sum != 0;
}

// make_q3_quants, at most five passes. A sub-block that a pass leaves as it was is left by all later ones, so lanes go
// on together. The levels are by sub-block, from 0 to 2 half - 1.
template <int kCols, int kHalf>
inline void descend_rays(const float* x, int at, float* scales, uint8_t* codes) {
    Descent<kCols> d;
    for (int k = 0; k < kSide; k++) {
        const float* from = x + k * kCols * kStrip;
        const Reals inverse = -static_cast<float>(kHalf) / lane_leader<kCols>(from);
        d.product[k] = d.square[k] = Reals{};
        for (int i = 0; i < kCols; i++) {
            const Reals value = load_lanes(from + i * kStrip), w = value * value;
            const Reals level = nearest_lanes(inverse * value, -kHalf, kHalf - 1);
            store_lanes(d.levels[k] + i * kStrip, level);
            d.product[k] += w * value * level;
            d.square[k] += w * level * level;
        }
    }
    for (int pass = 0; pass < 5 && descend_once<kCols, kHalf>(x, d); pass++) {
    }
    for (int k = 0; k < kSide; k++) {
        const Reals scale = d.square[k] > 0.0f ? d.product[k] / d.square[k] : Reals{};
        store_lanes(scales + at + k * kStrip, scale);
        for (int lane = 0; lane < kStrip; lane++) {
            uint8_t* to = codes + (at + k * kStrip + lane) * kCols;
            const float* levels = d.levels[k] + lane;
            for (int i = 0; i < kCols; i++) to[i] = static_cast<uint8_t>(static_cast<int>(levels[i * kStrip]) + kHalf);
        }
    }
}
