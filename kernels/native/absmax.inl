// Largest magnitude, and smallest and largest value, of every group of raw weights. Part of bodies.inl.
//
// Patterns without their sign sort like magnitudes, and sortable ones like values. NaN lies beyond infinity
// on both sides, so the extremes show whether a group is bad.

constexpr int kPatterns = 256;  // groups whose extremes are kept as patterns before they become floats

// Flips all but the sign of a negative pattern, which then sorts as a signed number; its own inverse.
template <class T>
inline typename T::Signed sortable_raw(typename T::Raw raw) {
    constexpr int kSignBit = 8 * sizeof(typename T::Raw) - 1;
    const auto value = static_cast<typename T::Signed>(raw);
    const auto mask = static_cast<typename T::Raw>(static_cast<typename T::Raw>(value >> kSignBit) >> 1);
    return static_cast<typename T::Signed>(raw ^ mask);
}

template <class T>
inline int32_t magnitude_of(const typename T::Raw* SHARDQ_RESTRICT src, int64_t cols) {
    constexpr auto kMagnitude = static_cast<typename T::Raw>(~typename T::Raw{0}) >> 1;
    typename T::Signed most = 0;
    for (int64_t i = 0; i < cols; i++) {
        const auto each = static_cast<typename T::Signed>(src[i] & kMagnitude);
        most = each > most ? each : most;
    }
    return most;
}

template <class T>
inline void range_of(const typename T::Raw* SHARDQ_RESTRICT src, int64_t cols, int32_t* lowest, int32_t* highest) {
    typename T::Signed low = sortable_raw<T>(src[0]), high = low;
    for (int64_t i = 1; i < cols; i++) {
        const typename T::Signed key = sortable_raw<T>(src[i]);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    *lowest = low;
    *highest = high;
}

// In short groups of 16-bit weights a compiler's tree of shuffles costs more than the weights do.
inline bool is_short(int64_t group) { return group < 128 && group % 8 == 0; }

template <class T>
inline int64_t absmax_rows(const Weights& w, int64_t group, float* out) {
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    const int64_t groups = ceil_div(w.cols, group);
    int32_t most[kPatterns];
    int64_t bad = 0;
    for (int64_t row = 0; row < w.rows; row++, src += w.cols, out += groups) {
        for (int64_t first = 0; first < groups; first += kPatterns) {
            const int64_t count = least(kPatterns, groups - first);
            int64_t i = 0;
#ifdef SHARDQ_SHORT_EXTREMES
            if constexpr (sizeof(typename T::Raw) == 2) {
                if (is_short(group)) {
                    for (; i < count && (first + i + 1) * group <= w.cols; i++) {
                        most[i] = short_magnitude(src + (first + i) * group, group);
                    }
                }
            }
#endif
            for (; i < count; i++) {
                const int64_t at = (first + i) * group;
                most[i] = magnitude_of<T>(src + at, least(group, w.cols - at));
            }
            int32_t all_bad = 0;
            for (int64_t j = 0; j < count; j++) {
                const bool is_bad = most[j] >= static_cast<int32_t>(T::kInfinity);
                const auto pattern = is_bad ? static_cast<uint32_t>(T::kInfinity) : static_cast<uint32_t>(most[j]);
                out[first + j] = float_of_bits(T::widen_bits(pattern));
                all_bad += is_bad;
            }
            bad += all_bad;
        }
    }
    return bad;
}

// The float of a sortable key; a zero is +0.
template <class T>
inline float float_of_key(int32_t key) {
    const auto raw = static_cast<typename T::Raw>(sortable_raw<T>(static_cast<typename T::Raw>(key)));
    return widen_value<T>(raw) + 0.0f;
}

template <class T>
inline int64_t range_rows(const Weights& w, int64_t group, float* out_min, float* out_max) {
    constexpr auto kInfinity = static_cast<int32_t>(T::kInfinity);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    const int64_t groups = ceil_div(w.cols, group);
    int32_t low[kPatterns], high[kPatterns];
    int64_t bad = 0;
    for (int64_t row = 0; row < w.rows; row++, src += w.cols, out_min += groups, out_max += groups) {
        for (int64_t first = 0; first < groups; first += kPatterns) {
            const int64_t count = least(kPatterns, groups - first);
            int64_t i = 0;
#ifdef SHARDQ_SHORT_EXTREMES
            if constexpr (sizeof(typename T::Raw) == 2) {
                if (is_short(group)) {
                    for (; i < count && (first + i + 1) * group <= w.cols; i++) {
                        short_range(src + (first + i) * group, group, low + i, high + i);
                    }
                }
            }
#endif
            for (; i < count; i++) {
                const int64_t at = (first + i) * group;
                range_of<T>(src + at, least(group, w.cols - at), low + i, high + i);
            }
            int32_t all_bad = 0;
            for (int64_t j = 0; j < count; j++) {
                const bool is_bad = (high[j] >= kInfinity) | (low[j] <= ~kInfinity);
                out_min[first + j] = float_of_key<T>(is_bad ? ~kInfinity : low[j]);
                out_max[first + j] = float_of_key<T>(is_bad ? kInfinity : high[j]);
                all_bad += is_bad;
            }
            bad += all_bad;
        }
    }
    return bad;
}

int64_t group_absmax(const Weights& w, int64_t group, float* out) {
    if (w.dtype == Dtype::BF16) return absmax_rows<Bf16>(w, group, out);
    if (w.dtype == Dtype::F16) return absmax_rows<F16>(w, group, out);
    return absmax_rows<F32>(w, group, out);
}

int64_t group_range(const Weights& w, int64_t group, float* out_min, float* out_max) {
    if (w.dtype == Dtype::BF16) return range_rows<Bf16>(w, group, out_min, out_max);
    if (w.dtype == Dtype::F16) return range_rows<F16>(w, group, out_min, out_max);
    return range_rows<F32>(w, group, out_min, out_max);
}
