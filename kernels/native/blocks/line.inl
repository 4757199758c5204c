// ggml's searches for affine codes, a sub-block in each lane (make_qkx2_quants and make_qkx3_quants of ggml 0.25.3).
// Part of bodies.inl; contract_blocks.py has the formulas.

// What the search found: w = scale * code + low. Its codes are nearest(inverse * (x - base)), which is how they come
// back where the stored scale is 0, and then the only use of them.
struct alignas(64) LineFound {
    float scale[kTileSubs], least[kTileSubs];  // least is -low
    float inverse[kTileSubs], base[kTileSubs];

    void take(const LineFound& from, int at, int to) {
        scale[to] = from.scale[at];
        least[to] = from.least[at];
        inverse[to] = from.inverse[at];
        base[to] = from.base[at];
    }
    void clear(int sub, float first) {  // of zeros, whose first is the smallest
        scale[sub] = inverse[sub] = base[sub] = 0.0f;
        least[sub] = -first;
    }
};

struct LineSteps {
    float first, step;
    int count;  // of candidates; ggml's nstep + 1
};

template <int kCols>
struct alignas(64) LaneLevels {
    float each[kSide][kCols * kStrip];
};

// Of kSide vectors of sub-blocks: a line, and what is known of the numbers it is to fit.
struct Lines {
    Reals scale[kSide], low[kSide];
};

struct LineSums {
    Reals ones[kSide], weights[kSide];  // of w and of w * x
};

// The levels of x under each inverse, and the lines that fit them best. determined is not above 0 where there is none.
template <int kCols, int kTop>
inline void fit_lines(const float* x, const float* w, const Reals* inverse, const Reals* low, const LineSums& sums,
                      LaneLevels<kCols>& levels, Lines& fit, Reals* determined) {
    Reals sum[kSide] = {}, square[kSide] = {}, product[kSide] = {};
    for (int i = 0; i < kCols; i++) {
        for (int k = 0; k < kSide; k++) {
            const int at = (k * kCols + i) * kStrip;
            const Reals value = load_lanes(x + at), level = nearest_lanes(inverse[k] * (value - low[k]), 0, kTop);
            store_lanes(levels.each[k] + i * kStrip, level);
            const Reals one = load_lanes(w + at) * level;
            sum[k] += one;
            square[k] += one * level;
            product[k] += one * value;
        }
    }
    for (int k = 0; k < kSide; k++) {
        determined[k] = sums.ones[k] * square[k] - sum[k] * sum[k];
        const Reals scale = (sums.ones[k] * product[k] - sums.weights[k] * sum[k]) / determined[k];
        const Reals least = (square[k] * sums.weights[k] - sum[k] * product[k]) / determined[k];
        fit.scale[k] = least > 0.0f ? product[k] / square[k] : scale;
        fit.low[k] = least > 0.0f ? Reals{} : least;
    }
}

template <int kCols, bool kAbsolute>
inline void line_errors(const float* x, const float* w, const Lines& lines, const LaneLevels<kCols>& levels,
                        Reals* error) {
    for (int k = 0; k < kSide; k++) error[k] = Reals{};
    for (int i = 0; i < kCols; i++) {
        for (int k = 0; k < kSide; k++) {
            const int at = (k * kCols + i) * kStrip;
            const Reals level = load_lanes(levels.each[k] + i * kStrip);
            const Reals difference = lines.scale[k] * level + lines.low[k] - load_lanes(x + at);
            const Reals size = kAbsolute ? magnitude_lanes(difference) : difference * difference;
            error[k] += load_lanes(w + at) * size;
        }
    }
}

// The smallest number, but not above 0, the largest, and sums.
template <int kCols>
inline void measure_lines(const float* x, const float* w, Reals* low, Reals* high, LineSums& sums) {
    for (int k = 0; k < kSide; k++) {
        const float *from = x + k * kCols * kStrip, *weights = w + k * kCols * kStrip;
        low[k] = high[k] = load_lanes(from);
        sums.ones[k] = load_lanes(weights);
        sums.weights[k] = load_lanes(weights) * low[k];
        for (int i = 1; i < kCols; i++) {
            const Reals value = load_lanes(from + i * kStrip), weight = load_lanes(weights + i * kStrip);
            low[k] = value < low[k] ? value : low[k];
            high[k] = value > high[k] ? value : high[k];
            sums.ones[k] += weight;
            sums.weights[k] += weight * value;
        }
        low[k] = low[k] > 0.0f ? Reals{} : low[k];
    }
}

template <int kCols, int kTop, bool kAbsolute>
inline void search_side(const float* x, const float* w, const LineSteps& steps, int at, LineFound& found) {
    constexpr auto kHighest = static_cast<float>(kTop);
    LaneLevels<kCols> levels;
    LineSums sums;
    Lines best, fit;
    Reals high[kSide], flat_low[kSide], inverse[kSide], base[kSide], tried[kSide], determined[kSide];
    Reals least_error[kSide], error[kSide];
    measure_lines<kCols>(x, w, best.low, high, sums);
    for (int k = 0; k < kSide; k++) {
        flat_low[k] = base[k] = best.low[k];
        inverse[k] = kHighest / (high[k] - best.low[k]);
        best.scale[k] = 1.0f / inverse[k];
    }
    fit_lines<kCols, kTop>(x, w, inverse, best.low, sums, levels, fit, determined);  // for its levels
    line_errors<kCols, kAbsolute>(x, w, best, levels, least_error);
    for (int i = 0; i < steps.count; i++) {
        const float factor = steps.first + steps.step * static_cast<float>(i) + kHighest;
        for (int k = 0; k < kSide; k++) tried[k] = factor / (high[k] - best.low[k]);
        fit_lines<kCols, kTop>(x, w, tried, best.low, sums, levels, fit, determined);
        line_errors<kCols, kAbsolute>(x, w, fit, levels, error);
        for (int k = 0; k < kSide; k++) {
            const auto better = (determined[k] > 0.0f) & (error[k] < least_error[k]);
            least_error[k] = better ? error[k] : least_error[k];
            inverse[k] = better ? tried[k] : inverse[k];
            base[k] = better ? best.low[k] : base[k];
            best.scale[k] = better ? fit.scale[k] : best.scale[k];
            best.low[k] = better ? fit.low[k] : best.low[k];
        }
    }
    for (int k = 0; k < kSide; k++) {
        const auto flat = high[k] == flat_low[k];
        const int to = at + k * kStrip;
        store_lanes(found.scale + to, flat ? Reals{} : best.scale[k]);
        store_lanes(found.least + to, flat ? -flat_low[k] : -best.low[k]);
        store_lanes(found.inverse + to, flat ? Reals{} : inverse[k]);
        store_lanes(found.base + to, flat ? Reals{} : base[k]);
    }
}

template <int kCols, int kTop, bool kAbsolute>
inline void search_lines(const Tile& t, const LineSteps& steps, LineFound& found) {
    for (int at = 0; at < t.active; at += kSide * kStrip) {
        const int from = at * kCols;
        search_side<kCols, kTop, kAbsolute>(t.turned + from, t.turned_weights + from, steps, at, found);
    }
}

// Codes of a sub-block by its stored numbers, x = d * code - m; where d is 0, those of the search.
inline void put_line_codes(const float* SHARDQ_RESTRICT x, int cols, float d, float m, int top,
                           uint8_t* SHARDQ_RESTRICT codes) {
    for (int i = 0; i < cols; i++) {
        codes[i] = static_cast<uint8_t>(static_cast<int>(nearest_held((x[i] + m) / d, 0, top)));
    }
}

inline void put_found_codes(const float* SHARDQ_RESTRICT x, int cols, int top, const LineFound& found, int sub,
                            uint8_t* SHARDQ_RESTRICT codes) {
    const float inverse = found.inverse[sub], base = found.base[sub];
    for (int i = 0; i < cols; i++) {
        const float level = nearest_held(inverse * (x[i] - base), 0, top);
        codes[i] = static_cast<uint8_t>(static_cast<int>(level));
    }
}
