// Blocks to weights (dequantize_row_* of ggml 0.25.3). Part of bodies.inl. get() makes the columns of one block.

inline void get_nibbles(const uint8_t* SHARDQ_RESTRICT from, int* SHARDQ_RESTRICT codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = from[i] & 15;
        codes[i + 16] = from[i] >> 4;
    }
}

// Signed codes count from -half; affine ones from the bias.
template <int kTop, bool kBias>
inline void get_plain(const uint8_t* from, float* out) {
    constexpr int kHalf = kBias ? 0 : (kTop + 1) / 2;
    const float d = float_of_half(get_half(from)), m = kBias ? float_of_half(get_half(from + 2)) : 0.0f;
    const uint8_t* rest = from + (kBias ? 4 : 2);
    int codes[32];
    get_nibbles(rest + (kTop == 31 ? 4 : 0), codes);
    if (kTop == 31) {
        uint32_t fifth;
        std::memcpy(&fifth, rest, sizeof fifth);
        for (int i = 0; i < 32; i++) codes[i] |= static_cast<int>((fifth >> i) & 1u) << 4;
    }
    for (int i = 0; i < 32; i++) {
        const float product = static_cast<float>(codes[i] - kHalf) * d;
        out[i] = kBias ? product + m : product;
    }
}

inline void get_bytes8(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from));
    for (int i = 0; i < 32; i++) out[i] = static_cast<float>(static_cast<int8_t>(from[2 + i])) * d;
}

// Bit pairs of a 256-column block, as put_pairs_of_bits leaves them.
inline void get_pairs_of_bits(const uint8_t* SHARDQ_RESTRICT from, int* SHARDQ_RESTRICT codes) {
    for (int k = 0; k < 8; k++) {  // 32 columns with the same bits of 32 bytes
        for (int l = 0; l < 32; l++) codes[k * 32 + l] = (from[k / 4 * 32 + l] >> (k % 4 * 2)) & 3;
    }
}

inline void get_q2k(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from + 80)), m = float_of_half(get_half(from + 82));
    int codes[256];
    get_pairs_of_bits(from + 16, codes);
    for (int j = 0; j < 16; j++) {
        const float scale = d * static_cast<float>(from[j] & 15), least = m * static_cast<float>(from[j] >> 4);
        for (int i = j * 16; i < j * 16 + 16; i++) out[i] = scale * static_cast<float>(codes[i]) - least;
    }
}

inline void get_q3k(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from + 108));
    int codes[256];
    get_pairs_of_bits(from + 32, codes);
    for (int k = 0; k < 8; k++) {
        for (int l = 0; l < 32; l++) codes[k * 32 + l] += (((from[l] >> k) & 1) << 2) - 4;
    }
    for (int j = 0; j < 16; j++) {
        const int low = (from[96 + j % 8] >> (j < 8 ? 0 : 4)) & 15, high = (from[104 + j % 4] >> (2 * (j / 4))) & 3;
        const float scale = d * static_cast<float>((low | high << 4) - 32);
        for (int i = j * 16; i < j * 16 + 16; i++) out[i] = scale * static_cast<float>(codes[i]);
    }
}

template <int kTop>
inline void get_line_k(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from)), m = float_of_half(get_half(from + 2));
    const uint8_t* rest = from + (kTop == 31 ? 48 : 16);
    for (int j = 0; j < 8; j++) {
        const Six six = get_six(from + 4, j);
        const float scale = d * static_cast<float>(six.scale), least = m * static_cast<float>(six.least);
        for (int l = 0; l < 32; l++) {
            int code = (rest[j / 2 * 32 + l] >> (j % 2 * 4)) & 15;
            if (kTop == 31) code |= ((from[16 + l] >> j) & 1) << 4;
            out[j * 32 + l] = scale * static_cast<float>(code) - least;
        }
    }
}

inline void get_q6k(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from + 208));
    int codes[256];
    get_pairs_of_bits(from + 128, codes);
    for (int k = 0; k < 8; k++) {  // 32 columns whose low bits are halves of 32 bytes
        const uint8_t* low = from + k / 4 * 64 + k % 2 * 32;
        for (int l = 0; l < 32; l++) {
            codes[k * 32 + l] = (((low[l] >> (k % 4 / 2 * 4)) & 15) | codes[k * 32 + l] << 4) - 32;
        }
    }
    for (int j = 0; j < 16; j++) {
        const float scale = d * static_cast<float>(static_cast<int8_t>(from[192 + j]));
        for (int i = j * 16; i < j * 16 + 16; i++) out[i] = scale * static_cast<float>(codes[i]);
    }
}

// Values of nibbles, times d; of columns 0 to 15 the low ones.
#ifdef SHARDQ_NIBBLE_VALUES
inline void get_table(const uint8_t* from, const int8_t* values, float d, float* out) {
    scale_values(from, values, d, out);
}
#else
inline void get_table(const uint8_t* from, const int8_t* values, float d, float* out) {
    for (int i = 0; i < 16; i++) {
        out[i] = static_cast<float>(values[from[i] & 15]) * d;
        out[i + 16] = static_cast<float>(values[from[i] >> 4]) * d;
    }
}
#endif

inline void get_iq4nl(const uint8_t* from, float* out) {
    get_table(from + 2, kTableLevels, float_of_half(get_half(from)), out);
}

inline void get_iq4xs(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from));
    const uint16_t high = get_half(from + 2);
    for (int b = 0; b < 8; b++) {
        const int scale = ((from[4 + b / 2] >> (b % 2 * 4)) & 15) | ((high >> (2 * b)) & 3) << 4;
        get_table(from + 8 + b * 16, kTableLevels, d * static_cast<float>(scale - 32), out + b * 32);
    }
}

// `places` trits of each of some bytes, less 1: the first of all bytes, then the second, and so on.
inline void get_trits(const uint8_t* SHARDQ_RESTRICT from, int bytes, int places, float d, float* SHARDQ_RESTRICT out) {
    int power = 1;
    for (int place = 0; place < places; place++) {
        for (int l = 0; l < bytes; l++) {
            const int trit = (((from[l] * power) & 255) * 3) >> 8;
            out[place * bytes + l] = static_cast<float>(trit - 1) * d;
        }
        power *= 3;
    }
}

inline void get_ternary5(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from + 52));
    get_trits(from, 32, 5, d, out);
    get_trits(from + 32, 16, 5, d, out + 160);
    get_trits(from + 48, 4, 4, d, out + 240);
}

inline void get_ternary4(const uint8_t* from, float* out) {
    const float d = float_of_half(get_half(from + 64));
    int codes[256];
    get_pairs_of_bits(from, codes);
    for (int i = 0; i < 256; i++) out[i] = static_cast<float>(codes[i] - 1) * d;
}

inline void get_mxfp4(const uint8_t* from, float* out) {
    constexpr int8_t kValues[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    get_table(from + 1, kValues, Mxfp4::half_scale(from[0]), out);
}

template <class Get>
inline void get_all(const Blocks& blocks, const BlockFormat& format, float* out, const Get& get) {
    for (int64_t b = 0; b < blocks.count; b++) get(blocks.data + b * format.size_bytes, out + b * format.cols);
}

void dequantize_blocks(const Blocks& b, const BlockFormat& format, float* out) {
    switch (format.type) {
        case BlockType::Q4_0: return get_all(b, format, out, get_plain<15, false>);
        case BlockType::Q4_1: return get_all(b, format, out, get_plain<15, true>);
        case BlockType::Q5_0: return get_all(b, format, out, get_plain<31, false>);
        case BlockType::Q5_1: return get_all(b, format, out, get_plain<31, true>);
        case BlockType::Q8_0: return get_all(b, format, out, get_bytes8);
        case BlockType::Q2_K: return get_all(b, format, out, get_q2k);
        case BlockType::Q3_K: return get_all(b, format, out, get_q3k);
        case BlockType::Q4_K: return get_all(b, format, out, get_line_k<15>);
        case BlockType::Q5_K: return get_all(b, format, out, get_line_k<31>);
        case BlockType::Q6_K: return get_all(b, format, out, get_q6k);
        case BlockType::IQ4_NL: return get_all(b, format, out, get_iq4nl);
        case BlockType::IQ4_XS: return get_all(b, format, out, get_iq4xs);
        case BlockType::TQ1_0: return get_all(b, format, out, get_ternary5);
        case BlockType::TQ2_0: return get_all(b, format, out, get_ternary4);
        case BlockType::MXFP4: return get_all(b, format, out, get_mxfp4);
    }
}
