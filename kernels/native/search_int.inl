// Scales of symmetric integers by weighted least squares. Part of bodies.inl; contract.py has the formulas.

// Sums of e * q * w and e * q * q over a group for kCount candidate inverse scales.
template <int kCount>
struct Fit {
    Reals inverse[kCount], product[kCount], square[kCount];
};

template <class T, int kCount>
inline void fit_scales(GroupRows<T>& g, Reals lowest, Reals highest, Strip& s, Fit<kCount>& f) {
    for (int k = 0; k < kCount; k++) f.product[k] = f.square[k] = Reals{};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals inverse[kCount], product[kCount] = {}, square[kCount] = {};
        for (int k = 0; k < kCount; k++) inverse[k] = f.inverse[k];
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), e = load_lanes(s.e + j * kStrip);
            const Reals ew = load_lanes(s.ew + j * kStrip);
            for (int k = 0; k < kCount; k++) {
                const Reals q = level_of(w * inverse[k], lowest, highest);
                product[k] += q * ew;
                square[k] += (e * q) * q;
            }
        }
        for (int k = 0; k < kCount; k++) {
            f.product[k] += product[k];
            f.square[k] += square[k];
        }
    }
}

// The best scale so far, and how much of the weighted sum of squares it explains: P * (P / S).
struct BestFit {
    Reals scale, gain;
};

template <class T, int kCount>
inline void try_factors(GroupRows<T>& g, Reals base, const float* factors, Reals lowest, Reals highest, Strip& s,
                        BestFit& best) {
    Fit<kCount> f;
    for (int k = 0; k < kCount; k++) f.inverse[k] = base * factors[k];
    fit_scales<T, kCount>(g, lowest, highest, s, f);
    for (int k = 0; k < kCount; k++) {
        const Reals scale = f.product[k] / f.square[k], gain = f.product[k] * scale;
        best.scale = gain > best.gain ? scale : best.scale;
        best.gain = gain > best.gain ? gain : best.gain;
    }
}

template <class T>
inline void try_all_factors(GroupRows<T>& g, Reals base, const IntSearch& search, Reals lowest, Reals highest, Strip& s,
                            BestFit& best) {
    int64_t i = 0;
    for (; i + kAtOnce <= search.factor_count; i += kAtOnce) {
        try_factors<T, kAtOnce>(g, base, search.factors + i, lowest, highest, s, best);
    }
    for (; i < search.factor_count; i++) try_factors<T, 1>(g, base, search.factors + i, lowest, highest, s, best);
}

// Weighted errors under two scales, with the codes that divisions give.
struct TwoErrors {
    Reals first, second;
};

template <class T>
inline TwoErrors compare_scales(GroupRows<T>& g, Reals first, Reals second, Reals lowest, Reals highest, Strip& s) {
    TwoErrors all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        TwoErrors sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), e = load_lanes(s.e + j * kStrip);
            const Reals one = w - first * level_of(w / first, lowest, highest);
            const Reals other = w - second * level_of(w / second, lowest, highest);
            sum.first += (one * one) * e;
            sum.second += (other * other) * e;
        }
        all.first += sum.first;
        all.second += sum.second;
    }
    return all;
}

template <class T>
inline void search_int_rows(const Weights& w, const IntSearch& search, float* scales, double* losses) {
    const int64_t groups = ceil_div(w.cols, search.group);
    const float half = static_cast<float>(1 << (search.bits - 1));
    const Reals lowest = all_lanes(-half), highest = all_lanes(half - 1.0f);
    std::memset(losses, 0, static_cast<size_t>(2 * w.rows) * sizeof *losses);
    for_group_rows<T>(w, search.group, search.weighing, [&](GroupRows<T>& g, int64_t row, int64_t k, Strip& s) {
        const Extremes extremes = find_strip_extremes<T>(g, 0.0f, s);
        const Reals most = larger_of(extremes.high, extremes.low);
        Reals base = half / most;
        if (search.signs != Signs::Positive) base = extremes.high < extremes.low ? base : -base;
        BestFit best = {};
        try_all_factors<T>(g, base, search, lowest, highest, s, best);
        if (search.signs == Signs::Both) try_all_factors<T>(g, -base, search, lowest, highest, s, best);
        for (int i = 0; i < search.sweeps; i++) {
            Fit<1> f = {};
            f.inverse[0] = 1.0f / best.scale;
            fit_scales<T, 1>(g, lowest, highest, s, f);
            best.scale = f.product[0] / f.square[0];
        }
        const Reals old = load_groups(scales, row, k, groups, g.lanes);
        const Reals stored = stored_lanes(best.scale, search.format), size = magnitude_lanes(stored);
        const TwoErrors errors = compare_scales<T>(g, old, stored, lowest, highest, s);
        const Reals infinity = reals_of(Ints{} + 0x7f800000);
        const Reals reached = size >= search.least ? (size < infinity ? errors.second : infinity) : infinity;
        store_groups(scales, row, k, groups, g.lanes, reached < errors.first ? stored : old);
        add_losses(losses, row, g.lanes, errors.first, reached < errors.first ? reached : errors.first);
    });
}

void search_int(const Weights& w, const IntSearch& search, float* scales, double* losses) {
    if (w.dtype == Dtype::BF16) return search_int_rows<Bf16>(w, search, scales, losses);
    if (w.dtype == Dtype::F16) return search_int_rows<F16>(w, search, scales, losses);
    search_int_rows<F32>(w, search, scales, losses);
}
