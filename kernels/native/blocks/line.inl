// ggml's searches for affine codes, a sub-block in each lane (make_qkx2_quants and make_qkx3_quants of ggml 0.25.3).
// Part of bodies.inl; contract_blocks.py has the formulas.

// What the search found: w = scale * code + low. Its codes are nearest(inverse * (x - base)), which is how they come
// back where the stored scale is 0, and then the only use of them.
struct alignas(64) LineFound {
    float scale[kTileSubs], least[kTileSubs];  // least is -low
    float inverse[kTileSubs], base[kTileSubs];
};

struct LineSteps {
    float first, step;
    int count;  // of candidates; ggml's nstep + 1
};

template <int kCols>
struct alignas(64) LaneLevels {
    float each[kCols * kStrip];
};

struct LineSums {
    Reals ones, weights;  // of w and of w * x
};

struct LineFit {
    Reals scale, low, better;  // better is not 0 where there is a fit
};

// The levels of a candidate, and the line that fits them best.
template <int kCols, int kTop>
inline LineFit fit_line(const float* x, const float* w, Reals inverse, Reals low, const LineSums& sums,
                        LaneLevels<kCols>& levels) {
    Reals sum = {}, square = {}, product = {};
    for (int i = 0; i < kCols; i++) {
        const Reals value = load_lanes(x + i * kStrip), weight = load_lanes(w + i * kStrip);
        const Reals level = clamp_lanes(nearest_lanes(inverse * (value - low)), 0.0f, static_cast<float>(kTop));
        store_lanes(levels.each + i * kStrip, level);
        const Reals one = weight * level;
        sum += one;
        square += one * level;
        product += one * value;
    }
    const Reals determinant = sums.ones * square - sum * sum;
    const Reals scale = (sums.ones * product - sums.weights * sum) / determinant;
    const Reals least = (square * sums.weights - sum * product) / determinant;
    const Reals one = all_lanes(1.0f);
    return {least > 0.0f ? product / square : scale, least > 0.0f ? Reals{} : least,
            determinant > 0.0f ? one : Reals{}};
}

template <int kCols, bool kAbsolute>
inline Reals line_error(const float* x, const float* w, Reals scale, Reals low, const LaneLevels<kCols>& levels) {
    Reals error = {};
    for (int i = 0; i < kCols; i++) {
        const Reals level = load_lanes(levels.each + i * kStrip);
        const Reals difference = scale * level + low - load_lanes(x + i * kStrip);
        const Reals size = kAbsolute ? magnitude_lanes(difference) : difference * difference;
        error += load_lanes(w + i * kStrip) * size;
    }
    return error;
}

template <int kCols, int kTop, bool kAbsolute>
inline void search_line(const float* x, const float* w, const LineSteps& steps, int at, LineFound& found) {
    constexpr auto kHighest = static_cast<float>(kTop);
    LaneLevels<kCols> levels;
    Reals low = load_lanes(x), high = low;
    LineSums sums = {load_lanes(w), load_lanes(w) * low};
    for (int i = 1; i < kCols; i++) {
        const Reals value = load_lanes(x + i * kStrip), weight = load_lanes(w + i * kStrip);
        low = value < low ? value : low;
        high = value > high ? value : high;
        sums.ones += weight;
        sums.weights += weight * value;
    }
    low = low > 0.0f ? Reals{} : low;
    const Reals flat_low = low;
    const Reals first_inverse = kHighest / (high - low);
    for (int i = 0; i < kCols; i++) {
        const Reals scaled = first_inverse * (load_lanes(x + i * kStrip) - low);
        store_lanes(levels.each + i * kStrip, clamp_lanes(nearest_lanes(scaled), 0.0f, kHighest));
    }
    Reals scale = 1.0f / first_inverse, inverse = first_inverse, base = low;
    Reals best = line_error<kCols, kAbsolute>(x, w, scale, low, levels);
    for (int i = 0; i < steps.count; i++) {
        const float factor = steps.first + steps.step * static_cast<float>(i) + kHighest;
        const Reals tried = factor / (high - low);
        const LineFit fit = fit_line<kCols, kTop>(x, w, tried, low, sums, levels);
        const Reals error = line_error<kCols, kAbsolute>(x, w, fit.scale, fit.low, levels);
        const auto better = (fit.better > 0.0f) & (error < best);
        best = better ? error : best;
        scale = better ? fit.scale : scale;
        inverse = better ? tried : inverse;
        base = better ? low : base;
        low = better ? fit.low : low;
    }
    const auto flat = high == flat_low;
    store_lanes(found.scale + at, flat ? Reals{} : scale);
    store_lanes(found.least + at, flat ? -flat_low : -low);
    store_lanes(found.inverse + at, flat ? Reals{} : inverse);
    store_lanes(found.base + at, flat ? Reals{} : base);
}

// All sub-blocks of a tile that is turned.
template <int kCols, int kTop, bool kAbsolute>
inline void search_lines(const Tile& t, const LineSteps& steps, LineFound& found) {
    for (int at = 0; at < kTileSubs; at += kStrip) {
        const int from = at * kCols;
        search_line<kCols, kTop, kAbsolute>(t.turned + from, t.turned_weights + from, steps, at, found);
    }
}

// Codes of a sub-block by its stored numbers, x = d * code - m; where d is 0, those of the search.
inline void put_line_codes(const float* SHARDQ_RESTRICT x, int cols, float d, float m, float top,
                           uint8_t* SHARDQ_RESTRICT codes) {
    for (int i = 0; i < cols; i++) {
        codes[i] = static_cast<uint8_t>(static_cast<int>(clamp_whole(nearest_whole((x[i] + m) / d), 0.0f, top)));
    }
}

inline void put_found_codes(const float* SHARDQ_RESTRICT x, int cols, float top, const LineFound& found, int sub,
                            uint8_t* SHARDQ_RESTRICT codes) {
    const float inverse = found.inverse[sub], base = found.base[sub];
    for (int i = 0; i < cols; i++) {
        const float level = clamp_whole(nearest_whole(inverse * (x[i] - base)), 0.0f, top);
        codes[i] = static_cast<uint8_t>(static_cast<int>(level));
    }
}
