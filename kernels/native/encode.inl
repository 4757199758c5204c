// Codes of weights whose scales are given. Part of bodies.inl; contract.py has the formulas.
//
// Quotients. Where every scale of a piece is a power of two whose inverse is a normal number, w * (1/s) is the number
// that w / s is, and is rounded alike; elsewhere it is divided. The factor of a scale 0 is NaN, so that every quotient
// is NaN, which becomes 0.
//
// Floats. For a in the binade of 2^E, or below the smallest normal number, whose E is then taken, elements are
// step = 2^(E - m) apart, m mantissa bits. a + 2^23 * step is rounded to whole steps, half to even, and its low bits
// are their number n, 2^(m + 1) at most; the code is ((E - smallest E) << m) + n, and a carry moves up by itself. Codes
// are even where n is. NaN is found after the fact, and the piece is then encoded again with care.

inline bool are_powers_of_two(const float* SHARDQ_RESTRICT scales, int64_t count) {
    int32_t others = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = bits_of_float(scales[i]), exponent = (bits >> 23) & 0xffu;
        const bool is_power = ((bits & 0x7fffffu) == 0) & (exponent >= 1u) & (exponent <= 253u);
        others |= !(is_power | ((bits & 0x7fffffffu) == 0));
    }
    return others == 0;
}

inline void find_factors(const float* SHARDQ_RESTRICT scales, int64_t count, bool powers, float* SHARDQ_RESTRICT out) {
    const float nan = float_of_bits(0x7fc00000u);
    for (int64_t i = 0; i < count; i++) {
        const float factor = powers ? 1.0f / scales[i] : scales[i];
        out[i] = scales[i] == 0.0f ? nan : factor;
    }
}

// How a quotient is found: Care means dividing, and looking at each for NaN.
enum class Way { Multiply, Divide, Care };

template <Way kWay>
inline float quotient(float w, float factor) {
    return kWay == Way::Multiply ? w * factor : w / factor;
}

template <Way kWay>
inline float number_of(float w, float factor) {
    const float v = quotient<kWay>(w, factor);
    return v == v ? v : 0.0f;
}

// Encoders leave the code in the low 16 bits of what they return, the upper 8 of them 0. `most` becomes a pattern above
// infinity's if the code is that of a NaN.

// Adding kRound plus an even number rounds to nearest, half to even.
struct IntEncoder {
    static constexpr bool kHasOffsets = false;
    float lowest, highest, base;

    explicit IntEncoder(int bits) {
        const float half = static_cast<float>(1 << (bits - 1));
        lowest = -half;
        highest = half - 1.0f;
        base = kRound + half;
    }

    template <Way kWay>
    uint32_t code(float w, float factor, float, int32_t&) const {
        float v = number_of<kWay>(w, factor);
        v = v > lowest ? v : lowest;
        v = v < highest ? v : highest;
        return bits_of_float(v + base);
    }
};

// Patterns of magnitudes sort like them, so the clamp is one of integers.
template <class E>
struct FloatEncoder {
    static constexpr bool kHasOffsets = false;
    // From the pattern of 2^E to that of 2^23 * step. Its low bits, an even number, take the smallest exponent off
    // the code.
    static constexpr uint32_t kToStep =
        (static_cast<uint32_t>(E::kShift) << 23) + (0x10000u - (E::kSmallestExponent >> E::kShift));

    template <Way kWay>
    uint32_t code(float w, float factor, float, int32_t& most) const {
        constexpr auto kLargest = static_cast<int32_t>(E::kLargest);
        constexpr auto kSmallest = static_cast<int32_t>(E::kSmallestExponent);
        // +0 takes the sign of a -0 away, -0 changes nothing: six-bit floats keep it.
        constexpr float kZero = E::kSign == 0x20u ? -0.0f : 0.0f;
        const float v = kWay == Way::Care ? number_of<kWay>(w, factor) : quotient<kWay>(w, factor);
        const uint32_t bits = bits_of_float(v + kZero);
        int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
        most = magnitude > most ? magnitude : most;
        magnitude = magnitude < kLargest ? magnitude : kLargest;
        int32_t exponent = magnitude & 0x7f800000;
        exponent = exponent > kSmallest ? exponent : kSmallest;
        const uint32_t binade = static_cast<uint32_t>(exponent);
        const float rounded = float_of_bits(static_cast<uint32_t>(magnitude)) + float_of_bits(binade + kToStep);
        return (bits_of_float(rounded) + (binade >> E::kShift)) | ((bits >> E::kSignShift) & E::kSign);
    }
};

template <EncodingRule kRule>
struct AffineEncoder {
    static constexpr bool kHasOffsets = true;
    float top;

    explicit AffineEncoder(int bits) : top(static_cast<float>((1 << bits) - 1)) {}

    template <Way kWay>
    uint32_t code(float w, float factor, float offset, int32_t&) const {
        float sum;
        if constexpr (kRule == EncodingRule::RoundAdd) {
            const float rounded = (number_of<kWay>(w, factor) + kRound) - kRound;
            sum = rounded + offset;
        } else if constexpr (kRule == EncodingRule::AddRound) {
            sum = number_of<kWay>(w, factor) + offset;
        } else {
            sum = number_of<kWay>(w - offset, factor);
        }
        sum = sum > 0.0f ? sum : 0.0f;  // NaN becomes 0
        sum = sum < top ? sum : top;
        return bits_of_float(sum + kRound);
    }
};

inline void narrow_pairs(const uint32_t* SHARDQ_RESTRICT src, int64_t pairs, uint8_t* SHARDQ_RESTRICT codes) {
    for (int64_t i = 0; i < pairs; i++) {
        const uint16_t both = static_cast<uint16_t>(src[i]);
        std::memcpy(codes + 2 * i, &both, sizeof both);
    }
}

// A piece of a row; factors and offsets are spread. Returns whether all quotients are numbers, as far as the encoder
// tells. Codes of pairs stay 32 bits wide until all are found: else compilers narrow every term of them.
template <class T, Way kWay, class Encoder>
inline bool encode_piece(const Encoder& encoder, const typename T::Raw* SHARDQ_RESTRICT src, int64_t width,
                         int64_t group, const Spread& factors, const Spread& offsets, uint8_t* SHARDQ_RESTRICT codes) {
    const float* even_factors = factors.even;
    const float* odd_factors = factors.of_odd(group);
    const float* even_offsets = offsets.even;
    const float* odd_offsets = offsets.of_odd(group);
    alignas(64) uint32_t both[kPairs];
    const Encoder e = encoder;
    const int64_t pairs = width / 2;
    int32_t most = 0;
    for (int64_t i = 0; i < pairs; i++) {
        const Pair<T> w = Pair<T>::load(src + 2 * i);
        const float even_offset = Encoder::kHasOffsets ? even_offsets[i] : 0.0f;
        const float odd_offset = Encoder::kHasOffsets ? odd_offsets[i] : 0.0f;
        const uint32_t even = e.template code<kWay>(w.even, even_factors[i], even_offset, most);
        const uint32_t odd = e.template code<kWay>(w.odd, odd_factors[i], odd_offset, most);
        both[i] = even + (odd << 8);
    }
    narrow_pairs(both, pairs, codes);
    if (width % 2 != 0) {
        const float weight = widen_value<T>(src[width - 1]), offset = Encoder::kHasOffsets ? even_offsets[pairs] : 0.0f;
        codes[width - 1] = static_cast<uint8_t>(e.template code<kWay>(weight, even_factors[pairs], offset, most));
    }
    return most <= 0x7f800000;
}

template <class T, class Encoder>
inline void encode_rows(const Encoder& encoder, const Weights& w, int64_t group, const float* scales,
                        const float* offsets, uint8_t* codes) {
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    const int64_t groups = ceil_div(w.cols, group);
    Spread factors, places;
    float factor[2 * kPairs + 1];  // per group; a piece touches no more
    for (int64_t row = 0; row < w.rows; row++, src += w.cols, codes += w.cols) {
        for (int64_t at = 0; at < w.cols; at += 2 * kPairs) {
            const int64_t width = least(2 * kPairs, w.cols - at), first = at / group;
            const int64_t count = ceil_div(at + width, group) - first;
            const float* steps = scales + row * groups + first;
            const bool powers = are_powers_of_two(steps, count);
            find_factors(steps, count, powers, factor);
            spread_groups(factors, at, width, group, factor);
            if constexpr (Encoder::kHasOffsets) {
                spread_groups(places, at, width, group, offsets + row * groups + first);
            }
            const bool done =
                powers ? encode_piece<T, Way::Multiply>(encoder, src + at, width, group, factors, places, codes + at)
                       : encode_piece<T, Way::Divide>(encoder, src + at, width, group, factors, places, codes + at);
            if (done) continue;
            find_factors(steps, count, false, factor);
            spread_groups(factors, at, width, group, factor);
            encode_piece<T, Way::Care>(encoder, src + at, width, group, factors, places, codes + at);
        }
    }
}

template <class Encoder>
inline void encode_any(const Encoder& encoder, const Weights& w, int64_t group, const float* scales,
                       const float* offsets, uint8_t* codes) {
    if (w.dtype == Dtype::BF16) return encode_rows<Bf16>(encoder, w, group, scales, offsets, codes);
    if (w.dtype == Dtype::F16) return encode_rows<F16>(encoder, w, group, scales, offsets, codes);
    return encode_rows<F32>(encoder, w, group, scales, offsets, codes);
}

void encode_scaled(const Weights& w, const Element& element, int64_t group, const float* scales, uint8_t* codes) {
    switch (element.kind) {
        case ElementKind::Int: return encode_any(IntEncoder(element.bits), w, group, scales, nullptr, codes);
        case ElementKind::E0M3: return encode_any(FloatEncoder<E0M3>{}, w, group, scales, nullptr, codes);
        case ElementKind::E2M1: return encode_any(FloatEncoder<E2M1>{}, w, group, scales, nullptr, codes);
        case ElementKind::E2M3: return encode_any(FloatEncoder<E2M3>{}, w, group, scales, nullptr, codes);
        case ElementKind::E3M2: return encode_any(FloatEncoder<E3M2>{}, w, group, scales, nullptr, codes);
        case ElementKind::E4M3FN: return encode_any(FloatEncoder<E4M3FN>{}, w, group, scales, nullptr, codes);
        case ElementKind::E5M2: return encode_any(FloatEncoder<E5M2>{}, w, group, scales, nullptr, codes);
    }
}

void encode_affine(const Weights& w, int bits, int64_t group, const float* scales, const float* offsets,
                   EncodingRule rule, uint8_t* codes) {
    if (rule == EncodingRule::RoundAdd) {
        return encode_any(AffineEncoder<EncodingRule::RoundAdd>(bits), w, group, scales, offsets, codes);
    }
    if (rule == EncodingRule::AddRound) {
        return encode_any(AffineEncoder<EncodingRule::AddRound>(bits), w, group, scales, offsets, codes);
    }
    encode_any(AffineEncoder<EncodingRule::Subtract>(bits), w, group, scales, offsets, codes);
}
