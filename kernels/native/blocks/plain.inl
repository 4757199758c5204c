// The formats with one scale per 32 columns, without importance (quantize_row_q*_ref of ggml 0.25.3). Part of
// bodies.inl. A block that put() says false of has a scale beyond fp16.

// 1 / d as ggml uses it, and what it adds before it cuts off the fraction. Where d is so small that 1 / d is infinite,
// ggml converts infinities to integers, of which x86 makes 0.
struct PlainInverse {
    float inverse, shift;
};

inline PlainInverse plain_inverse(float d, float shift) {
    const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
    const bool finite = magnitude_bits(inverse) < 0x7f800000;
    return {finite ? inverse : 0.0f, finite ? shift : 0.0f};
}

// Low halves of bytes: columns 0 to 15, high ones: 16 to 31.
inline void put_nibbles(const uint8_t* SHARDQ_RESTRICT codes, uint8_t* SHARDQ_RESTRICT out) {
    for (int i = 0; i < 16; i++) out[i] = static_cast<uint8_t>((codes[i] & 15) | ((codes[i + 16] & 15) << 4));
}

// Bit 4 of each of 32 codes.
inline void put_fifth_bits(const uint8_t* codes, uint8_t* out) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= static_cast<uint32_t>((codes[i] >> 4) & 1) << i;
    std::memcpy(out, &bits, sizeof bits);
}

// Scale, perhaps bias, perhaps fifth bits, nibbles.
template <int kTop, bool kBias>
inline bool put_plain_block(float d, float bias, const uint8_t* codes, uint8_t* out) {
    const uint16_t scale = half_of_float(d), offset = half_of_float(bias);
    put_half(out, scale);
    if (kBias) put_half(out + 2, offset);
    uint8_t* rest = out + (kBias ? 4 : 2);
    if (kTop == 31) put_fifth_bits(codes, rest);
    put_nibbles(codes, rest + (kTop == 31 ? 4 : 0));
    return is_finite_half(scale) && is_finite_half(offset);
}

template <int kTop>
struct SignedPlain {
    static bool put(const float* x, uint8_t* out) {
        constexpr auto kHalf = static_cast<float>((kTop + 1) / 2);
        const float d = leader_of(x, 32) / -kHalf;
        const PlainInverse by = plain_inverse(d, kHalf + 0.5f);
        uint8_t codes[32];
        for (int i = 0; i < 32; i++) {
            const auto level = static_cast<int>(x[i] * by.inverse + by.shift);
            codes[i] = static_cast<uint8_t>(level < kTop ? level : kTop);
        }
        return put_plain_block<kTop, false>(d, 0.0f, codes, out);
    }
};

// The sign of the first zero is that of a smallest or largest zero.
inline float first_zero(const float* x) {
    int i = 0;
    while (x[i] != 0.0f) i++;
    return x[i];
}

template <int kTop>
struct AffinePlain {
    static bool put(const float* x, uint8_t* out) {
        // Integers in the order of the floats, -0 below +0.
        int32_t low = 0x7fffffff, high = -0x7fffffff - 1;
        for (int i = 0; i < 32; i++) {
            const auto bits = static_cast<int32_t>(bits_of_float(x[i]));
            const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
        float least = float_of_bits(static_cast<uint32_t>(low ^ ((low >> 31) & 0x7fffffff)));
        const float most = float_of_bits(static_cast<uint32_t>(high ^ ((high >> 31) & 0x7fffffff)));
        if (least == 0.0f) least = first_zero(x);
        const float d = (most - least) / static_cast<float>(kTop);
        if (magnitude_bits(d) >= 0x7f800000) return false;
        const PlainInverse by = plain_inverse(d, 0.5f);
        uint8_t codes[32];
        for (int i = 0; i < 32; i++) {
            const auto level = static_cast<int>((x[i] - least) * by.inverse + by.shift);
            codes[i] = static_cast<uint8_t>(level < kTop ? level : kTop);
        }
        return put_plain_block<kTop, true>(d, least, codes, out);
    }
};

// Half away from zero, for |x| below 2^22: the largest float below a half never carries what is less than a half.
inline int round_away(float x) {
    constexpr uint32_t kAlmostHalf = 0x3effffffu;
    return static_cast<int>(x + float_of_bits(kAlmostHalf | (bits_of_float(x) & 0x80000000u)));
}

struct Bytes8 {
    static bool put(const float* x, uint8_t* out) {
        const float d = largest_magnitude(x, 32) / 127.0f;
        const float inverse = plain_inverse(d, 0.0f).inverse;
        const uint16_t scale = half_of_float(d);
        put_half(out, scale);
        for (int i = 0; i < 32; i++) out[2 + i] = static_cast<uint8_t>(round_away(x[i] * inverse));
        return is_finite_half(scale);
    }
};
