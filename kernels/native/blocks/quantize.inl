// Rows of weights to blocks. Part of bodies.inl.

// A block whose weights or scales are not finite is all zeros; it is counted.
inline int64_t keep_or_clear(bool good, int64_t size_bytes, uint8_t* out) {
    if (good) return 0;
    std::memset(out, 0, static_cast<size_t>(size_bytes));
    return 1;
}

// Formats of one step: F::put(x, out) makes a block.
template <class F, int kCols>
inline int64_t quantize_plain(const Weights& w, int64_t size_bytes, uint8_t* out) {
    constexpr int kCount = kTileCols / kCols;
    const int64_t total = w.rows * w.cols / kCols;
    int64_t bad = 0;
    Tile t;
    for (int64_t block = 0; block < total; block += kCount) {
        const int count = static_cast<int>(least(kCount, total - block));
        load_tile(w, block * kCols, count, kCols, kCols, t);
        for (int b = 0; b < count; b++) {
            uint8_t* to = out + (block + b) * size_bytes;
            const bool fits = F::put(t.x + b * kCols, to);
            bad += keep_or_clear(fits && !t.bad[b], size_bytes, to);
        }
    }
    return bad;
}

// Formats with one scale per 32 columns, of a tile at once.
template <class F>
inline int64_t quantize_ends(const Weights& w, int64_t size_bytes, uint8_t* out) {
    const int64_t total = w.rows * w.cols / 32;
    int64_t bad = 0;
    alignas(64) float x[kTileCols] = {};
    BlockEnds ends;
    PlainScales scales;
    for (int64_t block = 0; block < total; block += kTileBlocks) {
        const int count = static_cast<int>(least(kTileBlocks, total - block));
        widen_any(w, block * 32, count * 32, x);
        find_ends(x, ends);
        F::scale(x, ends, scales);
        for (int b = 0; b < count; b++) {
            uint8_t* to = out + (block + b) * size_bytes;
            const bool good = magnitude_bits(unordered(ends.low[b])) < 0x7f800000 &&
                              magnitude_bits(unordered(ends.high[b])) < 0x7f800000 && is_finite_half(scales.scale[b]) &&
                              is_finite_half(scales.bias[b]);
            bad += keep_or_clear(good, size_bytes, to);
            if (good) F::put(x + b * 32, scales, b, to);
        }
    }
    return bad;
}

// The mean of the squares of a row, summed in order; bad blocks of 32 columns count as zeros.
inline float mean_of_row(const Weights& w, int64_t row, Tile& scratch) {
    float sum = 0.0f;
    for (int64_t at = 0; at < w.cols; at += kTileCols) {
        const int count = static_cast<int>(least(kTileBlocks, (w.cols - at) / 32));
        load_tile(w, row * w.cols + at, count, 32, 32, scratch);
        for (int i = 0; i < count * 32; i++) sum += scratch.x[i] * scratch.x[i];
    }
    return sum / static_cast<float>(w.cols);
}

// Formats that search: F::search(tile, ...) and F::put(tile, ..., block, out). Where F::kBlank, a block without a
// sub-block that is searched is all zero bytes.
template <class F, bool kRowMeans = false>
inline int64_t quantize_searched(const Weights& w, const float* importance, int64_t size_bytes, uint8_t* out) {
    constexpr int kCount = kTileCols / F::kCols;
    const int64_t total = w.rows * w.cols / F::kCols, row_blocks = w.cols / F::kCols;
    int64_t bad = 0, mean_row = -1;
    float mean = 0.0f;
    Tile t;
    typename F::Found found;
    for (int64_t block = 0; block < total; block += kCount) {
        const int count = static_cast<int>(least(kCount, total - block));
        if (kRowMeans) {
            for (int b = 0; b < kTileBlocks; b++) {
                const int64_t row = least(block + b, total - 1) / row_blocks;
                if (row != mean_row) mean = mean_of_row(w, row, t);
                mean_row = row;
                t.mean[b] = mean;
            }
        }
        load_tile(w, block * F::kCols, count, F::kCols, F::kSub, t);
        choose_subs(F::kLeast, F::kSub, t);
        if (F::kBlank && t.active == 0) {
            std::memset(out + block * size_bytes, 0, static_cast<size_t>(count * size_bytes));
            for (int b = 0; b < count; b++) bad += t.bad[b] ? 1 : 0;
            continue;
        }
        if (importance != nullptr) load_importance(importance, w.cols, block * F::kCols, count, F::kCols, t);
        turn_subs(t, t.x, F::kSub, t.turned);
        F::search(t, importance != nullptr, found);
        place_found(t, F::kSub, found);
        for (int b = 0; b < count; b++) {
            uint8_t* to = out + (block + b) * size_bytes;
            const bool blank = F::kBlank && is_blank(t, F::kLeast, b * (F::kCols / F::kSub), F::kCols / F::kSub);
            const bool fits = blank ? false : F::put(t, importance != nullptr, found, b, to);
            keep_or_clear(fits && !t.bad[b], size_bytes, to);
            bad += (blank || fits) && !t.bad[b] ? 0 : 1;
        }
    }
    return bad;
}

template <class Plain, class Important>
inline int64_t quantize_either(const Weights& w, const float* importance, int64_t size_bytes, uint8_t* out) {
    if (importance == nullptr) return quantize_ends<Plain>(w, size_bytes, out);
    return quantize_searched<Important, true>(w, importance, size_bytes, out);
}

int64_t quantize_blocks(const Weights& w, const BlockFormat& format, const float* importance, uint8_t* out) {
    const int64_t size = format.size_bytes;
    switch (format.type) {
        case BlockType::Q4_0: return quantize_either<SignedPlain<15>, ImportantSigned<15>>(w, importance, size, out);
        case BlockType::Q4_1: return quantize_either<AffinePlain<15>, ImportantAffine<15>>(w, importance, size, out);
        case BlockType::Q5_0: return quantize_either<SignedPlain<31>, ImportantSigned<31>>(w, importance, size, out);
        case BlockType::Q5_1: return quantize_either<AffinePlain<31>, ImportantAffine<31>>(w, importance, size, out);
        case BlockType::Q8_0: return quantize_ends<Bytes8>(w, size, out);
        case BlockType::Q2_K: return quantize_searched<Q2K>(w, importance, size, out);
        case BlockType::Q3_K: return quantize_searched<Q3K>(w, importance, size, out);
        case BlockType::Q4_K: return quantize_searched<LineK<15>>(w, importance, size, out);
        case BlockType::Q5_K: return quantize_searched<LineK<31>>(w, importance, size, out);
        case BlockType::Q6_K: return quantize_searched<Q6K>(w, importance, size, out);
        case BlockType::IQ4_NL: return quantize_searched<TableBlock<32>>(w, importance, size, out);
        case BlockType::IQ4_XS: return quantize_searched<TableBlock<256>>(w, importance, size, out);
        case BlockType::TQ1_0: return quantize_plain<Ternary5, 256>(w, size, out);
        case BlockType::TQ2_0: return quantize_plain<Ternary4, 256>(w, size, out);
        case BlockType::MXFP4: return quantize_plain<Mxfp4, 32>(w, size, out);
    }
    return 0;
}
