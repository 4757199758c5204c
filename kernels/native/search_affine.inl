// Scales and zero points, or biases, of affine codes by weighted least squares. Part of bodies.inl; contract.py has the
// formulas.

constexpr int kLinesAtOnce = kAtOnce / 2;

// w is about scale * q + low.
struct Line {
    Reals scale, low;
};

// Sums of e and e * w over a group.
struct Totals {
    Reals weight, product;
};

template <class T>
inline Totals find_totals(GroupRows<T>& g, Strip& s) {
    Totals all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Totals sum = {};
        for (int64_t j = 0; j < cols; j++) {
            sum.weight += load_lanes(s.e + j * kStrip);
            sum.product += load_lanes(s.ew + j * kStrip);
        }
        all.weight += sum.weight;
        all.product += sum.product;
    }
    return all;
}

// Codes of the lines, then the lines that fit these codes best; a line stays where its codes are all the same.
template <class T, int kCount>
inline void fit_lines(GroupRows<T>& g, const Totals& totals, Reals top, Strip& s, Line* lines) {
    Reals first[kCount] = {}, square[kCount] = {}, product[kCount] = {}, inverse[kCount], low[kCount];
    for (int k = 0; k < kCount; k++) {
        inverse[k] = 1.0f / lines[k].scale;
        low[k] = lines[k].low;
    }
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals f[kCount] = {}, q2[kCount] = {}, p[kCount] = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), e = load_lanes(s.e + j * kStrip);
            const Reals ew = load_lanes(s.ew + j * kStrip);
            for (int k = 0; k < kCount; k++) {
                const Reals q = level_of((w - low[k]) * inverse[k], Reals{}, top), eq = e * q;
                f[k] += eq;
                q2[k] += eq * q;
                p[k] += q * ew;
            }
        }
        for (int k = 0; k < kCount; k++) {
            first[k] += f[k];
            square[k] += q2[k];
            product[k] += p[k];
        }
    }
    for (int k = 0; k < kCount; k++) {
        const Reals determinant = totals.weight * square[k] - first[k] * first[k];
        const Reals scale = (totals.weight * product[k] - first[k] * totals.product) / determinant;
        const Reals foot = (totals.product - scale * first[k]) / totals.weight;
        lines[k].scale = determinant > 0.0f ? scale : lines[k].scale;
        lines[k].low = determinant > 0.0f ? foot : lines[k].low;
    }
}

// With whole zero points: the scale that fits codes of the line best, less its zero point, which is returned.
template <class T, int kCount>
inline void fit_scales_to_zeros(GroupRows<T>& g, Reals top, Strip& s, Line* lines) {
    Reals inverse[kCount], lowest[kCount], highest[kCount], product[kCount] = {}, square[kCount] = {};
    for (int k = 0; k < kCount; k++) {
        const Reals zero = level_of(-lines[k].low / lines[k].scale, Reals{}, top);
        inverse[k] = 1.0f / lines[k].scale;
        lowest[k] = -zero;
        highest[k] = top - zero;
        lines[k].low = zero;
    }
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals p[kCount] = {}, q2[kCount] = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), e = load_lanes(s.e + j * kStrip);
            const Reals ew = load_lanes(s.ew + j * kStrip);
            for (int k = 0; k < kCount; k++) {
                const Reals q = level_of(w * inverse[k], lowest[k], highest[k]);
                p[k] += q * ew;
                q2[k] += (e * q) * q;
            }
        }
        for (int k = 0; k < kCount; k++) {
            product[k] += p[k];
            square[k] += q2[k];
        }
    }
    for (int k = 0; k < kCount; k++) lines[k].scale = product[k] / square[k];
}

// What stored numbers decode to, less the weight; `low` is a zero point or a bias.
template <DecodingRule kRule, bool kDivide>
inline Reals line_difference(Reals w, Reals scale, Reals inverse, Reals low, Reals top) {
    if constexpr (kRule == DecodingRule::Zero) {
        return w - scale * level_of(kDivide ? w / scale : w * inverse, -low, top - low);
    } else {
        const Reals q = level_of(kDivide ? (w - low) / scale : (w - low) * inverse, Reals{}, top);
        return w - (scale * q + low);
    }
}

template <class T, DecodingRule kRule, int kCount, bool kDivide>
inline void measure_lines(GroupRows<T>& g, Reals top, Strip& s, const Line* lines, Reals* errors) {
    Reals scale[kCount], inverse[kCount], low[kCount];
    for (int k = 0; k < kCount; k++) {
        scale[k] = lines[k].scale;
        inverse[k] = 1.0f / scale[k];
        low[k] = lines[k].low;
        errors[k] = Reals{};
    }
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals sum[kCount] = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), e = load_lanes(s.e + j * kStrip);
            for (int k = 0; k < kCount; k++) {
                const Reals difference = line_difference<kRule, kDivide>(w, scale[k], inverse[k], low[k], top);
                sum[k] += (difference * difference) * e;
            }
        }
        for (int k = 0; k < kCount; k++) errors[k] += sum[k];
    }
}

struct BestLine {
    Line line;
    Reals error;
};

template <class T, DecodingRule kRule, int kCount>
inline void try_ranges(GroupRows<T>& g, const Extremes& range, const float* factors, const Totals& totals,
                       const AffineSearch& search, Reals top, Strip& s, BestLine& best) {
    const Reals infinity = reals_of(Ints{} + 0x7f800000);
    Line lines[kCount];
    for (int k = 0; k < kCount; k++) {
        const Reals low = -range.low * factors[k], high = range.high * factors[k];
        lines[k] = {(high - low) / top, low};
    }
    for (int i = 0; i < search.sweeps; i++) fit_lines<T, kCount>(g, totals, top, s, lines);
    if constexpr (kRule == DecodingRule::Zero) fit_scales_to_zeros<T, kCount>(g, top, s, lines);
    for (int k = 0; k < kCount; k++) {
        lines[k].scale = stored_lanes(lines[k].scale, search.format);
        if constexpr (kRule == DecodingRule::Bias) lines[k].low = stored_lanes(lines[k].low, search.format);
    }
    Reals errors[kCount];
    measure_lines<T, kRule, kCount, false>(g, top, s, lines, errors);
    for (int k = 0; k < kCount; k++) {
        const Reals size = magnitude_lanes(lines[k].scale), place = magnitude_lanes(lines[k].low);
        const Reals error =
            ((size >= search.least) & (size < infinity) & (place < infinity)) ? errors[k] : infinity;
        best.line.scale = error < best.error ? lines[k].scale : best.line.scale;
        best.line.low = error < best.error ? lines[k].low : best.line.low;
        best.error = error < best.error ? error : best.error;
    }
}

template <class T, DecodingRule kRule>
inline void search_affine_rows(const Weights& w, const AffineSearch& search, float* scales, float* offsets,
                               double* losses) {
    const int64_t groups = ceil_div(w.cols, search.group);
    const Reals top = all_lanes(static_cast<float>((1 << search.bits) - 1));
    const Reals infinity = reals_of(Ints{} + 0x7f800000);
    std::memset(losses, 0, static_cast<size_t>(2 * w.rows) * sizeof *losses);
    for_group_rows<T>(w, search.group, search.weighing, [&](GroupRows<T>& g, int64_t row, int64_t k, Strip& s) {
        const float least_edge = kRule == DecodingRule::Zero ? 0.0f : -float_of_bits(0x7f800000u);
        const Extremes range = find_strip_extremes<T>(g, least_edge, s);
        const Totals totals = find_totals<T>(g, s);
        const Line old = {load_groups(scales, row, k, groups, g.lanes), load_groups(offsets, row, k, groups, g.lanes)};
        BestLine best = {old, infinity};
        int64_t i = 0;
        for (; i + kLinesAtOnce <= search.factor_count; i += kLinesAtOnce) {
            try_ranges<T, kRule, kLinesAtOnce>(g, range, search.factors + i, totals, search, top, s, best);
        }
        for (; i < search.factor_count; i++) {
            try_ranges<T, kRule, 1>(g, range, search.factors + i, totals, search, top, s, best);
        }
        const Line both[2] = {old, best.line};
        Reals errors[2];
        measure_lines<T, kRule, 2, true>(g, top, s, both, errors);
        const Reals kept = errors[1] < errors[0] ? errors[1] : errors[0];
        store_groups(scales, row, k, groups, g.lanes, errors[1] < errors[0] ? best.line.scale : old.scale);
        store_groups(offsets, row, k, groups, g.lanes, errors[1] < errors[0] ? best.line.low : old.low);
        add_losses(losses, row, g.lanes, errors[0], kept);
    });
}

template <DecodingRule kRule>
inline void search_affine_any(const Weights& w, const AffineSearch& search, float* scales, float* offsets,
                              double* losses) {
    if (w.dtype == Dtype::BF16) return search_affine_rows<Bf16, kRule>(w, search, scales, offsets, losses);
    if (w.dtype == Dtype::F16) return search_affine_rows<F16, kRule>(w, search, scales, offsets, losses);
    search_affine_rows<F32, kRule>(w, search, scales, offsets, losses);
}

void search_affine(const Weights& w, const AffineSearch& search, float* scales, float* offsets, double* losses) {
    if (search.rule == DecodingRule::Zero) {
        return search_affine_any<DecodingRule::Zero>(w, search, scales, offsets, losses);
    }
    search_affine_any<DecodingRule::Bias>(w, search, scales, offsets, losses);
}
