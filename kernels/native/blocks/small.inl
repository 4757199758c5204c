// Ternary blocks and MXFP4 (quantize_row_tq1_0_ref, quantize_row_tq2_0_ref and quantize_row_mxfp4_ref of ggml 0.25.3).
// Part of bodies.inl. put() as in plain.inl.

// -1, 0 and 1 as 0, 1 and 2; the largest magnitude, stored, is the scale.
inline bool put_trits(const float* x, uint8_t* trits, uint8_t* scale) {
    const float d = largest_magnitude(x, 256);
    const float inverse = plain_inverse(d, 0.0f).inverse;
    for (int i = 0; i < 256; i++) trits[i] = static_cast<uint8_t>(round_away(x[i] * inverse) + 1);
    const uint16_t half = half_of_float(d);
    put_half(scale, half);
    return is_finite_half(half);
}

// Five trits of a byte, the first the most significant, as a fraction of 243 in 256ths, rounded up.
inline uint8_t pack_trits(int a, int b, int c, int d, int e) {
    const int number = (((a * 3 + b) * 3 + c) * 3 + d) * 3 + e;
    return static_cast<uint8_t>((number * 256 + 242) / 243);
}

struct Ternary5 {
    static bool put(const float* x, uint8_t* out) {
        uint8_t t[256];
        const bool fits = put_trits(x, t, out + 52);
        for (int i = 0; i < 32; i++) out[i] = pack_trits(t[i], t[i + 32], t[i + 64], t[i + 96], t[i + 128]);
        for (int i = 0; i < 16; i++) {
            const uint8_t* from = t + 160 + i;
            out[32 + i] = pack_trits(from[0], from[16], from[32], from[48], from[64]);
        }
        for (int i = 0; i < 4; i++) {
            const uint8_t* from = t + 240 + i;
            out[48 + i] = pack_trits(from[0], from[4], from[8], from[12], 0);
        }
        return fits;
    }
};

// Two bits each of columns l, l + 32, l + 64 and l + 96 of a half.
inline void put_pairs_of_bits(const uint8_t* SHARDQ_RESTRICT codes, uint8_t* SHARDQ_RESTRICT out) {
    for (int half = 0; half < 2; half++) {
        for (int l = 0; l < 32; l++) {
            const uint8_t* from = codes + half * 128 + l;
            out[half * 32 + l] = static_cast<uint8_t>(from[0] | (from[32] << 2) | (from[64] << 4) | (from[96] << 6));
        }
    }
}

struct Ternary4 {
    static bool put(const float* x, uint8_t* out) {
        uint8_t t[256];
        const bool fits = put_trits(x, t, out + 64);
        put_pairs_of_bits(t, out);
        return fits;
    }
};

// floor(log2f(x)) of x > 0: what is so near below a power of two that its logarithm rounds up, counts as that power.
inline int exponent_of(float x) {
    int shift = 0;
    if (x < 1.17549435e-38f) {
        x *= 16777216.0f;
        shift = 24;
    }
    const uint32_t bits = bits_of_float(x);
    const int next = static_cast<int>(bits >> 23) - 126;
    const auto missing = static_cast<double>(0x800000u - (bits & 0x7fffffu));  // of the power, in units of 2^-24 of it
    const double power = static_cast<double>(next - shift);
    const auto logarithm = static_cast<float>(power - missing * 8.5991327e-8);  // log2(e) * 2^-24
    return logarithm == static_cast<float>(power) ? next - shift : next - shift - 1;
}

// Powers of two with e2m1 elements, the scale half of what it says, so that elements are whole.
struct Mxfp4 {
    static float half_scale(uint8_t exponent) {
        return float_of_bits(exponent < 2 ? 0x00200000u << exponent : static_cast<uint32_t>(exponent - 1) << 23);
    }
    static bool put(const float* x, uint8_t* out) {
        const float most = largest_magnitude(x, 32);
        const auto exponent = static_cast<uint8_t>(most > 0.0f ? exponent_of(most) - 2 + 127 : 0);
        const float d = half_scale(exponent);
        // 8 times the largest scale is infinite, and so never the nearest.
        const float upper = exponent < 253 ? 7.0f * d : 3.4028234663852886e38f;
        uint8_t codes[32];
        for (int i = 0; i < 32; i++) {
            const float size = float_of_bits(static_cast<uint32_t>(magnitude_bits(x[i])));
            int code = (size > 0.5f * d) + (size > 1.5f * d) + (size > 2.5f * d) + (size > 3.5f * d) +
                       (size > 5.0f * d) + (size > upper) + (size > 10.0f * d);
            code |= code > 0 && x[i] < 0.0f ? 8 : 0;
            codes[i] = static_cast<uint8_t>(code);
        }
        out[0] = exponent;
        put_nibbles(codes, out + 1);
        return true;
    }
};
