// Q2_K, Q4_K and Q5_K of ggml 0.25.3, with and without importance. Part of bodies.inl; contract_blocks.py has the
// formulas and the bytes.

inline float largest_of(const float* x, int count) {
    float most = 0.0f;
    for (int i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// w = root of the mean of squares + |x|
template <int kCols>
inline void weigh_by_root(Tile& t) {
    for (int at = 0; at < t.active; at += kStrip) {
        const float* x = t.turned + at * kCols;
        Reals sum = {};
        for (int i = 0; i < kCols; i++) sum += load_lanes(x + i * kStrip) * load_lanes(x + i * kStrip);
        const Reals root = root_lanes(sum / static_cast<float>(kCols));
        float* weights = t.turned_weights + at * kCols;
        for (int i = 0; i < kCols; i++) {
            store_lanes(weights + i * kStrip, root + magnitude_lanes(load_lanes(x + i * kStrip)));
        }
    }
}

constexpr LineSteps kImportantSteps = {-0.9f, 0.05f, 37};

// Scales and minima of a super-block: their codes, and the fp16 numbers that these count in.
struct LineScales {
    int scales[16], minima[16];
    uint16_t d, m;
};

// As ggml does it without importance: by the largest. `top` is 15 or 63.
inline void round_scales(const float* x, int count, int top, int* codes, uint16_t* unit) {
    const float most = largest_of(x, count), highest = static_cast<float>(top);
    const float inverse = most > 0.0f ? highest / most : 0.0f;
    for (int i = 0; i < count; i++) {
        const int code = static_cast<uint8_t>(nearest_int(inverse * x[i]));
        codes[i] = top == 63 && code > top ? top : code;
    }
    *unit = half_of_float(most > 0.0f ? most / highest : 0.0f);
}

inline LineScales line_scales(const LineFound& found, int at, int count, int top, const float* weights) {
    LineScales s;
    if (weights == nullptr) {
        round_scales(found.scale + at, count, top, s.scales, &s.d);
        round_scales(found.least + at, count, top, s.minima, &s.m);
    } else {
        s.d = half_of_float(scale_of_positive(found.scale + at, weights, count, top, s.scales));
        s.m = half_of_float(scale_of_positive(found.least + at, weights, count, top, s.minima));
    }
    return s;
}

struct Q2K {
    static constexpr int kCols = 256, kSub = 16;
    static constexpr float kLeast = kAnything;
    static constexpr bool kBlank = true;
    using Found = LineFound;

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            weigh_super_blocks(kSub, 1.0f, t);
            return search_lines<kSub, 3, false>(t, kImportantSteps, found);
        }
        for (int i = 0; i < kTileCols; i++) {
            t.turned_weights[i] = float_of_bits(static_cast<uint32_t>(magnitude_bits(t.turned[i])));
        }
        search_lines<kSub, 3, true>(t, {-0.5f, 0.1f, 16}, found);
    }

    static bool put(const Tile& t, bool important, const Found& found, int block, uint8_t* out) {
        const int first = block * 16;
        float sums[16];
        sum_weights(t.weights + block * 256, kSub, important ? 16 : 0, sums);
        const LineScales s = line_scales(found, first, 16, 15, important ? sums : nullptr);
        const float d = float_of_half(s.d), m = float_of_half(s.m);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            out[j] = static_cast<uint8_t>(s.scales[j] | (s.minima[j] << 4));
            const float scale = d * static_cast<float>(out[j] & 15), least = m * static_cast<float>(out[j] >> 4);
            const float* x = t.x + (first + j) * kSub;
            if (scale != 0.0f) {
                put_line_codes(x, kSub, scale, least, 3, codes + j * kSub);
            } else {
                put_found_codes(x, kSub, 3, found, first + j, codes + j * kSub);
            }
        }
        put_pairs_of_bits(codes, out + 16);
        put_half(out + 80, s.d);
        put_half(out + 82, s.m);
        return is_finite_half(s.d) && is_finite_half(s.m);
    }
};

// Twelve bytes of eight scales and eight minima, six bits each.
inline void put_sixes(const LineScales& s, uint8_t* out) {
    for (int j = 0; j < 4; j++) {
        out[j] = static_cast<uint8_t>(s.scales[j] | ((s.scales[j + 4] >> 4) << 6));
        out[j + 4] = static_cast<uint8_t>(s.minima[j] | ((s.minima[j + 4] >> 4) << 6));
        out[j + 8] = static_cast<uint8_t>((s.scales[j + 4] & 15) | ((s.minima[j + 4] & 15) << 4));
    }
}

struct Six {
    int scale, least;
};

inline Six get_six(const uint8_t* from, int j) {
    if (j < 4) return {from[j] & 63, from[j + 4] & 63};
    return {(from[j + 4] & 15) | ((from[j - 4] >> 6) << 4), (from[j + 4] >> 4) | ((from[j] >> 6) << 4)};
}

template <int kTop>
struct LineK {
    static constexpr int kCols = 256, kSub = 32;
    static constexpr float kLeast = kAnything;
    static constexpr bool kBlank = true;
    using Found = LineFound;

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            weigh_super_blocks(kSub, 2.0f, t);
            return search_lines<kSub, kTop, false>(t, kImportantSteps, found);
        }
        weigh_by_root<kSub>(t);
        search_lines<kSub, kTop, false>(t, kTop == 15 ? LineSteps{-1.0f, 0.1f, 21} : LineSteps{-0.5f, 0.1f, 16}, found);
    }

    static bool put(const Tile& t, bool important, const Found& found, int block, uint8_t* out) {
        const int first = block * 8;
        float sums[8];
        sum_weights(t.weights + block * 256, kSub, important ? 8 : 0, sums);
        const LineScales s = line_scales(found, first, 8, 63, important ? sums : nullptr);
        const float d = float_of_half(s.d), m = float_of_half(s.m);
        put_half(out, s.d);
        put_half(out + 2, s.m);
        put_sixes(s, out + 4);
        uint8_t codes[256];
        for (int j = 0; j < 8; j++) {
            const Six six = get_six(out + 4, j);
            const float scale = d * static_cast<float>(six.scale), least = m * static_cast<float>(six.least);
            const float* x = t.x + (first + j) * kSub;
            if (scale != 0.0f) {
                put_line_codes(x, kSub, scale, least, kTop, codes + j * kSub);
            } else {
                put_found_codes(x, kSub, kTop, found, first + j, codes + j * kSub);
            }
        }
        uint8_t* rest = out + 16;
        if (kTop == 31) {
            put_fifth_planes(codes, rest);
            rest += 32;
        }
        for (int p = 0; p < 4; p++) {
            for (int l = 0; l < 32; l++) {
                const uint8_t* from = codes + p * 64 + l;
                rest[p * 32 + l] = static_cast<uint8_t>((from[0] & 15) | ((from[32] & 15) << 4));
            }
        }
        return is_finite_half(s.d) && is_finite_half(s.m);
    }

    // Bit j of byte l is bit 4 of column 32 j + l.
    static void put_fifth_planes(const uint8_t* SHARDQ_RESTRICT codes, uint8_t* SHARDQ_RESTRICT out) {
        for (int l = 0; l < 32; l++) {
            int bits = 0;
            for (int j = 0; j < 8; j++) bits |= (codes[j * 32 + l] >> 4) << j;
            out[l] = static_cast<uint8_t>(bits);
        }
    }
};
