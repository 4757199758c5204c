// rtn_int and error_int in one pass: a weight is read and widened once, and its code is not read back. Part of
// bodies.inl.
//
// Between the rounding and the difference the code stays a float. Of 16-bit weights bracketed() with kRound for a base is
// t = 2 * (kRound + n), n = RNE(w / s). Clamped between the t of the lowest and highest code, t - 2 * kRound is
// twice code - zero, exactly, and times half the scale it is the product that error_int subtracts: both factors are
// exact, and so is the product (an fp16 scale and 9 bits), however it is found. A bad group has both bounds at level 0,
// which maps infinity and NaN to its code too.
//
// In a plain group every code is in range unclamped (rounding is monotonic, so its two extremes show it), and no
// quotient is half-way but 1/2, which rounds to 0 as its lower bracket does. Then that bracket alone is RNE(w / s).
// A quotient n + 1/2 with n > 0 needs w = (2n + 1) * s / 2: three times the odd part of s is then a number of no more
// significant bits than a weight has, p. Not so if s has p of them itself, or p - 1 and a significand above 4/3.
//
// fp32 weights have RNE(fl(w / s)) for a code, and t = 2 * (kRound + n) in the same way. Both brackets come from numbers
// on either side of the quotient and of its rounding, so that n is that code but where the quotient is near to half-way:
// there n is the even one of the two. Then it is the code if |w - n * s|, which is exact, is s / 2 at most: of exactly
// half-way quotients, which weights of few bits have many of, and of those on its side, rounded to half-way or not.
// A block with a larger difference, where no code is clamped, is divided.

struct alignas(64) Levels {
    float lowest[kBatch], highest[kBatch];  // t of the lowest and the highest code
    int32_t plain[kBatch];
};

template <class T>
constexpr bool kIsShort = sizeof(typename T::Raw) == 2;

// How t is found of a weight: 2 * (kRound + n) with half the scale for a unit, or kRound + n.
struct Bracketed {
    float below, above, unit;
    static constexpr float kOrigin = 2.0f * kRound;
    Bracketed(const GroupScales& g, int64_t k) : below(g.below[k]), above(g.above[k]), unit(0.5f * g.scale[k]) {}
    float find(float w) const { return bracketed(w, below, above, kRound); }
};

struct LowerBracket {
    float below, unit;
    static constexpr float kOrigin = kRound;
    LowerBracket(const GroupScales& g, int64_t k) : below(g.below[k]), unit(g.scale[k]) {}
    float find(float w) const { return multiply_add(w, below, kRound); }
};

struct Divided {
    float scale, unit;
    static constexpr float kOrigin = 2.0f * kRound;
    Divided(const GroupScales& g, int64_t k) : scale(g.scale[k]), unit(0.5f * g.scale[k]) {}
    float find(float w) const { return 2.0f * (w / scale + kRound); }
};

// Returns how many groups are left with nothing but zeros although a weight is none, by the codes of their extremes.
template <class T>
inline int32_t find_levels(const GroupScales& g, int count, int bits, Levels& l) {
    constexpr float kOrigin = 2.0f * kRound;
    const float span = static_cast<float>(2 * ((1 << bits) - 1));
    int32_t zeroed = 0;
    for (int i = 0; i < count; i++) {
        const float lowest = kOrigin - static_cast<float>(2 * g.zero[i]), highest = lowest + span;
        float one, other;
        bool fine = true;
        if constexpr (kIsShort<T>) {
            constexpr uint32_t kLastBit = 1u << (24 - T::kSignificantBits), kFraction = 0x7fffffu;
            one = bracketed(g.mx[i], g.below[i], g.above[i], kRound);
            other = bracketed(-g.neg[i], g.below[i], g.above[i], kRound);
            const uint32_t fraction = bits_of_float(g.scale[i]) & kFraction;
            fine = ((fraction & (2 * kLastBit - 1)) != 0) |
                   (((fraction & (2 * kLastBit)) != 0) & (fraction > kFraction / 3 + 1));
        } else {
            one = 2.0f * (g.mx[i] / g.scale[i] + kRound);
            other = 2.0f * (-g.neg[i] / g.scale[i] + kRound);
        }
        const bool fits = (one >= lowest) & (one <= highest) & (other >= lowest) & (other <= highest);
        l.plain[i] = (g.bad[i] == 0) & fits & fine;
        l.lowest[i] = g.bad[i] != 0 ? kOrigin : lowest;
        l.highest[i] = g.bad[i] != 0 ? kOrigin : highest;
        const bool above = (one > kOrigin) | (other > kOrigin), below = (one < kOrigin) | (other < kOrigin);
        const bool stays = (above & (highest > kOrigin)) | (below & (lowest < kOrigin));
        const bool is_zero = (g.mx[i] == 0.0f) & (g.neg[i] == 0.0f);
        zeroed += (g.bad[i] != 0) | (!stays & !is_zero) ? 1 : 0;
    }
    return zeroed;
}

// A row's squares, weights and products, batch by batch, and its largest differences.
struct alignas(64) BatchError {
    float squares[kSpan / 2], weights[kSpan / 2], products[kSpan / 2];
    int32_t largest[kBlock / 2];
};

// Columns of group k. Plain ones need no clamp.
template <class T, class Way, bool kPlain, int kWidth>
inline void round_and_add(const typename T::Raw* SHARDQ_RESTRICT src, const GroupScales& g, const Levels& l, int64_t k,
                          uint8_t* SHARDQ_RESTRICT codes, float* SHARDQ_RESTRICT squares,
                          float* SHARDQ_RESTRICT weights, float* SHARDQ_RESTRICT products,
                          int32_t* SHARDQ_RESTRICT largest) {
    const Way way(g, k);
    const float lowest = l.lowest[k], highest = l.highest[k];
    const uint32_t zeros = static_cast<uint32_t>(g.zero[k]) * 0x0101u;  // the zero point under both codes of a pair
    for (int i = 0; i < kWidth / 2; i++) {
        const Pair<T> w = Pair<T>::load(src + 2 * i);
        float even = way.find(w.even), odd = way.find(w.odd);
        if constexpr (!kPlain) {
            even = even > lowest ? even : lowest;  // NaN becomes lowest
            odd = odd > lowest ? odd : lowest;
            even = even < highest ? even : highest;
            odd = odd < highest ? odd : highest;
        }
        const uint16_t both = static_cast<uint16_t>(bits_of_float(even) + (bits_of_float(odd) << 8) + zeros);
        std::memcpy(codes + 2 * i, &both, sizeof both);
        const float even_difference = difference<true>(w.even, even - Way::kOrigin, way.unit);
        const float odd_difference = difference<true>(w.odd, odd - Way::kOrigin, way.unit);
        largest[i] = add_pair(w.even, w.odd, even_difference, odd_difference, largest[i], squares[i], weights[i],
                              products[i]);
    }
}

// Columns from `column` of a batch on, `at` of its span; all are of group k.
template <class T, bool kPlain, int kWidth>
inline void round_block(const typename T::Raw* src, int64_t column, int64_t at, const GroupScales& g, const Levels& l,
                        int64_t k, uint8_t* codes, BatchError& e) {
    float *squares = e.squares + at / 2, *weights = e.weights + at / 2, *products = e.products + at / 2;
    src += column;
    codes += column;
    if constexpr (kIsShort<T>) {
        using Way = std::conditional_t<kPlain, LowerBracket, Bracketed>;
        round_and_add<T, Way, kPlain, kWidth>(src, g, l, k, codes, squares, weights, products, e.largest);
        return;
    } else if constexpr (kPlain) {
        int32_t own[kWidth / 2] = {}, most = 0;
        round_and_add<T, Bracketed, true, kWidth>(src, g, l, k, codes, squares, weights, products, own);
        for (const int32_t each : own) most = each > most ? each : most;
        if (most <= static_cast<int32_t>(bits_of_float(0.5f * g.scale[k]) & 0x7fffffffu)) {
            for (int i = 0; i < kWidth / 2; i++) e.largest[i] = own[i] > e.largest[i] ? own[i] : e.largest[i];
            return;
        }
    }
    round_and_add<T, Divided, kPlain, kWidth>(src, g, l, k, codes, squares, weights, products, e.largest);
}

// The group of a column; kWidth columns share one.
template <int kWidth>
inline int64_t group_of(int64_t column, int64_t group) {
    return kWidth < kBlock ? column / kWidth : column / group;
}

// Whole blocks of a batch, kSpan columns at most, from column `begin` of the batch on. Plain groups first, then the
// others: a branch for each would often be mispredicted.
template <class T, int kWidth>
inline void round_and_add_span(const typename T::Raw* src, int64_t begin, int64_t width, int64_t group,
                               const GroupScales& g, const Levels& l, uint8_t* codes, BatchError& e) {
    int32_t plain[kSpan / kWidth], other[kSpan / kWidth];  // first columns
    int plain_count = 0, other_count = 0;
    for (int32_t at = 0; at < width; at += kWidth) {
        const int32_t is_plain = l.plain[group_of<kWidth>(begin + at, group)];
        plain[plain_count] = other[other_count] = at;
        plain_count += is_plain;
        other_count += 1 - is_plain;
    }
    for (int i = 0; i < plain_count; i++) {
        const int64_t column = begin + plain[i];
        round_block<T, true, kWidth>(src, column, plain[i], g, l, group_of<kWidth>(column, group), codes, e);
    }
    for (int i = 0; i < other_count; i++) {
        const int64_t column = begin + other[i];
        round_block<T, false, kWidth>(src, column, other[i], g, l, group_of<kWidth>(column, group), codes, e);
    }
}

// Columns that the one pass takes: whole groups and whole blocks of a row, where a group is a known part of a block, or
// blocks. The long way takes the others.
inline int64_t one_pass_columns(int64_t cols, int64_t group) {
    if (group == 32 || group == 64) return cols / kBlock * kBlock;
    return group % kBlock == 0 ? cols / group * group : 0;
}

// The first `end` columns of a row, a number that one_pass_columns gave; as rtn_columns and add_columns.
template <class T, bool kSymmetric>
inline int64_t rtn_error_columns(const typename T::Raw* src, int64_t end, const IntScheme& scheme, GroupScales& g,
                                 uint8_t* codes, float* scales, uint8_t* zeros, RowSums& sums) {
    const int64_t group = scheme.group, step = batch_groups(group) * group;
    Levels l;
    BatchError e;
    std::memset(e.largest, 0, sizeof e.largest);
    int64_t bad = 0;
    for (int64_t at = 0; at < end; at += step) {
        const int64_t cols = least(step, end - at), first = at / group;
        const int count = static_cast<int>(cols / group);
        bad += scale_batch<T, kSymmetric>(src + at, cols, scheme, count, g, scales + first, zeros + first);
        sums.zeroed += find_levels<T>(g, count, scheme.bits, l);
        for (int64_t i = 0; i < cols; i += kSpan) {
            const int64_t width = least(kSpan, cols - i);
            if (group == 32) {
                round_and_add_span<T, 32>(src + at, i, width, group, g, l, codes + at, e);
            } else if (group == 64) {
                round_and_add_span<T, 64>(src + at, i, width, group, g, l, codes + at, e);
            } else {
                round_and_add_span<T, 128>(src + at, i, width, group, g, l, codes + at, e);
            }
            add_blocks(e.squares, width / kBlock, sums.squares);
            add_blocks(e.weights, width / kBlock, sums.weights);
            add_blocks(e.products, width / kBlock, sums.products);
        }
    }
    for (const int32_t each : e.largest) sums.largest = each > sums.largest ? each : sums.largest;
    return bad;
}

template <class T, bool kSymmetric>
inline int64_t rtn_error_rows(const Weights& w, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros,
                              double* stats) {
    const int64_t groups = ceil_div(w.cols, scheme.group), end = one_pass_columns(w.cols, scheme.group);
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    GroupScales g = {};
    Piece p;
    int64_t bad = 0;
    for (int64_t row = 0; row < w.rows; row++) {
        const auto* from = src + row * w.cols;
        uint8_t* to = codes + row * w.cols;
        float* steps = scales + row * groups;
        uint8_t* points = zeros + row * groups;
        RowSums sums = {};
        bad += rtn_error_columns<T, kSymmetric>(from, end, scheme, g, to, steps, points, sums);
        bad += rtn_columns<T, kSymmetric>(from, end, w.cols, scheme, g, to, steps, points);
        add_columns<T>(from, to, steps, points, end, w.cols, scheme.group, p, sums);
        if (end < w.cols) sums.zeroed += count_zeroed_int<T>(from, to, steps, points, end, w.cols, scheme.group);
        sums.at_ends = count_ends(to, w.cols, ends_of_bits(scheme.bits));
        sums.store(stats + row * kFigures);
    }
    return bad;
}

template <class T>
inline int64_t rtn_error_any(const Weights& w, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros,
                             double* stats) {
    return scheme.symmetric ? rtn_error_rows<T, true>(w, scheme, codes, scales, zeros, stats)
                            : rtn_error_rows<T, false>(w, scheme, codes, scales, zeros, stats);
}

int64_t rtn_error_int(const Weights& w, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros,
                      double* stats) {
    if (w.dtype == Dtype::BF16) return rtn_error_any<Bf16>(w, scheme, codes, scales, zeros, stats);
    if (w.dtype == Dtype::F16) return rtn_error_any<F16>(w, scheme, codes, scales, zeros, stats);
    return rtn_error_any<F32>(w, scheme, codes, scales, zeros, stats);
}
