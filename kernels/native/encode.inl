// Codes of weights whose scales are given. Part of bodies.inl; contract.py has the formulas.
//
// Quotients. Where every scale of a piece is a power of two whose inverse is a normal number, w * (1/s) is the number
// that w / s is, and is rounded alike; elsewhere it is divided. The factor of a scale 0 is NaN, so that every quotient
// is NaN, which becomes 0.
//
// Floats. For a in the binade of 2^E, or below the smallest normal number, whose E is then taken, elements are
// step = 2^(E - m) apart, m mantissa bits. a + 2^23 * step is rounded to whole steps, half to even, and its low bits
// are their number n, 2^(m + 1) at most; the code is ((E - smallest E) << m) + n, and a carry moves up by itself. Codes
// are even where n is.

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

template <bool kPowers>
inline float quotient(float w, float factor) {
    const float v = kPowers ? w * factor : w / factor;
    return v == v ? v : 0.0f;
}

// Encoders leave the code in the low 16 bits of what they return, the upper 8 of them 0.

// Adding kRound plus an even number rounds to nearest, half to even.
struct IntEncoder {
    static constexpr bool kHasOffsets = false;
    float lowest, highest, base;

    explicit IntEncoder(const Element& e) {
        const float half = static_cast<float>(1 << (e.bits - 1));
        lowest = -half;
        highest = half - 1.0f;
        base = kRound + half;
    }

    template <bool kPowers>
    uint32_t code(float w, float factor, float) const {
        float v = quotient<kPowers>(w, factor);
        v = v > lowest ? v : lowest;
        v = v < highest ? v : highest;
        return bits_of_float(v + base);
    }
};

struct FloatEncoder {
    static constexpr bool kHasOffsets = false;
    float largest;
    int32_t least_exponent;  // as the exponent of an fp32 number
    uint32_t to_step;        // from that of E to 2^23 * step; its low bits take off least_exponent once shifted
    int shift, sign_shift;
    uint32_t sign;
    float zero;  // added to a quotient: +0 takes the sign of -0 away, -0 changes nothing

    explicit FloatEncoder(const Element& e)
        : largest(e.largest),
          least_exponent((128 - e.bias) << 23),
          to_step((static_cast<uint32_t>(23 - e.mantissa_bits) << 23) +
                  (0x10000u - (static_cast<uint32_t>(128 - e.bias) << e.mantissa_bits))),
          shift(23 - e.mantissa_bits),
          sign_shift(32 - e.bits),
          sign(1u << (e.bits - 1)),
          zero(e.bits == 6 ? -0.0f : 0.0f) {}

    template <bool kPowers>
    uint32_t code(float w, float factor, float) const {
        const uint32_t bits = bits_of_float(quotient<kPowers>(w, factor) + zero);
        float magnitude = float_of_bits(bits & 0x7fffffffu);
        magnitude = magnitude < largest ? magnitude : largest;
        int32_t exponent = static_cast<int32_t>(bits_of_float(magnitude) & 0x7f800000u);
        exponent = exponent > least_exponent ? exponent : least_exponent;
        const uint32_t binade = static_cast<uint32_t>(exponent);
        const uint32_t steps = bits_of_float(magnitude + float_of_bits(binade + to_step));
        return ((steps + (binade >> shift)) & 0xffffu) | ((bits >> sign_shift) & sign);
    }
};

template <EncodingRule kRule>
struct AffineEncoder {
    static constexpr bool kHasOffsets = true;
    static constexpr float kMostLevels = 1048576.0f;
    float top;

    explicit AffineEncoder(int bits) : top(static_cast<float>((1 << bits) - 1)) {}

    template <bool kPowers>
    uint32_t code(float w, float factor, float offset) const {
        float sum;
        if constexpr (kRule == EncodingRule::RoundAdd) {
            float level = quotient<kPowers>(w, factor);
            level = level > -kMostLevels ? level : -kMostLevels;
            level = level < kMostLevels ? level : kMostLevels;
            sum = ((level + kRound) - kRound) + offset;
        } else if constexpr (kRule == EncodingRule::AddRound) {
            sum = quotient<kPowers>(w, factor) + offset;
        } else {
            sum = quotient<kPowers>(w - offset, factor);
        }
        sum = sum > 0.0f ? sum : 0.0f;  // NaN becomes 0
        sum = sum < top ? sum : top;
        return bits_of_float(sum + kRound);
    }
};

// A piece of a row; factors and offsets are spread.
template <class T, bool kPowers, class Encoder>
inline void encode_piece(const Encoder& encoder, const typename T::Raw* SHARDQ_RESTRICT src, int64_t width,
                         int64_t group, const Spread& factors, const Spread& offsets, uint8_t* SHARDQ_RESTRICT codes) {
    const float* even_factors = factors.even;
    const float* odd_factors = factors.of_odd(group);
    const float* even_offsets = offsets.even;
    const float* odd_offsets = offsets.of_odd(group);
    const Encoder e = encoder;
    const int64_t pairs = width / 2;
    for (int64_t i = 0; i < pairs; i++) {
        const Pair<T> w = Pair<T>::load(src + 2 * i);
        const float even_offset = Encoder::kHasOffsets ? even_offsets[i] : 0.0f;
        const float odd_offset = Encoder::kHasOffsets ? odd_offsets[i] : 0.0f;
        const uint32_t even = e.template code<kPowers>(w.even, even_factors[i], even_offset);
        const uint32_t odd = e.template code<kPowers>(w.odd, odd_factors[i], odd_offset);
        const uint16_t both = static_cast<uint16_t>(even + (odd << 8));
        std::memcpy(codes + 2 * i, &both, sizeof both);
    }
    if (width % 2 == 0) return;
    const float last_offset = Encoder::kHasOffsets ? even_offsets[pairs] : 0.0f;
    codes[width - 1] = static_cast<uint8_t>(
        e.template code<kPowers>(widen_value<T>(src[width - 1]), even_factors[pairs], last_offset));
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
            if (powers) {
                encode_piece<T, true>(encoder, src + at, width, group, factors, places, codes + at);
            } else {
                encode_piece<T, false>(encoder, src + at, width, group, factors, places, codes + at);
            }
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
    if (element.mantissa_bits == 0) return encode_any(IntEncoder(element), w, group, scales, nullptr, codes);
    encode_any(FloatEncoder(element), w, group, scales, nullptr, codes);
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
