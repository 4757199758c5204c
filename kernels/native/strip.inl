// Some rows of one group with the weights of their errors, turned so that a column is a vector. Part of bodies.inl.
//
// Searches go over a group several times. Up to kChunk columns lie turned in the first-level cache; wider groups are
// read, and turned, chunk by chunk each time. Sums over a group are fp32: over the columns of a chunk in order, then
// over the chunks.

constexpr int kChunk = 128;  // columns

struct alignas(64) Strip {
    float w[kChunk * kStrip];   // weights
    float e[kChunk * kStrip];   // what a squared error counts
    float ew[kChunk * kStrip];  // their product
};

// A group in some rows: `lanes` of them are there, the others repeat the last.
template <class T>
struct GroupRows {
    const typename T::Raw* src;  // first row's first column of the group
    int64_t stride, cols;
    int lanes;
    const float* importance;  // of the group's columns, or null: 1
    Objective objective;
    Reals mean;  // of w * w, where the objective asks for it
    bool weighs;  // whether chunks come with e and ew
    int64_t in_strip;  // the chunk that the strip holds, or -1

    int64_t chunks() const { return ceil_div(cols, kChunk); }
};

// A square of kStrip rows and columns is turned by perfect shuffles, as in transpose.inl.
constexpr int kSquare = kStrip * kStrip;

inline void shuffle_square(const uint32_t* SHARDQ_RESTRICT src, uint32_t* SHARDQ_RESTRICT out) {
    for (int i = 0; i < kSquare / 2; i++) {
        out[2 * i] = src[i];
        out[2 * i + 1] = src[i + kSquare / 2];
    }
}

// Leaves the square in one of the two; returns it.
inline const uint32_t* turn_square(uint32_t* a, uint32_t* b) {
    for (int width = kStrip; width > 1; width /= 2) {
        shuffle_square(a, b);
        uint32_t* const last = a;
        a = b;
        b = last;
    }
    return a;
}

// kStrip raw weights of a row, as 32-bit words. Said with vectors: compilers rather gather a column from all rows.
inline void load_words(const uint32_t* from, uint32_t* to) { std::memcpy(to, from, kStrip * sizeof *to); }

inline void load_words(const uint16_t* from, uint32_t* to) {
#if defined(__GNUC__)
    typedef uint16_t Halves __attribute__((vector_size(2 * kStrip)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Ints words = __builtin_convertvector(halves, Ints);
    std::memcpy(to, &words, sizeof words);
#else
    for (int i = 0; i < kStrip; i++) to[i] = from[i];
#endif
}

template <class T>
inline void turn_columns(const GroupRows<T>& g, int64_t at, int64_t cols, float* SHARDQ_RESTRICT out) {
    const typename T::Raw* rows[kStrip];
    for (int lane = 0; lane < kStrip; lane++) rows[lane] = g.src + g.stride * (lane < g.lanes ? lane : g.lanes - 1) + at;
    alignas(64) uint32_t a[kSquare], b[kSquare];
    int64_t j = 0;
    for (; j + kStrip <= cols; j += kStrip) {
        for (int lane = 0; lane < kStrip; lane++) load_words(rows[lane] + j, a + lane * kStrip);
        const uint32_t* turned = turn_square(a, b);
        for (int i = 0; i < kSquare; i++) out[j * kStrip + i] = float_of_bits(T::widen_bits(turned[i]));
    }
    for (; j < cols; j++) {
        for (int lane = 0; lane < kStrip; lane++) out[j * kStrip + lane] = widen_value<T>(rows[lane][j]);
    }
}

// e is the column's importance times 1, w^2, or sqrt(mean w^2 + w^2).
template <Objective kObjective>
inline void weigh_columns(const float* importance, Reals mean, int64_t cols, Strip& s) {
    for (int64_t j = 0; j < cols; j++) {
        const Reals w = load_lanes(s.w + j * kStrip);
        Reals e = all_lanes(importance == nullptr ? 1.0f : importance[j]);
        if constexpr (kObjective == Objective::Square) e = e * (w * w);
        if constexpr (kObjective == Objective::Root) e = e * root_lanes(mean + w * w);
        store_lanes(s.e + j * kStrip, e);
        store_lanes(s.ew + j * kStrip, e * w);
    }
}

template <class T>
inline void weigh_chunk(const GroupRows<T>& g, int64_t at, int64_t cols, Strip& s) {
    const float* importance = g.importance == nullptr ? nullptr : g.importance + at;
    if (g.objective == Objective::Square) return weigh_columns<Objective::Square>(importance, g.mean, cols, s);
    if (g.objective == Objective::Root) return weigh_columns<Objective::Root>(importance, g.mean, cols, s);
    weigh_columns<Objective::None>(importance, g.mean, cols, s);
}

// Makes sure that the strip holds a chunk. Returns its columns.
template <class T>
inline int64_t take_chunk(GroupRows<T>& g, int64_t chunk, Strip& s) {
    const int64_t at = chunk * kChunk, cols = least(kChunk, g.cols - at);
    if (g.in_strip == chunk) return cols;
    turn_columns<T>(g, at, cols, s.w);
    if (g.weighs) weigh_chunk<T>(g, at, cols, s);
    g.in_strip = chunk;
    return cols;
}

// The largest w and the largest -w of a group.
struct Extremes {
    Reals high, low;
};

// Neither is below `least`; NaN is passed over. Finds the mean of squares too: from then on chunks come with e and ew.
template <class T>
inline Extremes find_strip_extremes(GroupRows<T>& g, float least, Strip& s) {
    Extremes found = {all_lanes(least), all_lanes(least)};
    Reals squares = {};
    for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
        const int64_t cols = take_chunk<T>(g, chunk, s);
        Reals sum = {};
        for (int64_t j = 0; j < cols; j++) {
            const Reals w = load_lanes(s.w + j * kStrip);
            found.high = larger_of(found.high, w);
            found.low = larger_of(found.low, -w);
            sum += w * w;
        }
        squares += sum;
    }
    g.mean = squares / static_cast<float>(g.cols);
    g.weighs = true;
    if (g.chunks() > 1) {
        g.in_strip = -1;
    } else {
        weigh_chunk<T>(g, 0, g.cols, s);
    }
    return found;
}

// What a search does with the rows of a group: fn(group, lanes, strip), `first` the index of (first row, group) among
// all groups. Groups are inside, so that the rows' bytes are read from left to right.
template <class T, class Function>
inline void for_group_rows(const Weights& w, int64_t group, const Weighing& weighing, const Function& fn) {
    const int64_t groups = ceil_div(w.cols, group);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    Strip s;
    for (int64_t row = 0; row < w.rows; row += kStrip) {
        const int lanes = static_cast<int>(least(kStrip, w.rows - row));
        for (int64_t k = 0; k < groups; k++) {
            const int64_t at = k * group;
            const float* importance = weighing.importance == nullptr ? nullptr : weighing.importance + at;
            GroupRows<T> g = {src + row * w.cols + at, w.cols, least(group, w.cols - at), lanes, importance,
                              weighing.objective,      {},     false, -1};
            fn(g, row, k, s);
        }
    }
}

// A value per group of each of the rows; the lanes that are not there repeat the last.
inline Reals load_groups(const float* values, int64_t row, int64_t k, int64_t groups, int lanes) {
    alignas(64) float each[kStrip];
    for (int i = 0; i < kStrip; i++) each[i] = values[(row + (i < lanes ? i : lanes - 1)) * groups + k];
    return load_lanes(each);
}

inline void store_groups(float* values, int64_t row, int64_t k, int64_t groups, int lanes, Reals x) {
    alignas(64) float each[kStrip];
    store_lanes(each, x);
    for (int i = 0; i < lanes; i++) values[(row + i) * groups + k] = each[i];
}

// Weighted errors of a group's rows, before the search and after it, to the rows' sums.
inline void add_losses(double* losses, int64_t row, int lanes, Reals before, Reals after) {
    alignas(64) float first[kStrip], last[kStrip];
    store_lanes(first, before);
    store_lanes(last, after);
    for (int i = 0; i < lanes; i++) {
        losses[2 * (row + i)] += static_cast<double>(first[i]);
        losses[2 * (row + i) + 1] += static_cast<double>(last[i]);
    }
}

template <class T>
inline void weigh_rows(const Weights& w, int64_t group, const Weighing& weighing, double* out) {
    for (int64_t row = 0; row < w.rows; row++) out[row] = 0.0;
    for_group_rows<T>(w, group, weighing, [&](GroupRows<T>& g, int64_t row, int64_t, Strip& s) {
        find_strip_extremes<T>(g, 0.0f, s);
        Reals squares = {};
        for (int64_t chunk = 0; chunk < g.chunks(); chunk++) {
            const int64_t cols = take_chunk<T>(g, chunk, s);
            Reals sum = {};
            for (int64_t j = 0; j < cols; j++) sum += load_lanes(s.ew + j * kStrip) * load_lanes(s.w + j * kStrip);
            squares += sum;
        }
        alignas(64) float each[kStrip];
        store_lanes(each, squares);
        for (int i = 0; i < g.lanes; i++) out[row + i] += static_cast<double>(each[i]);
    });
}

void weigh_squares(const Weights& w, int64_t group, const Weighing& weighing, double* out) {
    if (w.dtype == Dtype::BF16) return weigh_rows<Bf16>(w, group, weighing, out);
    if (w.dtype == Dtype::F16) return weigh_rows<F16>(w, group, weighing, out);
    weigh_rows<F32>(w, group, weighing, out);
}
