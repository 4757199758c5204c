// Numbers of several rows side by side, a lane for each row. Part of bodies.inl.
//
// Lanes never meet, so their number, which is that of the widest register, changes no bit. The element-wise operators
// are those of the language (vectors of GCC and Clang), each rounded once; where there are none, a strip is one row.
//
// Masks are only used as the condition of ?:, combined with &: elsewhere a row's mask is 1 and a vector's is -1.

#if defined(__AVX512F__)
constexpr int kStrip = 16;  // rows
constexpr int kAtOnce = 4;  // candidates whose sums are kept in registers
#elif defined(__AVX2__)
constexpr int kStrip = 8;
constexpr int kAtOnce = 2;
#elif defined(__aarch64__)
constexpr int kStrip = 4;
constexpr int kAtOnce = 4;
#elif defined(__GNUC__)
constexpr int kStrip = 4;
constexpr int kAtOnce = 2;
#else
constexpr int kStrip = 1;
constexpr int kAtOnce = 2;
#endif

#if defined(__GNUC__)
typedef float Reals __attribute__((vector_size(4 * kStrip)));
typedef int32_t Ints __attribute__((vector_size(4 * kStrip)));
#else
using Reals = float;
using Ints = int32_t;
#endif

inline Ints bits_of(Reals x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline Reals reals_of(Ints bits) {
    Reals x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline Reals all_lanes(float x) { return Reals{} + x; }

inline Reals load_lanes(const float* from) {
    Reals x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store_lanes(float* to, Reals x) { std::memcpy(to, &x, sizeof x); }

// The first of the two where they are not in order, as with NaN.
inline Reals larger_of(Reals a, Reals b) { return b > a ? b : a; }
inline Reals smaller_of(Reals a, Reals b) { return b < a ? b : a; }

// |x| < 2^22 to a whole number, half to even.
inline Reals rounded(Reals x) { return (x + kRound) - kRound; }

// To whole numbers from `lowest` to `highest`; NaN becomes `lowest`.
inline Reals level_of(Reals x, Reals lowest, Reals highest) {
    x = x > lowest ? x : lowest;
    x = x < highest ? x : highest;
    return rounded(x);
}

inline Reals magnitude_lanes(Reals x) { return reals_of(bits_of(x) & 0x7fffffff); }

inline Reals root_lanes(Reals x) {
    alignas(64) float each[kStrip];
    store_lanes(each, x);
    for (int i = 0; i < kStrip; i++) each[i] = __builtin_sqrtf(each[i]);
    return load_lanes(each);
}

// As they are stored, half to even; NaN, and what is beyond the format, becomes infinite.
inline Reals stored_lanes(Reals x, ScaleFormat format) {
    const Ints infinity = Ints{} + 0x7f800000;
    const Ints pattern = bits_of(x) & 0x7fffffff, sign = bits_of(x) & static_cast<int32_t>(0x80000000u);
    const Ints size = pattern < infinity ? pattern : infinity;
    if (format == ScaleFormat::Fp32) return reals_of(size | sign);
    if (format == ScaleFormat::Bf16) {
        return reals_of(((size + 0x7fff + ((size >> 16) & 1)) & static_cast<int32_t>(0xffff0000u)) | sign);
    }
    const Reals normal = reals_of((size + 0x0fff + ((size >> 13) & 1)) & ~0x1fff);
    const Reals subnormal = (reals_of(size) + 0.5f) - 0.5f;  // floats in [0.5, 1) are 2^-24 apart, as these are
    const Reals half = size < 0x38800000 ? subnormal : normal;
    return reals_of((half > kLargestScale ? infinity : bits_of(half)) | sign);
}
