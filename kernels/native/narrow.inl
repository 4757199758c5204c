// fp32 to fp16, as columns. Part of bodies.inl.

// To the nearest fp16 value, half to even; beyond the range infinity, any NaN the quiet one without payload.
inline uint16_t half_of_float(float x) {
    constexpr uint32_t kInfinity = 0x7f800000u, kSmallestNormal = 0x38800000u, kHalfInfinity = 0x7c00u;
    const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t rebased = rounded - (112u << 10);
    const uint32_t normal = rebased < kHalfInfinity ? rebased : kHalfInfinity;
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);  // units of 2^-24
    const uint32_t number = magnitude < kSmallestNormal ? subnormal : normal;
    return static_cast<uint16_t>((magnitude > kInfinity ? 0x7e00u : number) | ((bits >> 16) & 0x8000u));
}

void narrow_columns(const float* src, int64_t rows, int64_t cols, uint16_t* out, int64_t out_cols, int64_t row0) {
    for (int64_t c = 0; c < cols; c++) {
        uint16_t* SHARDQ_RESTRICT target = out + c * out_cols + row0;
        const float* SHARDQ_RESTRICT from = src + c;
        for (int64_t r = 0; r < rows; r++) target[r] = half_of_float(from[r * cols]);
    }
}
