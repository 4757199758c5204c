// Words of 32 bits to the codes in them, a row for each place in the word. Part of bodies.inl.

template <int kBits>
inline void split_rows(const uint32_t* words, int64_t rows, int64_t cols, uint8_t* out) {
    constexpr int kCodes = 32 / kBits;
    for (int64_t row = 0; row < rows; row++) {
        for (int place = 0; place < kCodes; place++) {
            const uint32_t* SHARDQ_RESTRICT from = words + row * cols;
            uint8_t* SHARDQ_RESTRICT to = out + (row * kCodes + place) * cols;
            const int shift = place * kBits;
            for (int64_t i = 0; i < cols; i++) to[i] = static_cast<uint8_t>(from[i] >> shift & ((1u << kBits) - 1u));
        }
    }
}

void split_words(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* out) {
    if (bits == 2) return split_rows<2>(words, rows, cols, out);
    if (bits == 4) return split_rows<4>(words, rows, cols, out);
    split_rows<8>(words, rows, cols, out);
}
