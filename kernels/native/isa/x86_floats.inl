// Codes of E4M3 by way of F16, whose conversion to fp32 is one instruction: its subnormal numbers included, whatever the
// processor's mode for these is.
#include <immintrin.h>

#define SHARDQ_DECODE_E4M3

namespace {

// Columns that share a scale. FloatDecoder<E4M3FN> in decode.inl is the specification. As F16, whose exponent has one bit
// more and another bias, a code is worth 1/256 of its value; 256 times the scale makes up for it, exactly, so that the
// product is rounded once, as there. Returns how many columns were decoded: those before a NaN, which has another pattern
// in F16, and none where 256 times the scale is beyond fp32.
inline int64_t decode_e4m3(const uint8_t* codes, int64_t cols, float scale, float* out) {
    const float factor = 256.0f * scale;
    if (!(factor - factor == 0.0f)) return 0;
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i fields = _mm512_set1_epi16(static_cast<short>(0xbf80));
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80)), nan = _mm256_set1_epi8(static_cast<char>(0xff));
    const __m512 by = _mm512_set1_ps(factor);
    for (; i + 32 <= cols; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        if (_mm256_cmpeq_epi8_mask(_mm256_or_si256(bytes, sign), nan) != 0) return i;
        const __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), fields);
        const __m512 first = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        const __m512 last = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(by, first));
        _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(by, last));
    }
#else
    const __m256i fields = _mm256_set1_epi16(static_cast<short>(0xbf80));
    const __m128i sign = _mm_set1_epi8(static_cast<char>(0x80)), nan = _mm_set1_epi8(static_cast<char>(0xff));
    const __m256 by = _mm256_set1_ps(factor);
    for (; i + 16 <= cols; i += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
        if (_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_or_si128(bytes, sign), nan)) != 0) return i;
        const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), fields);
        const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        const __m256 last = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(by, first));
        _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(by, last));
    }
#endif
    return i;
}

}  // namespace
