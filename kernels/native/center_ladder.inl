// Scales of small floats, chosen among the numbers of their format one after the other, so that a row's mean output
// errs less. Part of bodies.inl, after search_ladder.inl; contract_centering.py has the formulas.

// Errors of a group under one scale: squares weighed by v, and the error of its part of the mean output.
struct Share {
    Reals square, mean;
};

// What a weight is more than its code says, away from zero.
template <class E>
inline Reals excess_of(Reals w, Reals scale) {
    const Reals size = magnitude_lanes(w);
    return size - scale * element_of<E>(size / scale);
}

template <class T, class E>
inline Share find_share(GroupRows<T>& g, const LadderCentering& c, int64_t at, Reals scale, Strip& s) {
    Share all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        const float *spread = c.spread + at + chunk * kChunk, *means = c.means + at + chunk * kChunk;
        Share sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), d = excess_of<E>(w, scale);
            const Reals turned = reals_of(bits_of(d) ^ (bits_of(w) & static_cast<int32_t>(0x80000000u)));
            sum.square += (d * d) * all_lanes(spread[j]);
            sum.mean += turned * all_lanes(means[j]);
        }
        all.square += sum.square;
        all.mean += sum.mean;
    }
    return all;
}

// The weighted error of a group under a scale.
template <class T, class E>
inline Reals weigh_share(GroupRows<T>& g, const float* importance, int64_t at, Reals scale, Strip& s) {
    Reals all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals d = excess_of<E>(load_lanes(s.w + j * kStrip), scale);
            sum += (d * d) * all_lanes(importance == nullptr ? 1.0f : importance[at + chunk * kChunk + j]);
        }
        all += sum;
    }
    return all;
}

template <class T, class E>
inline void center_ladder_strip(const Weights& w, const LadderCentering& c, int64_t row, const uint8_t* chosen,
                                uint8_t* out, double* losses) {
    const LadderSearch& search = c.search;
    const int64_t groups = ceil_div(w.cols, search.group);
    const int lanes = static_cast<int>(least(kStrip, w.rows - row));
    const auto* src = static_cast<const typename T::Raw*>(w.data) + row * w.cols;
    Strip s;
    const auto group_at = [&](int64_t k) {
        const int64_t at = k * search.group;
        return GroupRows<T>{src + at, w.cols, least(search.group, w.cols - at), lanes, nullptr, Objective::None, {},
                            false,    -1};
    };
    Reals first_mean = {};
    for (int64_t k = 0; k < groups; k++) {
        GroupRows<T> g = group_at(k);
        const Rungs r = load_rungs(search, chosen, row, k, groups, lanes);
        first_mean += find_share<T, E>(g, c, k * search.group, scales_of_rungs(search.ladder, r.chosen), s).mean;
    }
    Reals mean = first_mean, before = {}, after = {};
    double lost[kStrip] = {};
    for (int64_t k = 0; k < groups; k++) {
        GroupRows<T> g = group_at(k);
        const Rungs r = load_rungs(search, chosen, row, k, groups, lanes);
        const Reals old = scales_of_rungs(search.ladder, r.chosen);
        Share best = find_share<T, E>(g, c, k * search.group, old, s);
        const Reals rest = mean - best.mean, all = rest + best.mean;
        before += best.square;
        Reals least_cost = best.square + all * all, scale = old;
        Ints found = Ints{} - 1;
        for (int i = 0; i < r.count; i++) {
            const Reals step = scale_of_rung(search.ladder, r, i);
            const Share each = find_share<T, E>(g, c, k * search.group, step, s);
            const Reals whole = rest + each.mean, cost = each.square + whole * whole;
            found = cost < least_cost ? Ints{} + i : found;
            scale = cost < least_cost ? step : scale;
            best.square = cost < least_cost ? each.square : best.square;
            best.mean = cost < least_cost ? each.mean : best.mean;
            least_cost = cost < least_cost ? cost : least_cost;
        }
        mean = rest + best.mean;
        after += best.square;
        alignas(64) int32_t rungs[kStrip];
        alignas(64) float each[kStrip];
        std::memcpy(rungs, &found, sizeof rungs);
        store_lanes(each, weigh_share<T, E>(g, search.weighing.importance, k * search.group, scale, s));
        for (int i = 0; i < lanes; i++) {
            out[(row + i) * groups + k] = static_cast<uint8_t>(rungs[i] < 0 ? r.chosen[i] : r.first[i] + rungs[i]);
            lost[i] += static_cast<double>(each[i]);
        }
    }
    alignas(64) float old_sum[kStrip], new_sum[kStrip];
    store_lanes(old_sum, before + first_mean * first_mean);
    store_lanes(new_sum, after + mean * mean);
    for (int i = 0; i < lanes; i++) {
        if (new_sum[i] < old_sum[i]) {
            losses[2 * (row + i) + 1] = lost[i];
        } else {
            std::memcpy(out + (row + i) * groups, chosen + (row + i) * groups, static_cast<size_t>(groups));
        }
    }
}

template <class E>
inline void center_ladder_any(const Weights& w, const LadderCentering& c, const uint8_t* chosen, uint8_t* out,
                              double* losses) {
    const auto center = w.dtype == Dtype::BF16  ? center_ladder_strip<Bf16, E>
                        : w.dtype == Dtype::F16 ? center_ladder_strip<F16, E>
                                                : center_ladder_strip<F32, E>;
    for (int64_t row = 0; row < w.rows; row += kStrip) center(w, c, row, chosen, out, losses);
}

void center_ladder(const Weights& w, const Element& element, const LadderCentering& c, const uint8_t* chosen,
                   uint8_t* out, double* losses) {
    switch (element.kind) {
        case ElementKind::Int: return;  // refused before
        case ElementKind::E0M3: return center_ladder_any<E0M3>(w, c, chosen, out, losses);
        case ElementKind::E2M1: return center_ladder_any<E2M1>(w, c, chosen, out, losses);
        case ElementKind::E2M3: return center_ladder_any<E2M3>(w, c, chosen, out, losses);
        case ElementKind::E3M2: return center_ladder_any<E3M2>(w, c, chosen, out, losses);
        case ElementKind::E4M3FN: return center_ladder_any<E4M3FN>(w, c, chosen, out, losses);
        case ElementKind::E5M2: return center_ladder_any<E5M2>(w, c, chosen, out, losses);
    }
}
