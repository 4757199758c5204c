// Q3_K and Q6_K of ggml 0.25.3, with and without importance. Part of bodies.inl; contract_blocks.py has the formulas
// and the bytes.

struct Q3K {
    static constexpr int kCols = 256, kSub = 16;
    static constexpr float kLeast = kTiny;
    static constexpr bool kBlank = true;
    struct Found {
        RayFound ray;  // of importance
        Descents descents;
        float scale[kTileSubs];  // of the descents
        int lane[kTileSubs];     // in them, or -1

        void take(const Found& from, int at, int to) {
            ray.take(from.ray, at, to);
            scale[to] = from.scale[at];
            lane[to] = from.lane[at];
        }
        void clear(int sub, float first) {
            ray.clear(sub, first);
            scale[sub] = 0.0f;
            lane[sub] = -1;
        }
        void put_codes(int sub, uint8_t* to) const {
            for (int i = 0; i < kSub; i++) {
                const int level = lane[sub] < 0 ? -4 : static_cast<int>(descents.levels[place_of<kSub>(lane[sub], i)]);
                to[i] = static_cast<uint8_t>(level + 4);
            }
        }
    };

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            weigh_super_blocks(kSub, 2.0f, t);
            return search_rays<kSub, 4>(t, found.ray);
        }
        for (int i = 0; i < kTileSubs; i++) found.lane[i] = i;
        descend_rays<kSub, 4>(t.turned, t.active, found.descents, found.scale);
    }

    // Sixteen scales of six bits, plus 32.
    static void put_scales(const int* scales, uint8_t* out) {
        std::memset(out, 0, 12);
        for (int j = 0; j < 16; j++) {
            out[j % 8] = static_cast<uint8_t>(out[j % 8] | ((scales[j] & 15) << (j < 8 ? 0 : 4)));
            out[8 + j % 4] = static_cast<uint8_t>(out[8 + j % 4] | ((scales[j] >> 4) << (2 * (j / 4))));
        }
    }

    static uint16_t find_scales(const Tile& t, bool important, const Found& found, int block, int* scales) {
        if (important) {
            float sums[16];
            sum_weights(t.weights + block * 256, kSub, 16, sums);
            return half_of_float(scale_of_signed(found.ray.scale + block * 16, sums, 16, 32, scales));
        }
        const float* from = found.scale + block * 16;
        const float leader = leader_of_scales(from, 16);
        const float inverse = -32.0f / leader;
        for (int j = 0; j < 16; j++) {
            const auto code = static_cast<int8_t>(static_cast<uint8_t>(nearest_int(inverse * from[j])));
            scales[j] = leader != 0.0f ? clamp_int(code, -32, 31) + 32 : 0;
        }
        return half_of_float(leader != 0.0f ? 1.0f / inverse : 0.0f);
    }

    static bool put(const Tile& t, bool important, const Found& found, int block, uint8_t* out) {
        const int first = block * 16;
        int scales[16];
        const uint16_t half = find_scales(t, important, found, block, scales);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            const float d = float_of_half(half) * static_cast<float>(scales[j] - 32);
            uint8_t* sub = codes + j * kSub;
            const int at = (first + j) * kSub;
            if (d != 0.0f) {
                put_ray_codes(t.x + at, kSub, d, 4, sub);
            } else if (important) {
                put_found_codes(t.x + at, kSub, 4, found.ray, first + j, sub);
            } else {
                found.put_codes(first + j, sub);
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
    static constexpr float kLeast = kTiny;
    static constexpr bool kBlank = true;
    using Found = RayFound;

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            turn_subs(t, t.importance, kSub, t.turned_weights);
        } else {
            weigh_by_squares(kSub, t);
        }
        search_rays<kSub, 32>(t, found);
    }

    static bool put(const Tile& t, bool, const Found& found, int block, uint8_t* out) {
        const int first = block * 16;
        const float leader = leader_of_scales(found.scale + first, 16);
        if (float_of_bits(static_cast<uint32_t>(magnitude_bits(leader))) < kTiny) {
            std::memset(out, 0, 210);
            return true;
        }
        const float inverse = -128.0f / leader;
        const uint16_t half = half_of_float(1.0f / inverse);
        uint8_t codes[256];
        for (int j = 0; j < 16; j++) {
            const int code = nearest_int(inverse * found.scale[first + j]);
            const auto scale = static_cast<int8_t>(static_cast<uint8_t>(code < 127 ? code : 127));
            out[192 + j] = static_cast<uint8_t>(scale);
            const float d = float_of_half(half) * static_cast<float>(scale);
            const float* x = t.x + (first + j) * kSub;
            if (d != 0.0f) {
                put_ray_codes(x, kSub, d, 32, codes + j * kSub);
            } else {
                put_found_codes(x, kSub, 32, found, first + j, codes + j * kSub);
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
