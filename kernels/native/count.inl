// Codes at the ends of their range, and groups of which nothing is left. Part of bodies.inl.

// A float's code is at an end where code & mask is at least `bound`, and a number, whose mask is 0xff, where
// (code - 1) mod 256 is.
struct Ends {
    uint8_t mask, bound;
};

// Of numbers 0 and 2^bits - 1.
inline Ends ends_of_bits(int bits) { return {0xff, static_cast<uint8_t>((1 << bits) - 2)}; }

// Of floats both signs of the largest value; infinity and NaN lie behind it.
template <class E>
inline Ends ends_of_float() {
    return {static_cast<uint8_t>(E::kSign - 1u), static_cast<uint8_t>(E::kLargestCode)};
}

constexpr int kCountLanes = 64;
constexpr int64_t kMostCount = 255;  // that a lane holds

// Lanes of bytes: a wider sum would take several times as long.
template <bool kIsFloat>
inline int64_t count_ends_of(const uint8_t* SHARDQ_RESTRICT codes, int64_t cols, Ends ends) {
    const uint8_t mask = kIsFloat ? ends.mask : 0xff, shift = kIsFloat ? 0 : 1, bound = ends.bound;
    int64_t count = 0, at = 0;
    while (cols - at >= kCountLanes) {
        alignas(64) uint8_t lanes[kCountLanes] = {};
        const int64_t steps = least(kMostCount, (cols - at) / kCountLanes);
        for (int64_t k = 0; k < steps; k++) {
            const uint8_t* SHARDQ_RESTRICT from = codes + at + k * kCountLanes;
            for (int i = 0; i < kCountLanes; i++) {
                const uint8_t place = static_cast<uint8_t>((from[i] & mask) - shift);
                lanes[i] = static_cast<uint8_t>(lanes[i] + (place >= bound ? 1 : 0));
            }
        }
        int32_t all = 0;
        for (int i = 0; i < kCountLanes; i++) all += lanes[i];
        count += all;
        at += steps * kCountLanes;
    }
    for (; at < cols; at++) count += static_cast<uint8_t>((codes[at] & mask) - shift) >= bound ? 1 : 0;
    return count;
}

inline int64_t count_ends(const uint8_t* codes, int64_t cols, Ends ends) {
    return ends.mask == 0xff ? count_ends_of<false>(codes, cols, ends) : count_ends_of<true>(codes, cols, ends);
}

// Whether a weight is not zero; a NaN is not.
template <class T>
inline bool has_weight(const typename T::Raw* SHARDQ_RESTRICT src, int64_t width) {
    uint32_t weights = 0;
    for (int64_t i = 0; i < width; i++) weights |= T::widen_bits(src[i]) & 0x7fffffffu;
    return weights != 0;
}

// Whether all codes of a group decode to zero although a weight is none.
template <class T, class Decoder>
inline bool is_zeroed(const Decoder& decoder, const typename T::Raw* SHARDQ_RESTRICT src,
                      const uint8_t* SHARDQ_RESTRICT codes, int64_t width, float scale, float zero) {
    const Decoder d = decoder;
    uint32_t values = 0;
    for (int64_t i = 0; i < width; i++) values |= bits_of_float(d.value(codes[i], scale, zero)) & 0x7fffffffu;
    return values == 0 && has_weight<T>(src, width);
}

// Whether products with one of these scales may be rounded to zero.
inline bool has_small(const float* SHARDQ_RESTRICT scales, int64_t count) {
    int32_t least_bits = 0x7fffffff;
    for (int64_t i = 0; i < count; i++) {
        const int32_t bits = static_cast<int32_t>(bits_of_float(scales[i]) & 0x7fffffffu);
        least_bits = bits < least_bits ? bits : least_bits;
    }
    return least_bits < 0x0d800000;  // 2^-100
}

// Zeroed groups of a row. Values that are all zero come of equal codes (but for signs), unless products are rounded to
// zero: the first eight codes tell nearly all other groups.
template <class T, class Decoder, class Zero>
inline int64_t count_zeroed(const Decoder& decoder, const typename T::Raw* src, const uint8_t* codes, int64_t cols,
                            int64_t group, const float* scales, const Zero* zeros, uint8_t mask) {
    const bool is_telling = group >= 8 && !has_small(scales, ceil_div(cols, group));
    const int64_t whole = is_telling ? cols / group : 0;
    const uint64_t masks = mask * 0x0101010101010101u;
    const auto check = [&](int64_t k) -> int64_t {
        const float zero = Decoder::kHasZeros ? static_cast<float>(zeros[k]) : 0.0f;
        const int64_t at = k * group, width = least(group, cols - at);
        return is_zeroed<T>(decoder, src + at, codes + at, width, scales[k], zero) ? 1 : 0;
    };
    int64_t count = 0;
    const uint8_t* from = codes;
    for (int64_t k = 0; k < whole; k++, from += group) {
        uint64_t word;
        std::memcpy(&word, from, sizeof word);
        word &= masks;
        if (word == (word << 8 | word >> 56)) count += check(k);
    }
    for (int64_t k = whole; k * group < cols; k++) count += check(k);
    return count;
}
