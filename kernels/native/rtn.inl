// Round-to-nearest integer codes, group by group. Part of bodies.inl.
//
// contract.py has the arithmetic as a formula, reference/integers.py in torch.
//
// Division. The codes are RNE(fl(w / s)). For 16-bit sources they are found without dividing, from two brackets:
//   q = |w / s|, r = 1/s rounded, e = 6 * 2^-24, a = RNE(|w| * r * (1 - e)), b = RNE(|w| * r * (1 + e)).
// The roundings on the way (r, its factor, the product unless it is fused) are below 3.01 * 2^-24 in all, so a comes
// from a number below q and b from one above q, neither farther than 9.1 * 2^-24 of q.
// - If q is half-way, n + 1/2: a = n and b = n + 1.
// - If not: s has 11 significant bits and 2n + 1 <= 513, so (n + 1/2) * s is at most 2^20.01 times some unit u; w is a
//   multiple of u, or of a smaller unit of which it holds less than 2^11. So q differs from every half-way point by
//   more than 2^-20.02 of itself, that is 15 * 2^-24, and a = b = RNE(q). The quotient rounded to fp32 differs from q
//   by 2^-24 at most: it lies on the same side.
// In both cases the float sum (kRound + a) + (kRound + b) lies where floats are 2 apart. Its own rounding, half to
// even, makes it 2 * (kRound + RNE(q)), and its low bits are RNE(q) as an integer. Negative w mirror all this.
// fp32 sources have too many bits for it and are divided; rtn_error.inl says how it mostly does without.

constexpr float kSmallestScale = 168.0f / 16777216.0f;  // 1e-5 rounded to fp16
constexpr float kLargestScale = 65504.0f;
constexpr int kSpan = 2048;  // columns rounded before they are narrowed to bytes; the buffer stays in L1
constexpr int kBatch = 64;   // groups whose scales are computed at a time

// Rounding leaves code + kBias as 16 bits: never negative, and a multiple of 256, so that truncation to a byte
// removes it.
constexpr int32_t kBias = 512;

struct Rounding {
    float below, above, base, scale;
    int32_t zero;
};

struct alignas(64) GroupScales {  // a vector that straddles cache lines costs twice
    int32_t highest[kBatch];  // raw pattern of the largest value; 0 when all are negative
    uint32_t lowest[kBatch];  // raw pattern of the most negative value; one without the sign bit when none is
    float mx[kBatch], neg[kBatch];  // max(0, largest value), -min(0, smallest value)
    float scale[kBatch];
    float below[kBatch];  // 1 / scale, a little less
    float above[kBatch];  // 1 / scale, a little more
    int32_t zero[kBatch];
    float base[kBatch];  // kRound plus kBias plus the even part of zero
    int32_t bad[kBatch];

    Rounding rounding(int i) const { return {below[i], above[i], base[i], scale[i], zero[i]}; }
};

// To the nearest fp16 value, half to even, kept as a float; x >= 0. Beyond fp16 the result exceeds kLargestScale.
inline float round_to_fp16(float x) {
    const uint32_t bits = bits_of_float(x);
    const float normal = float_of_bits((bits + 0x0fffu + ((bits >> 13) & 1u)) & ~0x1fffu);
    const float subnormal = (x + 0.5f) - 0.5f;  // floats in [0.5, 1) are 2^-24 apart, as fp16 subnormals are
    return bits < 0x38800000u ? subnormal : normal;
}

template <class T>
inline void find_extremes(const typename T::Raw* SHARDQ_RESTRICT src, int64_t cols, int32_t* highest,
                          uint32_t* lowest) {
    typename T::Signed high = 0;
    typename T::Raw low = 0;
    for (int64_t i = 0; i < cols; i++) {
        const typename T::Raw raw = src[i];
        const typename T::Signed value = static_cast<typename T::Signed>(raw);
        high = value > high ? value : high;
        low = raw > low ? raw : low;
    }
    *highest = high;
    *lowest = low;
}

// From the extremes to scale, zero point and brackets, for `count` groups. One loop, so that it vectorises over groups.
template <class T, bool kSymmetric>
inline void find_scales(GroupScales& g, int count, int bits) {
    constexpr int kSignBit = 8 * sizeof(typename T::Raw) - 1;
    const float levels = static_cast<float>((1 << bits) - 1);
    const float half_levels = static_cast<float>(1 << (bits - 1));
    const int32_t top = (1 << bits) - 1, middle = 1 << (bits - 1);
    for (int i = 0; i < count; i++) {
        const uint32_t low = (0u - (g.lowest[i] >> kSignBit)) & g.lowest[i] & ((1u << kSignBit) - 1u);
        const uint32_t high = static_cast<uint32_t>(g.highest[i]);
        const float mx = float_of_bits(T::widen_bits(high));  // max(0, w)
        const float neg = float_of_bits(T::widen_bits(low));  // -min(0, w)
        const float extreme = mx < neg ? neg : mx;
        const float magnitude = round_to_fp16(kSymmetric ? extreme / half_levels : (mx + neg) / levels);
        const int32_t bad = (high >= T::kInfinity) | (low >= T::kInfinity) | !(magnitude <= kLargestScale);
        float scale = magnitude < kSmallestScale ? kSmallestScale : magnitude;
        // auto-round: a positive extreme, and a tie, give a negative scale; a scale that rounded to -0 becomes
        // positive.
        if (kSymmetric) scale = (!(mx < neg) & (magnitude > 0.0f)) ? -scale : scale;
        scale = bad ? kSmallestScale : scale;
        const float inverse = 1.0f / scale;
        g.mx[i] = mx;
        g.neg[i] = neg;
        g.scale[i] = scale;
        g.below[i] = inverse * (1.0f - 6.0f / 16777216.0f);
        g.above[i] = inverse * (1.0f + 6.0f / 16777216.0f);
        const float lowest_code = neg / scale + kRound;
        int32_t zero = static_cast<int32_t>(bits_of_float(lowest_code)) - static_cast<int32_t>(bits_of_float(kRound));
        zero = zero < top ? zero : top;
        zero = (kSymmetric | bad) ? middle : zero;
        g.zero[i] = zero;
        g.base[i] = kRound + static_cast<float>((zero & ~1) + kBias);
        g.bad[i] = bad;
    }
}

// 16-bit sources; see the note on division. `base` is kRound plus an even integer; the low bits of the result are that
// integer plus RNE(w / s).
inline float bracketed(float w, float below, float above, float base) {
    return multiply_add(w, below, base) + multiply_add(w, above, base);
}

inline uint32_t bracketed_bits(float w, float below, float above, float base) {
    return bits_of_float(bracketed(w, below, above, base));
}

template <class T>
inline void round_columns(const typename T::Raw* SHARDQ_RESTRICT src, int64_t cols, Rounding r,
                          int16_t* SHARDQ_RESTRICT out) {
    const int32_t offset = r.zero + kBias;
    for (int64_t i = 0; i < cols; i++) {
        const uint32_t level = bracketed_bits(widen_value<T>(src[i]), r.below, r.above, kRound);
        out[i] = static_cast<int16_t>(static_cast<int32_t>(level) + offset);
    }
}

// bf16 two at a time: both halves of a 32-bit word widen with one operation each, and both levels fit in one again.
// The upper bits of the even level, those of 2 * kRound, are taken off the odd one beforehand.
template <>
inline void round_columns<Bf16>(const uint16_t* SHARDQ_RESTRICT src, int64_t cols, Rounding r,
                                int16_t* SHARDQ_RESTRICT out) {
    const float odd_base = r.base - static_cast<float>(0x4bc0);
    const uint32_t odd_zero = static_cast<uint32_t>(r.zero & 1) * 0x00010001u;
    const int64_t pairs = cols / 2;
    for (int64_t i = 0; i < pairs; i++) {
        uint32_t raw;
        std::memcpy(&raw, src + 2 * i, sizeof raw);
        const uint32_t even = bracketed_bits(float_of_bits(raw << 16), r.below, r.above, r.base);
        const uint32_t odd = bracketed_bits(float_of_bits(raw & 0xffff0000u), r.below, r.above, odd_base);
        const uint32_t both = even + (odd << 16) + odd_zero;
        std::memcpy(out + 2 * i, &both, sizeof both);
    }
    if (cols % 2 != 0) {
        const uint32_t last = bracketed_bits(widen_value<Bf16>(src[cols - 1]), r.below, r.above, r.base);
        out[cols - 1] = static_cast<int16_t>(last + odd_zero);
    }
}

template <>
inline void round_columns<F32>(const uint32_t* SHARDQ_RESTRICT src, int64_t cols, Rounding r,
                               int16_t* SHARDQ_RESTRICT out) {
    const int32_t offset = r.zero + kBias;
    for (int64_t i = 0; i < cols; i++) {
        const float level = float_of_bits(src[i]) / r.scale + kRound;
        out[i] = static_cast<int16_t>(static_cast<int32_t>(bits_of_float(level)) + offset);
    }
}

template <class T, int kWidth>
inline int round_whole_groups(const typename T::Raw* src, int64_t cols, const GroupScales& g, int16_t* out) {
    int i = 0;
    for (; (i + 1) * kWidth <= cols; i++) round_columns<T>(src + i * kWidth, kWidth, g.rounding(i), out + i * kWidth);
    return i;
}

// The groups of `cols` columns. Known widths let the compiler unroll without a remainder.
template <class T>
inline void round_groups(const typename T::Raw* src, int64_t cols, int64_t group, const GroupScales& g, int count,
                         int16_t* out) {
    int i = 0;
    if (group == 32) i = round_whole_groups<T, 32>(src, cols, g, out);
    if (group == 64) i = round_whole_groups<T, 64>(src, cols, g, out);
    if (group == 128) i = round_whole_groups<T, 128>(src, cols, g, out);
    for (; i < count; i++) {
        round_columns<T>(src + i * group, least(group, cols - i * group), g.rounding(i), out + i * group);
    }
}

inline void clamp_columns(const int16_t* SHARDQ_RESTRICT src, int64_t cols, int bits, uint8_t* SHARDQ_RESTRICT out) {
    const int16_t low = static_cast<int16_t>(kBias), high = static_cast<int16_t>(kBias + (1 << bits) - 1);
    for (int64_t i = 0; i < cols; i++) {
        const int16_t raised = src[i] < low ? low : src[i];
        out[i] = static_cast<uint8_t>(raised > high ? high : raised);
    }
}

template <class T>
inline void find_group_extremes(const typename T::Raw* src, int64_t cols, int64_t group, GroupScales& g, int count) {
    int i = 0;
#ifdef SHARDQ_EXTREMES_OF_FOUR
    if constexpr (sizeof(typename T::Raw) == 2) {
        if (group < 128 && group % 8 == 0) {
            for (; (i + 4) * group <= cols; i += 4) {
                extremes_of_four(src + i * group, group, g.highest + i, g.lowest + i);
            }
        }
    }
#endif
    if (group == 128) {
        for (; (i + 1) * 128 <= cols; i++) find_extremes<T>(src + i * 128, 128, g.highest + i, g.lowest + i);
    }
    for (; i < count; i++) {
        find_extremes<T>(src + i * group, least(group, cols - i * group), g.highest + i, g.lowest + i);
    }
}

// Extremes, scales and zero points of `count` groups (the last may be short), kBatch at most. Returns how many are bad.
template <class T, bool kSymmetric>
inline int64_t scale_batch(const typename T::Raw* src, int64_t cols, const IntScheme& scheme, int count, GroupScales& g,
                           float* scales, uint8_t* zeros) {
    find_group_extremes<T>(src, cols, scheme.group, g, count);
    find_scales<T, kSymmetric>(g, count, scheme.bits);
    std::memcpy(scales, g.scale, static_cast<size_t>(count) * sizeof *scales);
    for (int i = 0; i < count; i++) zeros[i] = static_cast<uint8_t>(g.zero[i]);
    int32_t bad = 0;
    for (int i = 0; i < count; i++) bad += g.bad[i];
    return bad;
}

// The codes of a batch: at most kSpan columns unless count is 1.
template <class T>
inline void round_batch(const typename T::Raw* src, int64_t cols, const IntScheme& scheme, int count,
                        const GroupScales& g, int64_t bad, uint8_t* codes) {
    alignas(64) int16_t span[kSpan];
    const int64_t group = scheme.group;
    if (count == 1) {
        for (int64_t at = 0; at < cols; at += kSpan) {
            const int64_t width = least(kSpan, cols - at);
            round_columns<T>(src + at, width, g.rounding(0), span);
            clamp_columns(span, width, scheme.bits, codes + at);
        }
    } else {
        round_groups<T>(src, cols, group, g, count, span);
        clamp_columns(span, cols, scheme.bits, codes);
    }
    if (bad == 0) return;
    for (int i = 0; i < count; i++) {
        if (g.bad[i] == 0) continue;
        std::memset(codes + i * group, 1 << (scheme.bits - 1), static_cast<size_t>(least(group, cols - i * group)));
    }
}

// Groups whose columns fit into a batch.
inline int64_t batch_groups(int64_t group) { return group >= kSpan ? 1 : least(kBatch, kSpan / group); }

// Columns `begin` to `end` of a row; `begin` is the first of a group, `end` is too or is the end of the row. Returns
// the number of bad groups.
template <class T, bool kSymmetric>
inline int64_t rtn_columns(const typename T::Raw* src, int64_t begin, int64_t end, const IntScheme& scheme,
                           GroupScales& g, uint8_t* codes, float* scales, uint8_t* zeros) {
    const int64_t step = batch_groups(scheme.group) * scheme.group;
    int64_t all_bad = 0;
    for (int64_t at = begin; at < end; at += step) {
        const int64_t cols = least(step, end - at), first = at / scheme.group;
        const int count = static_cast<int>(ceil_div(cols, scheme.group));
        const int64_t bad =
            scale_batch<T, kSymmetric>(src + at, cols, scheme, count, g, scales + first, zeros + first);
        round_batch<T>(src + at, cols, scheme, count, g, bad, codes + at);
        all_bad += bad;
    }
    return all_bad;
}

template <class T, bool kSymmetric>
inline int64_t rtn_rows(const Weights& w, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros) {
    const int64_t groups = ceil_div(w.cols, scheme.group);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    GroupScales g = {};
    int64_t bad = 0;
    for (int64_t row = 0; row < w.rows; row++) {
        const int64_t at = row * w.cols, first = row * groups;
        bad += rtn_columns<T, kSymmetric>(src + at, 0, w.cols, scheme, g, codes + at, scales + first, zeros + first);
    }
    return bad;
}

template <class T>
inline int64_t rtn_any(const Weights& w, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros) {
    return scheme.symmetric ? rtn_rows<T, true>(w, scheme, codes, scales, zeros)
                            : rtn_rows<T, false>(w, scheme, codes, scales, zeros);
}

int64_t rtn_int(const Weights& w, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros) {
    if (w.dtype == Dtype::BF16) return rtn_any<Bf16>(w, scheme, codes, scales, zeros);
    if (w.dtype == Dtype::F16) return rtn_any<F16>(w, scheme, codes, scales, zeros);
    return rtn_any<F32>(w, scheme, codes, scales, zeros);
}
