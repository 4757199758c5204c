// SHA-256 of up to three streams at once, with SSE4.1 and the SHA extensions of x86-64.
#include "../sha256.h"

#include <immintrin.h>

#include <utility>

namespace shardq {
namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2).
alignas(16) constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

const __m128i* vectors(const void* p) { return static_cast<const __m128i*>(p); }

// One stream. The instructions want the words a b e f and c d g h of a state, the first one in the highest lane.
struct Stream {
    __m128i abef, cdgh, words[4];

    explicit Stream(const uint32_t* state) {
        const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(vectors(state)), 0xb1);
        const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(vectors(state + 4)), 0x1b);
        abef = _mm_alignr_epi8(badc, hgfe, 8);
        cdgh = _mm_blend_epi16(hgfe, badc, 0xf0);
    }

    void store(uint32_t* state) const {
        const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xf0));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
    }

    // The sixteen words of a block, which are big-endian.
    void load(const uint8_t* block) {
        const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
        for (int i = 0; i < 4; i++) words[i] = _mm_shuffle_epi8(_mm_loadu_si128(vectors(block + 16 * i)), order);
    }

    // Rounds 4 R to 4 R + 3, and the words that are due sixteen rounds later.
    template <int R>
    void step() {
        const __m128i sums = _mm_add_epi32(words[R & 3], _mm_load_si128(vectors(kRounds + 4 * R)));
        cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sums);
        abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sums, 0x0e));
        if (R >= 12) return;
        const __m128i last = words[(R + 3) & 3];
        const __m128i older = _mm_add_epi32(_mm_sha256msg1_epu32(words[R & 3], words[(R + 1) & 3]),
                                            _mm_alignr_epi8(last, words[(R + 2) & 3], 4));
        words[R & 3] = _mm_sha256msg2_epu32(older, last);
    }

    void add(const Stream& before) {
        abef = _mm_add_epi32(abef, before.abef);
        cdgh = _mm_add_epi32(cdgh, before.cdgh);
    }
};

// All rounds of a block, written out: words that are counted at run time would lie in memory.
template <int N, int... R>
void run(Stream* streams, std::integer_sequence<int, R...>) {
    const auto each = [&](auto r) {
        for (int i = 0; i < N; i++) streams[i].template step<decltype(r)::value>();
    };
    (each(std::integral_constant<int, R>{}), ...);
}

template <int... I>
void hash(const HashedStream* h, size_t blocks, std::integer_sequence<int, I...>) {
    constexpr int kCount = sizeof...(I);
    Stream streams[kCount] = {Stream(h[I].state)...};
    for (size_t at = 0; at < 64 * blocks; at += 64) {
        const Stream before[kCount] = {streams[I]...};
        (streams[I].load(h[I].data + at), ...);
        run<kCount>(streams, std::make_integer_sequence<int, 16>{});
        (streams[I].add(before[I]), ...);
    }
    (streams[I].store(h[I].state), ...);
}

}  // namespace

void sha256(const HashedStream* streams, int count, size_t blocks) {
    static_assert(kHashedTogether == 3, "a case for each count");
    switch (count) {
        case 1: return hash(streams, blocks, std::make_integer_sequence<int, 1>{});
        case 2: return hash(streams, blocks, std::make_integer_sequence<int, 2>{});
        case 3: return hash(streams, blocks, std::make_integer_sequence<int, 3>{});
    }
}

}  // namespace shardq
