// Scales of small floats, chosen among the numbers of their format. Part of bodies.inl; contract.py has the formulas.

// To the nearest element, half to even, of magnitudes; what is larger, and NaN, becomes the largest. See encode.inl.
template <class E>
inline Reals element_of(Reals v) {
    v = v < float_of_bits(E::kLargest) ? v : all_lanes(float_of_bits(E::kLargest));
    constexpr auto kSmallest = static_cast<int32_t>(E::kSmallestExponent);
    Ints exponent = bits_of(v) & 0x7f800000;
    exponent = exponent > kSmallest ? exponent : Ints{} + kSmallest;
    const Reals steps = reals_of(exponent + (E::kShift << 23));
    return (v + steps) - steps;
}

struct Step {
    Reals scale, inverse;
};

// Weighted errors under kCount scales.
template <class T, class E, int kCount>
inline void measure_steps(GroupRows<T>& g, const Step* steps, Strip& s, Reals* errors) {
    for (int k = 0; k < kCount; k++) errors[k] = Reals{};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals scale[kCount], inverse[kCount], sum[kCount] = {};
        for (int k = 0; k < kCount; k++) {
            scale[k] = steps[k].scale;
            inverse[k] = steps[k].inverse;
        }
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = magnitude_lanes(load_lanes(s.w + j * kStrip)), e = load_lanes(s.e + j * kStrip);
            for (int k = 0; k < kCount; k++) {
                const Reals difference = w - scale[k] * element_of<E>(w * inverse[k]);
                sum[k] += (difference * difference) * e;
            }
        }
        for (int k = 0; k < kCount; k++) errors[k] += sum[k];
    }
}

// As measure_steps, with the codes that divisions give.
template <class T, class E>
inline TwoErrors compare_steps(GroupRows<T>& g, Reals first, Reals second, Strip& s) {
    TwoErrors all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        TwoErrors sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = magnitude_lanes(load_lanes(s.w + j * kStrip)), e = load_lanes(s.e + j * kStrip);
            const Reals one = w - first * element_of<E>(w / first);
            const Reals other = w - second * element_of<E>(w / second);
            sum.first += (one * one) * e;
            sum.second += (other * other) * e;
        }
        all.first += sum.first;
        all.second += sum.second;
    }
    return all;
}

// The rungs of the rows, from `first` to `last` of each; the lanes that are not there repeat the last row.
struct Rungs {
    alignas(64) int32_t first[kStrip], last[kStrip], chosen[kStrip];
    int count;  // the most that a row has
};

inline Rungs load_rungs(const LadderSearch& search, const uint8_t* chosen, int64_t row, int64_t k, int64_t groups,
                        int lanes) {
    Rungs r = {};
    for (int i = 0; i < kStrip; i++) {
        const int64_t at = (row + (i < lanes ? i : lanes - 1)) * groups + k;
        const bool any = search.first[at] <= search.last[at];
        r.chosen[i] = chosen[at];
        r.first[i] = any ? search.first[at] : chosen[at];
        r.last[i] = any ? search.last[at] : chosen[at];
        const int count = r.last[i] - r.first[i] + 1;
        r.count = count > r.count ? count : r.count;
    }
    return r;
}

inline Reals scales_of_rungs(const float* ladder, const int32_t* rungs) {
    alignas(64) float each[kStrip];
    for (int i = 0; i < kStrip; i++) each[i] = ladder[rungs[i]];
    return load_lanes(each);
}

// The scale of rung `first` + i, or of `last` where that is beyond it.
inline Reals scale_of_rung(const float* ladder, const Rungs& r, int i) {
    alignas(64) int32_t rungs[kStrip];
    for (int lane = 0; lane < kStrip; lane++) {
        const int32_t rung = r.first[lane] + i;
        rungs[lane] = rung < r.last[lane] ? rung : r.last[lane];
    }
    return scales_of_rungs(ladder, rungs);
}

// The number of the best rung, from `first` on, or -1 where the old scale is better than all. An error beyond the last
// rung of a row is that of its last rung again, and never better.
template <class T, class E>
inline Ints best_rung(GroupRows<T>& g, const float* ladder, const Rungs& r, Reals old, Strip& s) {
    Step steps[kAtOnce];
    Reals errors[kAtOnce];
    steps[0] = {old, 1.0f / old};
    measure_steps<T, E, 1>(g, steps, s, errors);
    Reals least = errors[0];
    Ints best = Ints{} - 1;
    for (int i = 0; i < r.count; i += kAtOnce) {
        for (int k = 0; k < kAtOnce; k++) {
            steps[k].scale = scale_of_rung(ladder, r, i + k);
            steps[k].inverse = 1.0f / steps[k].scale;
        }
        measure_steps<T, E, kAtOnce>(g, steps, s, errors);
        for (int k = 0; k < kAtOnce; k++) {
            best = errors[k] < least ? Ints{} + (i + k) : best;
            least = errors[k] < least ? errors[k] : least;
        }
    }
    return best;
}

template <class T, class E>
inline void search_ladder_rows(const Weights& w, const LadderSearch& search, uint8_t* chosen, double* losses) {
    const int64_t groups = ceil_div(w.cols, search.group);
    std::memset(losses, 0, static_cast<size_t>(2 * w.rows) * sizeof *losses);
    for_group_rows<T>(w, search.group, search.weighing, [&](GroupRows<T>& g, int64_t row, int64_t k, Strip& s) {
        find_strip_extremes<T>(g, 0.0f, s);
        const Rungs r = load_rungs(search, chosen, row, k, groups, g.lanes);
        const Reals old = scales_of_rungs(search.ladder, r.chosen);
        const Ints best = best_rung<T, E>(g, search.ladder, r, old, s);
        alignas(64) int32_t rungs[kStrip];
        std::memcpy(rungs, &best, sizeof rungs);
        for (int i = 0; i < kStrip; i++) rungs[i] = rungs[i] < 0 ? r.chosen[i] : r.first[i] + rungs[i];
        const TwoErrors errors = compare_steps<T, E>(g, old, scales_of_rungs(search.ladder, rungs), s);
        const Reals kept = errors.second < errors.first ? errors.second : errors.first;
        alignas(64) float before[kStrip], after[kStrip];
        store_lanes(before, errors.first);
        store_lanes(after, errors.second);
        for (int i = 0; i < g.lanes; i++) {
            if (after[i] < before[i]) chosen[(row + i) * groups + k] = static_cast<uint8_t>(rungs[i]);
        }
        add_losses(losses, row, g.lanes, errors.first, kept);
    });
}

template <class E>
inline void search_ladder_any(const Weights& w, const LadderSearch& search, uint8_t* chosen, double* losses) {
    if (w.dtype == Dtype::BF16) return search_ladder_rows<Bf16, E>(w, search, chosen, losses);
    if (w.dtype == Dtype::F16) return search_ladder_rows<F16, E>(w, search, chosen, losses);
    search_ladder_rows<F32, E>(w, search, chosen, losses);
}

void search_ladder(const Weights& w, const Element& element, const LadderSearch& search, uint8_t* chosen,
                   double* losses) {
    switch (element.kind) {
        case ElementKind::Int: return;  // refused before
        case ElementKind::E0M3: return search_ladder_any<E0M3>(w, search, chosen, losses);
        case ElementKind::E2M1: return search_ladder_any<E2M1>(w, search, chosen, losses);
        case ElementKind::E2M3: return search_ladder_any<E2M3>(w, search, chosen, losses);
        case ElementKind::E3M2: return search_ladder_any<E3M2>(w, search, chosen, losses);
        case ElementKind::E4M3FN: return search_ladder_any<E4M3FN>(w, search, chosen, losses);
        case ElementKind::E5M2: return search_ladder_any<E5M2>(w, search, chosen, losses);
    }
}
