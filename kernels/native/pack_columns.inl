// Bit streams as columns: pack_bits and transpose_u32 without the matrix between them. Part of bodies.inl.

// 16 rows of kCodes codes become 16 columns of kWords words: as many whole tiles of transpose_tile as it takes for a
// whole number of codes.
template <int kBits>
inline void pack_strips(const uint8_t* codes, int64_t rows, int64_t cols, uint32_t* out, int64_t out_cols) {
    constexpr int kWords = kBits % 2 != 0 ? 16 * kBits : kBits == 6 ? 48 : 16, kCodes = kWords * 32 / kBits;
    alignas(64) uint32_t strip[16 * kWords];
    for (int64_t c = 0; c < cols; c += kCodes) {
        const int64_t width = least(kCodes, cols - c), words = width * kBits / 32;
        uint32_t* target = out + c * kBits / 32 * out_cols;
        for (int64_t r = 0; r < rows; r += 16) {
            const int64_t height = least(16, rows - r);
            for (int64_t i = 0; i < height; i++) {
                pack_stream<kBits>(codes + (r + i) * cols + c, width, strip + i * kWords);
            }
            transpose_words(strip, kWords, height, words, target + r, out_cols);
        }
    }
}

void pack_columns(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* out, int64_t out_cols,
                  int64_t row0) {
    switch (bits) {
        case 2: return pack_strips<2>(codes, rows, cols, out + row0, out_cols);
        case 3: return pack_strips<3>(codes, rows, cols, out + row0, out_cols);
        case 4: return pack_strips<4>(codes, rows, cols, out + row0, out_cols);
        case 5: return pack_strips<5>(codes, rows, cols, out + row0, out_cols);
        case 6: return pack_strips<6>(codes, rows, cols, out + row0, out_cols);
        case 7: return pack_strips<7>(codes, rows, cols, out + row0, out_cols);
        default: return pack_strips<8>(codes, rows, cols, out + row0, out_cols);
    }
}
