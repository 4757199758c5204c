// The error of values that come as numbers, whatever codes they had. Part of bodies.inl.

// Fills a piece; returns as add_pair does.
template <class T>
inline int32_t add_values(const typename T::Raw* SHARDQ_RESTRICT src, const float* SHARDQ_RESTRICT values,
                          int64_t width, int32_t largest, Piece& p) {
    float* SHARDQ_RESTRICT squares = p.squares;
    float* SHARDQ_RESTRICT weights = p.weights;
    float* SHARDQ_RESTRICT products = p.products;
    for (int64_t i = 0; i < width / 2; i++) {
        const Pair<T> w = Pair<T>::load(src + 2 * i);
        const float even = w.even - values[2 * i], odd = w.odd - values[2 * i + 1];
        largest = add_pair(w.even, w.odd, even, odd, largest, squares[i], weights[i], products[i]);
    }
    clear_rest(width, p);
    if (width % 2 == 0) return largest;
    const float weight = widen_value<T>(src[width - 1]);
    return add_last(weight, weight - values[width - 1], width, largest, p);
}

inline bool are_zeros(const float* SHARDQ_RESTRICT values, int64_t count) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < count; i++) bits |= bits_of_float(values[i]);
    return (bits & 0x7fffffffu) == 0;
}

// Zeroed groups of a row. The first eight values tell nearly all other groups.
template <class T>
inline int64_t count_zeroed_values(const typename T::Raw* src, const float* values, int64_t cols, int64_t group) {
    const int64_t whole = group >= 8 ? cols / group : 0;
    const auto check = [&](int64_t k) -> int64_t {
        const int64_t at = k * group, width = least(group, cols - at);
        return are_zeros(values + at, width) && has_weight<T>(src + at, width) ? 1 : 0;
    };
    int64_t count = 0;
    for (int64_t k = 0; k < whole; k++) {
        if (are_zeros(values + k * group, 8)) count += check(k);
    }
    for (int64_t k = whole; k * group < cols; k++) count += check(k);
    return count;
}

template <class T>
inline void error_values_of(const Weights& w, const float* values, int64_t group, double* stats) {
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    Piece p;
    for (int64_t row = 0; row < w.rows; row++) {
        const auto* from = src + row * w.cols;
        const float* q = values + row * w.cols;
        RowSums sums = {};
        for (int64_t at = 0; at < w.cols; at += 2 * kPairs) {
            const int64_t width = least(2 * kPairs, w.cols - at);
            sums.largest = add_values<T>(from + at, q + at, width, sums.largest, p);
            add_sums(p, width, sums);
        }
        sums.zeroed = count_zeroed_values<T>(from, q, w.cols, group);
        sums.store(stats + row * kFigures);
    }
}

void error_values(const Weights& w, const float* values, int64_t group, double* stats) {
    if (w.dtype == Dtype::BF16) return error_values_of<Bf16>(w, values, group, stats);
    if (w.dtype == Dtype::F16) return error_values_of<F16>(w, values, group, stats);
    return error_values_of<F32>(w, values, group, stats);
}
