// A strip of a transposed matrix of 32-bit words. Part of bodies.inl.
//
// A tile of 16 x 16 words is transposed by four perfect shuffles: interleaving the two halves of 256 words rotates
// the bits of their index by one, and rotating eight bits by four swaps row and column.

inline void shuffle_halves(const uint32_t* SHARDQ_RESTRICT src, uint32_t* SHARDQ_RESTRICT out) {
    for (int i = 0; i < 128; i++) {
        out[2 * i] = src[i];
        out[2 * i + 1] = src[i + 128];
    }
}

inline void transpose_tile(const uint32_t* src, int64_t src_stride, uint32_t* out, int64_t out_stride) {
    alignas(64) uint32_t a[256], b[256];
    for (int i = 0; i < 16; i++) std::memcpy(a + 16 * i, src + i * src_stride, 16 * sizeof *a);
    shuffle_halves(a, b);
    shuffle_halves(b, a);
    shuffle_halves(a, b);
    shuffle_halves(b, a);
    for (int i = 0; i < 16; i++) std::memcpy(out + i * out_stride, a + 16 * i, 16 * sizeof *a);
}

// Rows of `cols` words, `src_stride` apart, become columns. Column tiles outside: the 16 rows of the output that they
// touch are then written from left to right.
inline void transpose_words(const uint32_t* src, int64_t src_stride, int64_t rows, int64_t cols, uint32_t* out,
                            int64_t out_stride) {
    const int64_t whole_rows = rows / 16 * 16, whole_cols = cols / 16 * 16;
    for (int64_t c = 0; c < whole_cols; c += 16) {
        for (int64_t r = 0; r < whole_rows; r += 16) {
            transpose_tile(src + r * src_stride + c, src_stride, out + c * out_stride + r, out_stride);
        }
    }
    for (int64_t c = 0; c < cols; c++) {
        for (int64_t r = c < whole_cols ? whole_rows : 0; r < rows; r++) {
            out[c * out_stride + r] = src[r * src_stride + c];
        }
    }
}

void transpose_u32(const uint32_t* src, int64_t rows, int64_t cols, uint32_t* out, int64_t out_cols, int64_t row0) {
    transpose_words(src, cols, rows, cols, out + row0, out_cols);
}
