// The search of auto-round 0.16.1 for scales of symmetric integers, in the arithmetic of torch on a CPU. Part of
// bodies.inl; contract.py has the formulas.

// A result of torch in the weights' own type. NaN and infinity never get here but from bad groups.
template <class T>
inline Reals in_type(Reals x);

template <>
inline Reals in_type<Bf16>(Reals x) {
    const Ints bits = bits_of(x);
    return reals_of((bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000u));
}

template <>
inline Reals in_type<F16>(Reals x) {
    return x == x ? stored_lanes(x, ScaleFormat::Fp16) : x;
}

template <>
inline Reals in_type<F32>(Reals x) {
    return x;
}

// 1 / x; 0 for what auto-round takes for 0.
template <class T>
inline Reals reciprocal_of(Reals x) {
    const float least = sizeof(typename T::Raw) == 2 && T::kInfinity == F16::kInfinity ? 1e-5f : 1e-30f;
    return magnitude_lanes(x) >= least ? in_type<T>(1.0f / x) : Reals{};
}

// The order in which torch adds `width` floats (ATen's SumKernel for AVX2, which processors with AVX-512 take too):
// eight at a time, four such sums side by side, each in four levels; then what is left, the four, and the eight.
struct TorchOrder {
    int64_t wide;  // columns of a vector: 8, or 1 for rows that are shorter
    int64_t steps;  // of 4 vectors
    int64_t step_mask, level_power;

    explicit TorchOrder(int64_t width) : wide(width < 8 ? 1 : 8), steps(width / wide / 4) {
        int64_t bits = 0;
        while ((int64_t{1} << bits) < steps) bits++;
        level_power = bits / 4 > 4 ? bits / 4 : 4;
        step_mask = (int64_t{1} << level_power) - 1;
    }
};

constexpr int kTorchLevels = 4, kTorchSums = 32, kMostLate = 39;

struct TorchSum {
    Reals levels[kTorchLevels][kTorchSums];
    Reals late[kMostLate];  // columns behind the last whole step
};

inline void begin_sum(const TorchOrder& order, TorchSum& sum) {
    const int levels = order.steps > order.step_mask ? kTorchLevels : 1;
    for (int level = 0; level < levels; level++) {
        for (Reals& each : sum.levels[level]) each = Reals{};
    }
    for (Reals& each : sum.late) each = Reals{};
}

// After `step` steps.
inline void raise_levels(const TorchOrder& order, int64_t step, TorchSum& sum) {
    if ((step & order.step_mask) != 0) return;
    for (int level = 1; level < kTorchLevels; level++) {
        for (int i = 0; i < kTorchSums; i++) {
            sum.levels[level][i] += sum.levels[level - 1][i];
            sum.levels[level - 1][i] = Reals{};
        }
        if ((step & (order.step_mask << (level * order.level_power))) != 0) return;
    }
}

inline Reals end_sum(const TorchOrder& order, int64_t width, TorchSum& sum) {
    const int64_t wide = order.wide, first = order.steps * 4 * wide, vectors = width / wide;
    Reals* all = sum.levels[0];
    if (order.steps > order.step_mask) {
        for (int level = 1; level < kTorchLevels; level++) {
            for (int i = 0; i < kTorchSums; i++) all[i] += sum.levels[level][i];
        }
    }
    for (int64_t v = order.steps * 4; v < vectors; v++) {
        for (int64_t i = 0; i < wide; i++) all[i] += sum.late[v * wide + i - first];
    }
    for (int64_t k = 1; k < 4; k++) {
        for (int64_t i = 0; i < wide; i++) all[i] += all[k * wide + i];
    }
    if (wide == 1) return all[0];
    Reals total = {};
    for (int64_t i = vectors * wide; i < width; i++) total += sum.late[i - first];
    for (int64_t i = 0; i < wide; i++) total += all[i];
    return total;
}

struct GridSums {
    TorchOrder order;
    int64_t width;  // columns of a full group: a short one has zeros behind it
    Reals lowest, highest;
    TorchSum sum;
};

// Squared error of one weight. A NaN stays one, as in torch: 0 times an inverse that is infinite in fp16.
template <class T>
inline Reals grid_square(Reals w, Reals inverse, Reals scale, Reals lowest, Reals highest) {
    const Reals level = rounded(smaller_of(larger_of(in_type<T>(inverse * w), lowest), highest));
    const Reals difference = in_type<T>(in_type<T>(scale * level) - w);
    return difference * difference;
}

template <class T>
inline Reals grid_error(const Strip& s, int64_t j, Reals inverse, Reals scale, Reals lowest, Reals highest) {
    const Reals w = load_lanes(s.w + j * kStrip);
    return grid_square<T>(w, inverse, scale, lowest, highest) * load_lanes(s.e + j * kStrip);
}

// The weighted error of one candidate, 1 / scale as given.
template <class T>
inline Reals grid_loss(GroupRows<T>& g, Reals inverse, Reals scale, GridSums& sums, Strip& s) {
    const TorchOrder order = sums.order;
    const int64_t stride = 4 * order.wide, first_late = order.steps * stride;
    const Reals lowest = sums.lowest, highest = sums.highest;
    begin_sum(order, sums.sum);
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t at = chunk * kChunk, cols = take_chunk<T>(g, chunk, s);
        const int64_t main = least(cols, first_late > at ? first_late - at : 0);
        for (int64_t j = 0; j < main; j += stride) {  // chunks are whole steps
            const int64_t count = least(stride, main - j);
            for (int64_t i = 0; i < count; i++) {
                sums.sum.levels[0][i] += grid_error<T>(s, j + i, inverse, scale, lowest, highest);
            }
            if (order.steps > order.step_mask) raise_levels(order, (at + j) / stride + 1, sums.sum);
        }
        for (int64_t j = main; j < cols; j++) {
            sums.sum.late[at + j - first_late] = grid_error<T>(s, j, inverse, scale, lowest, highest);
        }
    }
    const Reals loss = end_sum(order, sums.width, sums.sum);
    if (g.cols == sums.width) return loss;
    return loss + grid_square<T>(Reals{}, inverse, scale, lowest, highest);  // 0 or NaN, for the zeros behind
}

// The first weight of largest magnitude, and whether all are numbers.
struct Leader {
    Reals weight, bad;  // bad is not 0 where they are not
};

template <class T>
inline Leader find_leader(GroupRows<T>& g, Strip& s) {
    Leader found = {};
    Reals most = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip), size = magnitude_lanes(w);
            found.weight = size > most ? w : found.weight;
            most = size > most ? size : most;
            found.bad = size <= 3.4028234663852886e38f ? found.bad : all_lanes(1.0f);
        }
    }
    return found;
}

// Codes by division in the weights' type; those of bad groups stand for 0.
template <class T>
inline void put_codes(GroupRows<T>& g, Reals scale, Reals bad, const GridSums& sums, int64_t cols_of_row, Strip& s,
                      uint8_t* codes) {
    const Reals half = -sums.lowest;
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t at = chunk * kChunk, cols = take_chunk<T>(g, chunk, s);
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip);
            const Reals level = level_of(in_type<T>(w / scale), sums.lowest, sums.highest) + half;
            store_lanes(s.e + j * kStrip, bad != 0.0f ? half : level);
        }
        g.in_strip = -1;  // e is gone
        for (int lane = 0; lane < g.lanes; lane++) {
            uint8_t* row = codes + lane * cols_of_row + at;
            for (int64_t j = 0; j < cols; j++) row[j] = static_cast<uint8_t>(s.e[j * kStrip + lane]);
        }
    }
}

template <class T>
inline int64_t search_grid_rows(const Weights& w, const GridSearch& search, float* scales, uint8_t* codes,
                                double* losses) {
    const int64_t groups = ceil_div(w.cols, search.group);
    const float half = static_cast<float>(1 << (search.bits - 1));
    const Reals floor = in_type<T>(all_lanes(1e-5f));
    GridSums sums = {TorchOrder(search.group), search.group, all_lanes(-half), all_lanes(half - 1.0f), {}};
    int64_t bad = 0;
    std::memset(losses, 0, static_cast<size_t>(2 * w.rows) * sizeof *losses);
    for_group_rows<T>(w, search.group, search.weighing, [&](GroupRows<T>& g, int64_t row, int64_t k, Strip& s) {
        g.weighs = true;
        const Leader leader = find_leader<T>(g, s);
        const Reals inverse = reciprocal_of<T>(leader.weight);
        Reals best = {}, least_loss = {}, first_loss = {};
        for (int64_t i = 0; i < search.factor_count; i++) {
            const Reals tried = in_type<T>(inverse * -search.factors[i]), scale = reciprocal_of<T>(tried);
            const Reals loss = grid_loss<T>(g, tried, scale, sums, s);
            if (i == 0) first_loss = loss;
            best = i == 0 ? scale : (loss < least_loss ? scale : best);
            least_loss = i == 0 ? loss : (loss < least_loss ? loss : least_loss);
        }
        best = best < 0.0f ? smaller_of(best, -floor) : larger_of(best, floor);
        best = leader.bad != 0.0f ? floor : best;
        store_groups(scales, row, k, groups, g.lanes, best);
        add_losses(losses, row, g.lanes, first_loss, least_loss);
        put_codes<T>(g, best, leader.bad, sums, w.cols, s, codes + row * w.cols + k * search.group);
        alignas(64) float lanes[kStrip];
        store_lanes(lanes, leader.bad);
        for (int i = 0; i < g.lanes; i++) bad += lanes[i] != 0.0f;
    });
    return bad;
}

int64_t search_grid(const Weights& w, const GridSearch& search, float* scales, uint8_t* codes, double* losses) {
    if (w.dtype == Dtype::BF16) return search_grid_rows<Bf16>(w, search, scales, codes, losses);
    if (w.dtype == Dtype::F16) return search_grid_rows<F16>(w, search, scales, codes, losses);
    return search_grid_rows<F32>(w, search, scales, codes, losses);
}
