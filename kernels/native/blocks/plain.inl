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

// Numbers as integers in their order, -0 below +0; and back.
inline Ints ordered(Ints bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

inline float unordered(int32_t key) { return float_of_bits(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff))); }

inline Ints load_ints(const void* from) {
    Ints x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The smallest and the largest number of each 32 columns of a tile, NaN beyond infinity.
struct alignas(64) BlockEnds {
    int32_t low[kTileBlocks], high[kTileBlocks];  // ordered
};

// A block's extremes of each lane first; those of kStrip blocks are then turned, and share the rest.
inline void find_ends(const float* x, BlockEnds& ends) {
    alignas(64) uint32_t lows[kSquare], highs[kSquare], scratch[kSquare];
    for (int first = 0; first < kTileBlocks; first += kStrip) {
        for (int b = 0; b < kStrip; b++) {
            const float* from = x + (first + b) * 32;
            Ints low = ordered(load_ints(from)), high = low;
            for (int j = kStrip; j < 32; j += kStrip) {
                const Ints key = ordered(load_ints(from + j));
                low = smaller_int(low, key);
                high = larger_int(high, key);
            }
            std::memcpy(lows + b * kStrip, &low, sizeof low);
            std::memcpy(highs + b * kStrip, &high, sizeof high);
        }
        const uint32_t* turned = turn_square(lows, scratch);
        Ints low = load_ints(turned);
        for (int i = 1; i < kStrip; i++) low = smaller_int(low, load_ints(turned + i * kStrip));
        turned = turn_square(highs, scratch);
        Ints high = load_ints(turned);
        for (int i = 1; i < kStrip; i++) high = larger_int(high, load_ints(turned + i * kStrip));
        std::memcpy(ends.low + first, &low, sizeof low);
        std::memcpy(ends.high + first, &high, sizeof high);
    }
}

// What every column of a block is made a code with, and what is stored.
struct alignas(64) PlainScales {
    float inverse[kTileBlocks], shift[kTileBlocks], origin[kTileBlocks];
    uint16_t scale[kTileBlocks], bias[kTileBlocks];
};

// Scale, perhaps bias, perhaps fifth bits, nibbles. Codes are trunc((x - origin) * inverse + shift), at most kTop.
template <int kTop, bool kBias>
inline void put_plain(const float* SHARDQ_RESTRICT x, const PlainScales& s, int b, uint8_t* SHARDQ_RESTRICT out) {
    const float inverse = s.inverse[b], shift = s.shift[b], origin = kBias ? s.origin[b] : 0.0f;
    int32_t codes[32];
    for (int i = 0; i < 32; i++) {
        const float from = kBias ? x[i] - origin : x[i];
        const auto level = static_cast<int32_t>(from * inverse + shift);
        codes[i] = level < kTop ? level : kTop;
    }
    put_half(out, s.scale[b]);
    if (kBias) put_half(out + 2, s.bias[b]);
    uint8_t* rest = out + (kBias ? 4 : 2);
    if (kTop == 31) {
        uint32_t fifths = 0;
        for (uint32_t i = 0; i < 32; i++) fifths |= (static_cast<uint32_t>(codes[i]) >> 4) << i;
        std::memcpy(rest, &fifths, sizeof fifths);
        rest += 4;
    }
    for (int i = 0; i < 16; i++) rest[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[i + 16] & 15) << 4);
}

// A format says how it gets scales from the ends of all blocks of a tile, and how it puts a block.
template <int kTop>
struct SignedPlain {
    static constexpr float kHalf = static_cast<float>((kTop + 1) / 2);

    static void scale(const float* x, const BlockEnds& ends, PlainScales& s) {
        alignas(64) float leader[kTileBlocks];
        for (int b = 0; b < kTileBlocks; b++) {
            const float low = unordered(ends.low[b]), high = unordered(ends.high[b]);
            leader[b] = -low > high ? low : high;
            leader[b] = high == 0.0f && low == 0.0f ? 0.0f : leader[b];
        }
        for (int b = 0; b < kTileBlocks; b++) {  // a tie between signs: the first
            if (ends.low[b] != ~ends.high[b] || leader[b] == 0.0f) continue;
            leader[b] = leader_of(x + b * 32, 32);
        }
        for (int b = 0; b < kTileBlocks; b++) {
            const float d = leader[b] / -kHalf;
            const PlainInverse by = plain_inverse(d, kHalf + 0.5f);
            s.inverse[b] = by.inverse;
            s.shift[b] = by.shift;
            s.scale[b] = half_of_float(d);
            s.bias[b] = 0;
        }
    }

    static void put(const float* x, const PlainScales& s, int b, uint8_t* out) { put_plain<kTop, false>(x, s, b, out); }
};

// The sign of the first zero is that of a smallest zero.
inline float first_zero(const float* x) {
    int i = 0;
    while (x[i] != 0.0f) i++;
    return x[i];
}

template <int kTop>
struct AffinePlain {
    static void scale(const float* x, const BlockEnds& ends, PlainScales& s) {
        for (int b = 0; b < kTileBlocks; b++) {
            s.origin[b] = unordered(ends.low[b]);
            if (s.origin[b] == 0.0f) s.origin[b] = first_zero(x + b * 32);
        }
        for (int b = 0; b < kTileBlocks; b++) {
            const float d = (unordered(ends.high[b]) - s.origin[b]) / static_cast<float>(kTop);
            const PlainInverse by = plain_inverse(d, 0.5f);
            s.inverse[b] = by.inverse;
            s.shift[b] = by.shift;
            s.scale[b] = half_of_float(d);
            s.bias[b] = half_of_float(s.origin[b]);
        }
    }

    static void put(const float* x, const PlainScales& s, int b, uint8_t* out) { put_plain<kTop, true>(x, s, b, out); }
};

// Half away from zero, for |x| below 2^22: the largest float below a half never carries what is less than a half.
inline int round_away(float x) {
    constexpr uint32_t kAlmostHalf = 0x3effffffu;
    return static_cast<int>(x + float_of_bits(kAlmostHalf | (bits_of_float(x) & 0x80000000u)));
}

struct Bytes8 {
    static void scale(const float*, const BlockEnds& ends, PlainScales& s) {
        for (int b = 0; b < kTileBlocks; b++) {
            const float low = -unordered(ends.low[b]), high = unordered(ends.high[b]);
            const float d = (low > high ? low : high) / 127.0f;
            s.inverse[b] = plain_inverse(d, 0.0f).inverse;
            s.scale[b] = half_of_float(d) & 0x7fffu;
            s.bias[b] = 0;
        }
    }

    static void put(const float* SHARDQ_RESTRICT x, const PlainScales& s, int b, uint8_t* SHARDQ_RESTRICT out) {
        const float inverse = s.inverse[b];
        put_half(out, s.scale[b]);
        for (int i = 0; i < 32; i++) out[2 + i] = static_cast<uint8_t>(round_away(x[i] * inverse));
    }
};
