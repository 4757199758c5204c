// The extremes of four short groups of 16-bit weights; find_extremes in rtn.inl is the specification. Compilers
// reduce each group on its own, which takes twice the time for groups of 32: here the four reductions share a tree of
// unpacks.
#include <immintrin.h>

#define SHARDQ_EXTREMES_OF_FOUR
#define SHARDQ_SHORT_EXTREMES

namespace {

// group is a multiple of 8. Writes four entries of highest and of lowest.
inline void extremes_of_four(const uint16_t* src, int64_t group, int32_t* highest, uint32_t* lowest) {
    const __m128i flip = _mm_set1_epi16(static_cast<short>(0x8000));  // orders unsigned numbers as signed ones
    __m128i pairs[4];
    for (int i = 0; i < 4; i++) {
        __m128i high = _mm_setzero_si128(), low = _mm_setzero_si128();
        for (int64_t j = 0; j < group; j += 8) {
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * group + j));
            high = _mm_max_epi16(high, raw);
            low = _mm_max_epu16(low, raw);
        }
        low = _mm_xor_si128(low, flip);
        pairs[i] = _mm_max_epi16(_mm_unpacklo_epi16(high, low), _mm_unpackhi_epi16(high, low));
    }
    const __m128i first = _mm_max_epi16(_mm_unpacklo_epi32(pairs[0], pairs[1]), _mm_unpackhi_epi32(pairs[0], pairs[1]));
    const __m128i last = _mm_max_epi16(_mm_unpacklo_epi32(pairs[2], pairs[3]), _mm_unpackhi_epi32(pairs[2], pairs[3]));
    const __m128i all = _mm_max_epi16(_mm_unpacklo_epi64(first, last), _mm_unpackhi_epi64(first, last));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(highest), _mm_srai_epi32(_mm_slli_epi32(all, 16), 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lowest), _mm_srli_epi32(_mm_xor_si128(all, flip), 16));
}

// magnitude_of in absmax.inl for a group that is a multiple of 8. The instruction finds the smallest of eight numbers.
inline int32_t short_magnitude(const uint16_t* src, int64_t group) {
    const __m128i magnitude = _mm_set1_epi16(0x7fff);
    __m128i most = _mm_setzero_si128();
    for (int64_t j = 0; j < group; j += 8) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + j));
        most = _mm_max_epi16(most, _mm_and_si128(raw, magnitude));
    }
    return 0x7fff - (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(most, magnitude))) & 0xffff);
}

// range_of in absmax.inl, likewise.
inline void short_range(const uint16_t* src, int64_t group, int32_t* lowest, int32_t* highest) {
    const __m128i rest = _mm_set1_epi16(0x7fff), flip = _mm_set1_epi16(static_cast<short>(0x8000));
    __m128i low = rest, high = flip;  // the largest and the smallest key
    for (int64_t j = 0; j < group; j += 8) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + j));
        const __m128i key = _mm_xor_si128(raw, _mm_and_si128(_mm_srai_epi16(raw, 15), rest));
        low = _mm_min_epi16(low, key);
        high = _mm_max_epi16(high, key);
    }
    *lowest = (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(low, flip))) & 0xffff) - 0x8000;
    *highest = 0x7fff - (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(high, rest))) & 0xffff);
}

}  // namespace
