// The super-blocks of 256 columns whose scales are codes themselves: Q2_K to Q6_K of ggml 0.25.3, with and without
// importance. Part of bodies.inl; contract_blocks.py has the formulas and the bytes.
//
// A format says: its columns, those of a sub-block, how a tile is searched, and how block `b` of the tile is put.

inline float largest_of(const float* x, int count) {
    float most = 0.0f;
    for (int i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline float leader_of_scales(const float* x, int count) {
    float leader = 0.0f, most = 0.0f;
    for (int i = 0; i < count; i++) {
        const float size = float_of_bits(static_cast<uint32_t>(magnitude_bits(x[i])));
        leader = size > most ? x[i] : leader;
        most = size > most ? size : most;
    }
    return leader;
}

// Importance times sqrt(of the super-block's `factor` * mean of squares + x^2), and what a sub-block weighs.
inline void weigh_super_blocks(int sub_cols, float factor, Tile& t) {
    for (int at = 0; at < kTileSubs * sub_cols; at += 256) {
        const float mean = factor * sum_of_squares(t.x + at, 256) / 256.0f;
        weigh_block(t.x + at, t.importance + at, mean, 256, t.weights + at);
    }
    turn_subs(t.weights, sub_cols, t.turned_weights);
}

inline void sum_weights(const float* weights, int sub_cols, int subs, float* sums) {
    for (int s = 0; s < subs; s++) {
        sums[s] = 0.0f;
        for (int i = 0; i < sub_cols; i++) sums[s] += weights[s * sub_cols + i];
    }
}

// w = root of the mean of squares + |x|
template <int kCols>
inline void weigh_by_root(Tile& t) {
    for (int at = 0; at < kTileSubs; at += kStrip) {
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
    using Found = LineFound;

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            weigh_super_blocks(kSub, 1.0f, t);
            return search_lines<kSub, 3, false>(t, kImportantSteps, found);
        }
        for (int i = 0; i < kTileSubs * kSub; i++) {
            t.turned_weights[i] = float_of_bits(static_cast<uint32_t>(magnitude_bits(t.turned[i])));
        }
        search_lines<kSub, 3, true>(t, {-0.5f, 0.1f, 16}, found);
    }

    static bool put(const Tile& t, bool important, const Found& found, int, uint8_t* out) {
        float sums[16];
        sum_weights(t.weights, kSub, important ? 16 : 0, sums);
        const LineScales s = line_scales(found, 0, 16, 15, important ? sums : nullptr);
        const float d = float_of_half(s.d), m = float_of_half(s.m);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            out[j] = static_cast<uint8_t>(s.scales[j] | (s.minima[j] << 4));
            const float scale = d * static_cast<float>(out[j] & 15), least = m * static_cast<float>(out[j] >> 4);
            uint8_t* sub = codes + j * kSub;
            if (scale != 0.0f) {
                put_line_codes(t.x + j * kSub, kSub, scale, least, 3.0f, sub);
            } else {
                put_found_codes(t.x + j * kSub, kSub, 3.0f, found, j, sub);
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
                put_line_codes(x, kSub, scale, least, static_cast<float>(kTop), codes + j * kSub);
            } else {
                put_found_codes(x, kSub, static_cast<float>(kTop), found, first + j, codes + j * kSub);
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

struct Q3K {
    static constexpr int kCols = 256, kSub = 16;
    struct Found {
        RayFound ray;       // of importance
        float scale[16];    // of the descent, with its codes
        uint8_t codes[256];
    };

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            weigh_super_blocks(kSub, 2.0f, t);
            return search_rays<kSub, 4>(t, found.ray);
        }
        for (int at = 0; at < kTileSubs; at += kStrip) {
            descend_ray<kSub, 4>(t.turned + at * kSub, at, found.scale, found.codes);
        }
    }

    // Sixteen scales of six bits, plus 32.
    static void put_scales(const int* scales, uint8_t* out) {
        std::memset(out, 0, 12);
        for (int j = 0; j < 16; j++) {
            out[j % 8] = static_cast<uint8_t>(out[j % 8] | ((scales[j] & 15) << (j < 8 ? 0 : 4)));
            out[8 + j % 4] = static_cast<uint8_t>(out[8 + j % 4] | ((scales[j] >> 4) << (2 * (j / 4))));
        }
    }

    static uint16_t find_scales(const Tile& t, bool important, const Found& found, int* scales) {
        if (important) {
            float sums[16];
            sum_weights(t.weights, kSub, 16, sums);
            return half_of_float(scale_of_signed(found.ray.scale, sums, 16, 32, scales));
        }
        const float leader = leader_of_scales(found.scale, 16);
        const float inverse = -32.0f / leader;
        for (int j = 0; j < 16; j++) {
            const auto code = static_cast<int8_t>(static_cast<uint8_t>(nearest_int(inverse * found.scale[j])));
            scales[j] = leader != 0.0f ? clamp_int(code, -32, 31) + 32 : 0;
        }
        return half_of_float(leader != 0.0f ? 1.0f / inverse : 0.0f);
    }

    static bool put(const Tile& t, bool important, const Found& found, int, uint8_t* out) {
        int scales[16];
        const uint16_t half = find_scales(t, important, found, scales);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            const float d = float_of_half(half) * static_cast<float>(scales[j] - 32);
            uint8_t* sub = codes + j * kSub;
            if (d != 0.0f) {
                put_ray_codes(t.x + j * kSub, kSub, d, 4.0f, sub);
            } else if (important) {
                put_found_codes(t.x + j * kSub, kSub, 4.0f, found.ray, j, sub);
            } else {
                std::memcpy(sub, found.codes + j * kSub, kSub);
            }
        }
        for (int l = 0; l < 32; l++) {
            int bits = 0;
            for (int k = 0; k < 8; k++) bits |= (codes[k * 32 + l] >> 2) << k;
            out[l] = static_cast<uint8_t>(bits);
        }
        for (uint8_t& code : codes) code &= 3;
        put_pairs_of_bits(codes, out + 32);
        put_scales(scales, out + 96);
        put_half(out + 108, half);
        return is_finite_half(half);
    }
};

struct Q6K {
    static constexpr int kCols = 256, kSub = 16;
    using Found = RayFound;

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            turn_subs(t.importance, kSub, t.turned_weights);
        } else {
            weigh_by_squares(kSub, t);
        }
        search_rays<kSub, 32>(t, found);
    }

    static bool put(const Tile& t, bool, const Found& found, int, uint8_t* out) {
        const float leader = leader_of_scales(found.scale, 16);
        if (float_of_bits(static_cast<uint32_t>(magnitude_bits(leader))) < kTiny) {
            std::memset(out, 0, 210);
            return true;
        }
        const float inverse = -128.0f / leader;
        const uint16_t half = half_of_float(1.0f / inverse);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            const int code = nearest_int(inverse * found.scale[j]);
            const auto scale = static_cast<int8_t>(static_cast<uint8_t>(code < 127 ? code : 127));
            out[192 + j] = static_cast<uint8_t>(scale);
            const float d = float_of_half(half) * static_cast<float>(scale);
            if (d != 0.0f) {
                put_ray_codes(t.x + j * kSub, kSub, d, 32.0f, codes + j * kSub);
            } else {
                put_found_codes(t.x + j * kSub, kSub, 32.0f, found, j, codes + j * kSub);
            }
        }
        for (int h = 0; h < 2; h++) {
            const uint8_t* from = codes + h * 128;
            for (int l = 0; l < 64; l++) {
                out[h * 64 + l] = static_cast<uint8_t>((from[l] & 15) | ((from[l + 64] & 15) << 4));
            }
            for (int l = 0; l < 32; l++) {
                out[128 + h * 32 + l] =
                    static_cast<uint8_t>((from[l] >> 4) | ((from[l + 32] >> 4) << 2) | ((from[l + 64] >> 4) << 4) |
                                         ((from[l + 96] >> 4) << 6));
            }
        }
        put_half(out + 208, half);
        return is_finite_half(half);
    }
};
