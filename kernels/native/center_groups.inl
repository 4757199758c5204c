// One number of each group moved together with the others', so that a row's mean output errs less: scales under whole
// zero points, or biases. Part of bodies.inl; contract_centering.py has the formulas.

// Numbers of a group that give its codes.
struct Coding {
    Reals scale, offset;
};

// What the number that moves is multiplied by, and what is left of a weight as it is.
struct Pattern {
    Reals factor, rest;
};

template <DecodingRule kRule>
inline Pattern find_pattern(Reals w, const Coding& c, Reals top) {
    if constexpr (kRule == DecodingRule::Zero) {
        const Reals p = level_of(w / c.scale, -c.offset, top - c.offset);
        return {p, w - c.scale * p};
    } else {
        return {all_lanes(1.0f), (w - c.scale * level_of((w - c.offset) / c.scale, Reals{}, top)) - c.offset};
    }
}

// Sums over a group of which its squared error is made under a number that moved.
struct Parts {
    Reals squares, products, errors;

    void add(Reals weight, const Pattern& x) {
        const Reals p = weight * x.factor;
        squares += p * x.factor;
        products += p * x.rest;
        errors += (weight * x.rest) * x.rest;
    }
    void add(const Parts& other) {
        squares += other.squares;
        products += other.products;
        errors += other.errors;
    }
    Reals after(Reals step) const { return errors + step * (step * squares - (products + products)); }
};

struct Pull {
    Parts by_spread, by_importance;
    Reals shift, rest;  // of m * p and m * r
};

constexpr int64_t kPullsKept = 256;  // groups of a row whose sums wait on the stack, 128 kB, and are not made again

template <class T, DecodingRule kRule>
inline Pull find_pull(GroupRows<T>& g, const Centering& c, int64_t at, const Coding& coding, Reals top, Strip& s) {
    Pull all = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        const int64_t begin = at + chunk * kChunk;
        Pull sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Pattern x = find_pattern<kRule>(load_lanes(s.w + j * kStrip), coding, top);
            const Reals m = all_lanes(c.means[begin + j]);
            sum.by_spread.add(all_lanes(c.spread[begin + j]), x);
            sum.by_importance.add(all_lanes(c.importance == nullptr ? 1.0f : c.importance[begin + j]), x);
            sum.shift += m * x.factor;
            sum.rest += m * x.rest;
        }
        all.by_spread.add(sum.by_spread);
        all.by_importance.add(sum.by_importance);
        all.shift += sum.shift;
        all.rest += sum.rest;
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
    const auto pull_at = [&](int64_t k) {
        GroupRows<T> g = group_at(k);
        return find_pull<T, kRule>(g, c, k * c.group, coding_at(k), top, s);
    };
    Reals error = {}, stiffness = {}, drift = {};
    Pull kept[kPullsKept];
    for (int64_t k = 0; k < groups; k++) {
        const Pull p = pull_at(k);
        const Reals square = p.by_spread.squares;
        if (k < kPullsKept) kept[k] = p;
        error += p.rest;
        stiffness += square > 0.0f ? p.shift * (p.shift / square) : Reals{};
        drift += square > 0.0f ? p.shift * (p.by_spread.products / square) : Reals{};
    }
    const Reals force = (error - drift) / (1.0f + stiffness);
    Reals before = {}, after = {}, way = {};
    double lost[kStrip] = {};
    for (int64_t k = 0; k < groups; k++) {
        const Pull p = k < kPullsKept ? kept[k] : pull_at(k);
        const Reals old = load_groups(numbers, row, k, groups, lanes);
        const Reals moved = old + (p.by_spread.products + force * p.shift) / p.by_spread.squares;
        const Reals chosen = allowed_move<kRule>(stored_lanes(moved, c.format), old, c.least);
        const Reals step = chosen - old, loss = p.by_importance.after(step);
        before += p.by_spread.errors;
        after += p.by_spread.after(step);
        way += step * p.shift;
        store_groups(out, row, k, groups, lanes, chosen);
        alignas(64) float each[kStrip];
        store_lanes(each, loss > 0.0f ? loss : Reals{});
        for (int i = 0; i < lanes; i++) lost[i] += static_cast<double>(each[i]);
    }
    const Reals left = error - way;
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
