// The formats with one scale per 32 columns under importance, a block in each lane (quantize_row_q4_0_impl and so on of
// ggml 0.25.3). Part of bodies.inl. Errors are weighed with the mean of squares of the whole row.

inline void weigh_by_rows(Tile& t) {
    for (int b = 0; b < kTileBlocks; b++) {
        weigh_block(t.x + b * 32, t.importance + b * 32, t.mean[b], 32, t.weights + b * 32);
    }
    turn_subs(t, t.weights, 32, t.turned_weights);
}

template <int kTop>
struct ImportantSigned {
    static constexpr int kCols = 32, kSub = 32;
    static constexpr float kLeast = kTiny;
    static constexpr bool kBlank = false;
    using Found = RayFound;

    static void search(Tile& t, bool, Found& found) {
        weigh_by_rows(t);
        search_rays<kSub, (kTop + 1) / 2>(t, found);
    }

    static bool put(const Tile& t, bool, const Found& found, int block, uint8_t* out) {
        uint8_t codes[32];
        put_found_codes(t.x + block * 32, 32, (kTop + 1) / 2, found, block, codes);
        return put_plain_block<kTop, false>(found.scale[block], 0.0f, codes, out);
    }
};

template <int kTop>
struct ImportantAffine {
    static constexpr int kCols = 32, kSub = 32;
    static constexpr float kLeast = kAnything;
    static constexpr bool kBlank = false;
    using Found = LineFound;

    static void search(Tile& t, bool, Found& found) {
        weigh_by_rows(t);
        search_lines<kSub, kTop, false>(t, kImportantSteps, found);
    }

    static bool put(const Tile& t, bool, const Found& found, int block, uint8_t* out) {
        uint8_t codes[32];
        put_found_codes(t.x + block * 32, 32, kTop, found, block, codes);
        return put_plain_block<kTop, true>(found.scale[block], -found.least[block], codes, out);
    }
};
