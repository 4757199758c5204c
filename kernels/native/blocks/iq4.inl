// The formats with elements of a table: IQ4_NL and IQ4_XS of ggml 0.25.3. Part of bodies.inl; contract_blocks.py has
// the formulas and the bytes.

constexpr int8_t kTableLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
struct TableValues {
    float each[16];
};
constexpr TableValues widen_table() {
    TableValues values{};
    for (int i = 0; i < 16; i++) values.each[i] = static_cast<float>(kTableLevels[i]);
    return values;
}
constexpr TableValues kTable = widen_table();
constexpr const float (&kTableValues)[16] = kTable.each;
// Half way between neighbours: from there on it is the upper one.
constexpr float kTableMiddles[15] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                     7,       19,     31.5f, 45.5f, 61,  79,     101};

// NaN becomes the last one.
#ifdef SHARDQ_TABLE_VALUE
inline Reals table_value(Reals v) { return pick_value(v, kTableValues, kTableMiddles); }
#else
inline Reals table_value(Reals v) {
    Reals value = all_lanes(kTableValues[15]);
    for (int k = 14; k >= 0; k--) value = v < all_lanes(kTableMiddles[k]) ? all_lanes(kTableValues[k]) : value;
    return value;
}
#endif

inline void put_table_codes(const float* SHARDQ_RESTRICT x, float inverse, uint8_t* SHARDQ_RESTRICT codes) {
    for (int i = 0; i < 32; i++) {
        const float v = inverse * x[i];
        int code = 15;
        for (int k = 14; k >= 0; k--) code = v < kTableMiddles[k] ? k : code;
        codes[i] = static_cast<uint8_t>(code);
    }
}

struct alignas(64) TableFound {
    float scale[kTileBlocks];

    void take(const TableFound& from, int at, int to) { scale[to] = from.scale[at]; }
    void clear(int sub, float) { scale[sub] = 0.0f; }
};

inline RaySums sum_table(const float* x, const float* w, Reals inverse) {
    RaySums sums = {};
    for (int i = 0; i < 32; i++) {
        const Reals value = load_lanes(x + i * kStrip);
        const Reals weighed = load_lanes(w + i * kStrip), level = table_value(inverse * value);
        const Reals one = weighed * level;
        sums.product += one * value;
        sums.square += one * level;
    }
    return sums;
}

inline void search_table(const float* x, const float* w, int at, TableFound& found) {
    const Reals leader = lane_leader<32>(x);
    const Reals first = -leader / kTableValues[0];
    const RaySums sums = sum_table(x, w, 1.0f / first);
    Reals scale = sums.square > 0.0f ? sums.product / sums.square : Reals{};
    Reals best = scale * sums.product;
    for (int i = -7; i <= 7; i++) {
        const RaySums tried = sum_table(x, w, (static_cast<float>(i) + kTableValues[0]) / leader);
        const auto better = (tried.square > 0.0f) & (tried.product * tried.product > best * tried.square);
        const Reals fit = tried.product / tried.square;
        scale = better ? fit : scale;
        best = better ? fit * tried.product : best;
    }
    store_lanes(found.scale + at, scale);
}

template <int kColumns>
struct TableBlock {
    static constexpr int kCols = kColumns, kSub = 32;
    static constexpr float kLeast = kTiny;
    static constexpr bool kBlank = false;
    using Found = TableFound;

    static void search(Tile& t, bool important, Found& found) {
        if (important) {
            for (int at = 0; at < kTileCols; at += kCols) {
                const float mean = sum_of_squares(t.x + at, kCols) * (2.0f / static_cast<float>(kCols));
                weigh_block(t.x + at, t.importance + at, mean, kCols, t.weights + at);
            }
            turn_subs(t, t.weights, kSub, t.turned_weights);
        } else {
            weigh_by_squares(kSub, t);
        }
        for (int at = 0; at < t.active; at += kStrip) {
            search_table(t.turned + at * kSub, t.turned_weights + at * kSub, at, found);
        }
    }

    static bool put(const Tile& t, bool, const Found& found, int block, uint8_t* out) {
        return kCols == 32 ? put_one(t, found, block, out) : put_eight(t, found, block, out);
    }

    static bool put_one(const Tile& t, const Found& found, int block, uint8_t* out) {
        const float d = found.scale[block];
        const uint16_t half = half_of_float(d);
        uint8_t codes[32];
        put_table_codes(t.x + block * 32, d != 0.0f ? 1.0f / d : 0.0f, codes);
        put_half(out, half);
        put_nibbles(codes, out + 2);
        return is_finite_half(half);
    }

    static bool put_eight(const Tile& t, const Found& found, int block, uint8_t* out) {
        const float* scales = found.scale + block * 8;
        const float d = -leader_of_scales(scales, 8) / 32.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
        const uint16_t half = half_of_float(d);
        put_half(out, half);
        std::memset(out + 2, 0, 6);
        int high = 0;
        for (int b = 0; b < 8; b++) {
            const int level = clamp_int(nearest_int(inverse * scales[b]), -32, 31);
            const float step = d * static_cast<float>(level);
            uint8_t codes[32];
            put_table_codes(t.x + (block * 8 + b) * 32, step != 0.0f ? 1.0f / step : 0.0f, codes);
            put_nibbles(codes, out + 8 + b * 16);
            out[4 + b / 2] = static_cast<uint8_t>(out[4 + b / 2] | (((level + 32) & 15) << (b % 2 * 4)));
            high |= ((level + 32) >> 4) << (2 * b);
        }
        put_half(out + 2, static_cast<uint16_t>(high));
        return is_finite_half(half);
    }
};
