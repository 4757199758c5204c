// Codes of E4M3 by way of F16, whose conversion to fp32 is one instruction: its subnormal numbers included, whatever the
// processor's mode for these is.
#include <immintrin.h>

#define SHARDQ_DECODE_E4M3

namespace {

// FloatDecoder<E4M3FN> in decode.inl is the specification. As F16, whose exponent has one bit more and another bias, a
// code is worth 1/256 of its value; NaN, all ones, gets the exponent that it has there. Each column has its own scale.
// Returns how many columns were decoded.
inline int64_t decode_e4m3(const uint8_t* codes, int64_t cols, const float* scales, float* out) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i fields = _mm512_set1_epi16(static_cast<short>(0xbf80)), nan = _mm512_set1_epi16(0x3f80);
    const __m512i exponent = _mm512_set1_epi16(0x7c00);
    const __m512 unit = _mm512_set1_ps(256.0f);
    for (; i + 32 <= cols; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m512i moved = _mm512_srai_epi16(_mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8), 1);
        __m512i half = _mm512_and_si512(moved, fields);
        const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, nan), nan);
        half = _mm512_or_si512(half, _mm512_maskz_mov_epi16(is_nan, exponent));
        const __m512 first = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), unit);
        const __m512 last = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), unit);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(scales + i), first));
        _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(_mm512_loadu_ps(scales + i + 16), last));
    }
#else
    const __m256i fields = _mm256_set1_epi16(static_cast<short>(0xbf80)), nan = _mm256_set1_epi16(0x3f80);
    const __m256i exponent = _mm256_set1_epi16(0x7c00);
    const __m256 unit = _mm256_set1_ps(256.0f);
    for (; i + 16 <= cols; i += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
        const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
        __m256i half = _mm256_and_si256(moved, fields);
        const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, nan), nan);
        half = _mm256_or_si256(half, _mm256_and_si256(is_nan, exponent));
        const __m256 first = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), unit);
        const __m256 last = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), unit);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(scales + i), first));
        _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(_mm256_loadu_ps(scales + i + 8), last));
    }
#endif
    return i;
}

}  // namespace
