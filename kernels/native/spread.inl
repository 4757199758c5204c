// One value per group of columns to one value per column. Part of bodies.inl.
//
// What follows then knows no groups, and one loop takes a piece of a row whatever the groups are. Columns go in pairs:
// a 32-bit word of two bf16 widens with one operation per column, and two codes are one 16-bit word.

constexpr int kPairs = 512;  // pairs of columns at a time; the buffers stay in L1

inline void fill(float* SHARDQ_RESTRICT out, int64_t count, float value) {
    for (int64_t i = 0; i < count; i++) out[i] = value;
}

// Values of a piece's even and odd columns. The odd ones are used only where groups are odd, so that a pair may lie in
// two.
struct alignas(64) Spread {  // a vector that straddles cache lines costs twice
    float even[kPairs], odd[kPairs];

    const float* of_odd(int64_t group) const { return group % 2 != 0 ? odd : even; }
};

// Even groups of a known width, which becomes a few wide stores; returns how many columns they are.
template <int kWidth, class Value>
inline int64_t spread_whole_groups(Spread& s, int64_t width, const Value* values) {
    const int64_t count = width / kWidth;
    for (int64_t g = 0; g < count; g++) fill(s.even + g * (kWidth / 2), kWidth / 2, static_cast<float>(values[g]));
    return count * kWidth;
}

// The piece starts at column `at`, and `values` at the group of that column; at most 2 * kPairs columns.
template <class Value>
inline void spread_groups(Spread& s, int64_t at, int64_t width, int64_t group, const Value* values) {
    const int64_t first = at / group;
    int64_t i = 0;
    if (group == 16) i = spread_whole_groups<16>(s, width, values);
    if (group == 32) i = spread_whole_groups<32>(s, width, values);
    if (group == 64) i = spread_whole_groups<64>(s, width, values);
    if (group == 128) i = spread_whole_groups<128>(s, width, values);
    for (int64_t g = i / group; i < width; g++) {
        const int64_t end = least(width, (first + g + 1) * group - at), even = (i + 1) / 2, odd = i / 2;
        fill(s.even + even, (end + 1) / 2 - even, static_cast<float>(values[g]));
        if (group % 2 != 0) fill(s.odd + odd, end / 2 - odd, static_cast<float>(values[g]));
        i = end;
    }
}

template <class T>
struct Pair {
    float even, odd;
    static Pair load(const typename T::Raw* src) { return {widen_value<T>(src[0]), widen_value<T>(src[1])}; }
};

template <>
inline Pair<Bf16> Pair<Bf16>::load(const uint16_t* src) {
    uint32_t raw;
    std::memcpy(&raw, src, sizeof raw);
    return {float_of_bits(raw << 16), float_of_bits(raw & 0xffff0000u)};
}
