// Smallest and largest value of every group. Part of bodies.inl.
//
// Patterns are compared as integers that sort like the numbers, so the order of comparison does not matter. NaN is
// passed over, a group of nothing but NaN gives +Inf and -Inf, and a zero result is +0.

// Flips all but the sign of a negative pattern; its own inverse.
inline int32_t sortable(int32_t pattern) {
    return pattern ^ static_cast<int32_t>(static_cast<uint32_t>(pattern >> 31) >> 1);
}

inline float from_sortable(int32_t key) { return float_of_bits(static_cast<uint32_t>(sortable(key))) + 0.0f; }

inline void minmax_of(const float* SHARDQ_RESTRICT x, int64_t cols, float* smallest, float* largest) {
    constexpr int32_t kInfinity = 0x7f800000;
    int32_t low = kInfinity, high = ~kInfinity;  // +Inf and -Inf
    for (int64_t i = 0; i < cols; i++) {
        const uint32_t bits = bits_of_float(x[i]);
        const int32_t key = sortable(static_cast<int32_t>(bits));
        const bool is_number = (bits & 0x7fffffffu) <= static_cast<uint32_t>(kInfinity);
        const int32_t for_low = is_number ? key : kInfinity, for_high = is_number ? key : ~kInfinity;
        low = for_low < low ? for_low : low;
        high = for_high > high ? for_high : high;
    }
    *smallest = from_sortable(low);
    *largest = from_sortable(high);
}

void group_minmax(const float* x, int64_t rows, int64_t cols, int64_t group, float* out_min, float* out_max) {
    const int64_t groups = ceil_div(cols, group);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t width = least(group, cols - g * group), at = row * groups + g;
            minmax_of(x + row * cols + g * group, width, out_min + at, out_max + at);
        }
    }
}
