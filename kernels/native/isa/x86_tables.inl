// The value of a table of sixteen that is next to a number, by halving instead of by comparing with all: table_value in
// blocks/iq4.inl is the specification. Tables lie in registers.
#include <immintrin.h>

#define SHARDQ_TABLE_VALUE
#define SHARDQ_NIBBLE_VALUES

namespace {

// get_table in blocks/dequantize.inl is the specification.
inline void scale_values(const uint8_t* from, const int8_t* table, float d, float* out) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), low = _mm_set1_epi8(15);
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), low);
    __m128i each[2] = {_mm_shuffle_epi8(values, _mm_and_si128(both, low)), _mm_shuffle_epi8(values, high)};
    for (int i = 0; i < 32; i += 8) {
        const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(each[i / 16]));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(value, _mm256_set1_ps(d)));
        each[i / 16] = _mm_unpackhi_epi64(each[i / 16], each[i / 16]);
    }
}

#if defined(__AVX512F__)

// index has the bits that are known, from the top; each step looks up the middle of what is left.
inline __m512 pick_value(__m512 v, const float* values, const float* middles) {
    const float* m = middles;
    const __m512 quarters = _mm512_setr_ps(m[3], 0, 0, 0, 0, 0, 0, 0, m[11], 0, 0, 0, 0, 0, 0, 0);
    const __m512 eighths = _mm512_setr_ps(m[1], 0, 0, 0, m[5], 0, 0, 0, m[9], 0, 0, 0, m[13], 0, 0, 0);
    const __m512 last = _mm512_setr_ps(m[0], 0, m[2], 0, m[4], 0, m[6], 0, m[8], 0, m[10], 0, m[12], 0, m[14], 0);
    __m512i index = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, _mm512_set1_ps(m[7]), _CMP_NLT_UQ), 8);
    __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(index, quarters), _CMP_NLT_UQ);
    index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(4));
    above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(index, eighths), _CMP_NLT_UQ);
    index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(2));
    above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(index, last), _CMP_NLT_UQ);
    index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(1));
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(values));
}

#else

// index counts what is known; a register holds eight numbers, so the first comparison chooses among two.
inline __m256 pick_value(__m256 v, const float* values, const float* middles) {
    const float* m = middles;
    const __m256 quarters = _mm256_setr_ps(m[3], m[11], 0, 0, 0, 0, 0, 0);
    const __m256 eighths = _mm256_setr_ps(m[1], m[5], m[9], m[13], 0, 0, 0, 0);
    const __m256 last = _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]);
    const __m256 upper = _mm256_cmp_ps(v, _mm256_set1_ps(m[7]), _CMP_NLT_UQ);  // all bits: -1
    __m256i index = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_castps_si256(upper));
    __m256 above = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps(quarters, index), _CMP_NLT_UQ);
    index = _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(above));
    above = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps(eighths, index), _CMP_NLT_UQ);
    index = _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(above));
    above = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps(last, index), _CMP_NLT_UQ);
    index = _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(above));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), index), upper);
}

#endif

}  // namespace
