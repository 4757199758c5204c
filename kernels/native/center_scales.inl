// Scales of symmetric integers moved together, so that a row's mean output errs less. Part of bodies.inl;
// contract_centering.py has the formulas.

// Sums over a group with the codes that its scale gives.
struct Pull {
    Reals square, product;  // of v * q * q and v * q * w
    Reals shift, aim;       // of m * q and m * w
};

template <class T>
inline Pull find_pull(GroupRows<T>& g, const Centering& c, int64_t at, Reals scale, Reals lowest, Reals highest,
                      Strip& s) {
    Pull all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        const float *spread = c.spread + at + chunk * kChunk, *means = c.means + at + chunk * kChunk;
        Pull sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), q = level_of(w / scale, lowest, highest);
            const Reals vq = all_lanes(spread[j]) * q, m = all_lanes(means[j]);
            sum.square += vq * q;
            sum.product += vq * w;
            sum.shift += m * q;
            sum.aim += m * w;
        }
        all.square += sum.square;
        all.product += sum.product;
        all.shift += sum.shift;
        all.aim += sum.aim;
    }
    return all;
}

// Errors of a group with the codes of the first scale: weighed by v under both scales, by the importance under the
// second.
struct Moved {
    Reals before, after, lost;
};

template <class T>
inline Moved compare_moved(GroupRows<T>& g, const Centering& c, int64_t at, Reals first, Reals second, Reals lowest,
                           Reals highest, Strip& s) {
    Moved all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        const int64_t begin = at + chunk * kChunk;
        Moved sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), q = level_of(w / first, lowest, highest);
            const Reals one = w - first * q, other = w - second * q, v = all_lanes(c.spread[begin + j]);
            const Reals e = all_lanes(c.importance == nullptr ? 1.0f : c.importance[begin + j]);
            sum.before += (one * one) * v;
            sum.after += (other * other) * v;
            sum.lost += (other * other) * e;
        }
        all.before += sum.before;
        all.after += sum.after;
        all.lost += sum.lost;
    }
    return all;
}

template <class T>
inline void center_strip(const Weights& w, const Centering& c, int64_t row, const float* scales, float* out,
                         double* losses) {
    const int64_t groups = ceil_div(w.cols, c.group);
    const float half = static_cast<float>(1 << (c.bits - 1));
    const Reals lowest = all_lanes(-half), highest = all_lanes(half - 1.0f);
    const Reals infinity = reals_of(Ints{} + 0x7f800000);
    const int lanes = static_cast<int>(least(kStrip, w.rows - row));
    const auto* src = static_cast<const typename T::Raw*>(w.data) + row * w.cols;
    Strip s;
    const auto group_at = [&](int64_t k) {
        const int64_t at = k * c.group;
        return GroupRows<T>{src + at, w.cols, least(c.group, w.cols - at), lanes, nullptr, Objective::None, {}, false, -1};
    };
    Reals error = {}, stiffness = {}, drift = {};
    for (int64_t k = 0; k < groups; k++) {
        GroupRows<T> g = group_at(k);
        const Reals scale = load_groups(scales, row, k, groups, lanes);
        const Pull p = find_pull<T>(g, c, k * c.group, scale, lowest, highest, s);
        error += scale * p.shift - p.aim;
        stiffness += p.square > 0.0f ? p.shift * (p.shift / p.square) : Reals{};
        drift += p.square > 0.0f ? p.shift * (p.product / p.square - scale) : Reals{};
    }
    const Reals force = (error + drift) / (1.0f + stiffness);
    Reals before = {}, after = {}, left = {};
    double lost[kStrip] = {};
    for (int64_t k = 0; k < groups; k++) {
        GroupRows<T> g = group_at(k);
        const Reals scale = load_groups(scales, row, k, groups, lanes);
        const Pull p = find_pull<T>(g, c, k * c.group, scale, lowest, highest, s);
        const Reals moved = stored_lanes((p.product - force * p.shift) / p.square, c.format);
        const Reals size = magnitude_lanes(moved);
        const Reals kept = size >= c.least ? (size < infinity ? moved : scale) : scale;
        const Reals chosen = (bits_of(kept) ^ bits_of(scale)) < 0 ? scale : kept;
        const Moved m = compare_moved<T>(g, c, k * c.group, scale, chosen, lowest, highest, s);
        before += m.before;
        after += m.after;
        left += chosen * p.shift - p.aim;
        store_groups(out, row, k, groups, lanes, chosen);
        alignas(64) float each[kStrip];
        store_lanes(each, m.lost);
        for (int i = 0; i < lanes; i++) lost[i] += static_cast<double>(each[i]);
    }
    alignas(64) float old_sum[kStrip], new_sum[kStrip];
    store_lanes(old_sum, before + error * error);
    store_lanes(new_sum, after + left * left);
    for (int i = 0; i < lanes; i++) {
        const int64_t at = (row + i) * groups;
        if (new_sum[i] < old_sum[i]) {
            losses[2 * (row + i) + 1] = lost[i];
        } else {
            for (int64_t k = 0; k < groups; k++) out[at + k] = scales[at + k];
        }
    }
}

template <class T>
inline void center_rows(const Weights& w, const Centering& c, const float* scales, float* out, double* losses) {
    for (int64_t row = 0; row < w.rows; row += kStrip) center_strip<T>(w, c, row, scales, out, losses);
}

void center_scales(const Weights& w, const Centering& c, const float* scales, float* out, double* losses) {
    if (w.dtype == Dtype::BF16) return center_rows<Bf16>(w, c, scales, out, losses);
    if (w.dtype == Dtype::F16) return center_rows<F16>(w, c, scales, out, losses);
    center_rows<F32>(w, c, scales, out, losses);
}
