// One number of each group moved together with the others', so that a row's mean output errs less: scales under whole
// zero points, or biases. Part of bodies.inl; contract_centering.py has the formulas.

// Numbers of a group that give its codes.
struct Coding {
    Reals scale, offset;
};

// What moves is the factor of `pattern`, which comes to `target` as near as it may.
struct Target {
    Reals pattern, target;
};

template <DecodingRule kRule>
inline Target find_target(Reals w, const Coding& c, Reals top) {
    if constexpr (kRule == DecodingRule::Zero) {
        return {level_of(w / c.scale, -c.offset, top - c.offset), w};
    } else {
        return {all_lanes(1.0f), w - c.scale * level_of((w - c.offset) / c.scale, Reals{}, top)};
    }
}

constexpr int64_t kPullsKept = 256;  // groups of a row whose sums wait on the stack, 64 kB, and are not made again

// Sums over a group, of its pattern p and target t.
struct Pull {
    Reals square, product;  // of v * p * p and v * p * t
    Reals shift, aim;       // of m * p and m * t
};

template <class T, DecodingRule kRule>
inline Pull find_pull(GroupRows<T>& g, const Centering& c, int64_t at, const Coding& coding, Reals top, Strip& s) {
    Pull all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        const float *spread = c.spread + at + chunk * kChunk, *means = c.means + at + chunk * kChunk;
        Pull sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Target x = find_target<kRule>(load_lanes(s.w + j * kStrip), coding, top);
            const Reals vp = all_lanes(spread[j]) * x.pattern, m = all_lanes(means[j]);
            sum.square += vp * x.pattern;
            sum.product += vp * x.target;
            sum.shift += m * x.pattern;
            sum.aim += m * x.target;
        }
        all.square += sum.square;
        all.product += sum.product;
        all.shift += sum.shift;
        all.aim += sum.aim;
    }
    return all;
}

// Errors of a group with the codes that it has: weighed by v under both numbers, by the importance under the second.
struct Moved {
    Reals before, after, lost;
};

template <class T, DecodingRule kRule>
inline Moved compare_moved(GroupRows<T>& g, const Centering& c, int64_t at, const Coding& coding, Reals first,
                           Reals second, Reals top, Strip& s) {
    Moved all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        const int64_t begin = at + chunk * kChunk;
        Moved sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Target x = find_target<kRule>(load_lanes(s.w + j * kStrip), coding, top);
            const Reals one = x.target - first * x.pattern, other = x.target - second * x.pattern;
            const Reals v = all_lanes(c.spread[begin + j]);
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

// `moved` where it may replace `old`: a finite bias, a scale that keeps its sign and is not below the least.
template <DecodingRule kRule>
inline Reals allowed_move(Reals moved, Reals old, float least_size) {
    const Reals infinity = reals_of(Ints{} + 0x7f800000), size = magnitude_lanes(moved);
    if constexpr (kRule == DecodingRule::Bias) return size < infinity ? moved : old;
    const Reals kept = size >= least_size ? (size < infinity ? moved : old) : old;
    return (bits_of(kept) ^ bits_of(old)) < 0 ? old : kept;
}

template <class T, DecodingRule kRule>
inline void center_strip(const Weights& w, const Centering& c, int64_t row, const float* scales, const float* offsets,
                         float* out, double* losses) {
    const float* const numbers = kRule == DecodingRule::Zero ? scales : offsets;  // those that move
    const int64_t groups = ceil_div(w.cols, c.group);
    const Reals top = all_lanes(static_cast<float>((1 << c.bits) - 1));
    const int lanes = static_cast<int>(least(kStrip, w.rows - row));
    const auto* src = static_cast<const typename T::Raw*>(w.data) + row * w.cols;
    Strip s;
    const auto group_at = [&](int64_t k) {
        const int64_t at = k * c.group;
        return GroupRows<T>{src + at, w.cols, least(c.group, w.cols - at), lanes, nullptr, Objective::None, {}, false, -1};
    };
    const auto coding_at = [&](int64_t k) {
        return Coding{load_groups(scales, row, k, groups, lanes), load_groups(offsets, row, k, groups, lanes)};
    };
    Reals error = {}, stiffness = {}, drift = {};
    Pull kept[kPullsKept];
    for (int64_t k = 0; k < groups; k++) {
        GroupRows<T> g = group_at(k);
        const Reals old = load_groups(numbers, row, k, groups, lanes);
        const Pull p = find_pull<T, kRule>(g, c, k * c.group, coding_at(k), top, s);
        if (k < kPullsKept) kept[k] = p;
        error += old * p.shift - p.aim;
        stiffness += p.square > 0.0f ? p.shift * (p.shift / p.square) : Reals{};
        drift += p.square > 0.0f ? p.shift * (p.product / p.square - old) : Reals{};
    }
    const Reals force = (error + drift) / (1.0f + stiffness);
    Reals before = {}, after = {}, left = {};
    double lost[kStrip] = {};
    for (int64_t k = 0; k < groups; k++) {
        GroupRows<T> g = group_at(k);
        const Coding coding = coding_at(k);
        const Reals old = load_groups(numbers, row, k, groups, lanes);
        const Pull p = k < kPullsKept ? kept[k] : find_pull<T, kRule>(g, c, k * c.group, coding, top, s);
        const Reals moved = stored_lanes((p.product - force * p.shift) / p.square, c.format);
        const Reals chosen = allowed_move<kRule>(moved, old, c.least);
        const Moved m = compare_moved<T, kRule>(g, c, k * c.group, coding, old, chosen, top, s);
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
            for (int64_t k = 0; k < groups; k++) out[at + k] = numbers[at + k];
        }
    }
}

template <class T>
inline void center_rows(const Weights& w, const Centering& c, const float* scales, const float* offsets, float* out,
                        double* losses) {
    const auto center = c.rule == DecodingRule::Zero ? center_strip<T, DecodingRule::Zero>
                                                     : center_strip<T, DecodingRule::Bias>;
    for (int64_t row = 0; row < w.rows; row += kStrip) center(w, c, row, scales, offsets, out, losses);
}

void center_groups(const Weights& w, const Centering& c, const float* scales, const float* offsets, float* out,
                   double* losses) {
    if (w.dtype == Dtype::BF16) return center_rows<Bf16>(w, c, scales, offsets, out, losses);
    if (w.dtype == Dtype::F16) return center_rows<F16>(w, c, scales, offsets, out, losses);
    center_rows<F32>(w, c, scales, offsets, out, losses);
}
