// The value of a table of sixteen that is next to a number, by halving instead of by comparing with all: table_value in
// blocks/iq4.inl is the specification. Tables lie in registers.
#include <immintrin.h>

#define SHARDQ_TABLE_VALUE

namespace {

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
