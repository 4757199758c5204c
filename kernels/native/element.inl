// Bits and element types. Part of bodies.inl: no includes, everything in its anonymous namespace.

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// a * b + c where fusing cannot change what the caller makes of it (the caller says why). Only where the instruction
// exists; elsewhere a fused multiply-add is a slow library call.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Adding 1.5 * 2^23 rounds |x| < 2^22 half to even, and leaves the integer in the low bits (two's complement).
constexpr float kRound = 12582912.0f;

// Raw is the stored pattern as unsigned, Signed the same width. With the sign bit on top, the largest pattern read as
// signed is the largest value >= +0, and the largest pattern read as unsigned is the most negative value <= -0; NaN
// lies beyond infinity on both sides. kInfinity is the pattern of +Inf.
struct Bf16 {
    using Raw = uint16_t;
    using Signed = int16_t;
    static constexpr Raw kInfinity = 0x7f80;
    static constexpr int kSignificantBits = 8;
    static uint32_t widen_bits(uint32_t raw) { return raw << 16; }
};

struct F16 {
    using Raw = uint16_t;
    using Signed = int16_t;
    static constexpr Raw kInfinity = 0x7c00;
    static constexpr int kSignificantBits = 11;
    // Integer shifts, except that a subnormal m * 2^-24 is (2^-14 + m * 2^-24) - 2^-14: exact, and independent of the
    // processor's flush-to-zero setting. A NaN keeps its payload and its quiet bit.
    static uint32_t widen_bits(uint32_t raw) {
        const uint32_t magnitude = (raw & 0x7fffu) << 13;
        const uint32_t sign = (raw & 0x8000u) << 16;
        const uint32_t exponent = magnitude & 0x0f800000u;
        const uint32_t offset = exponent == 0x0f800000u ? 0x70000000u : 0x38000000u;
        const uint32_t small = bits_of_float(float_of_bits(magnitude + 0x38800000u) - float_of_bits(0x38800000u));
        return (exponent == 0 ? small : magnitude + offset) | sign;
    }
};

struct F32 {
    using Raw = uint32_t;
    using Signed = int32_t;
    static constexpr Raw kInfinity = 0x7f800000u;
    static uint32_t widen_bits(uint32_t raw) { return raw; }
};

template <class T>
inline float widen_value(typename T::Raw raw) {
    return float_of_bits(T::widen_bits(raw));
}

// Small floats: a sign, kBits - 1 - kMantissaBits bits of exponent, and the rest. Codes without sign above kLargestCode
// are infinity and NaN.
template <int kBits_, int kMantissaBits_, int kBias, uint32_t kLargestCode_>
struct FloatType {
    static constexpr int kBits = kBits_, kMantissaBits = kMantissaBits_;
    static constexpr int kShift = 23 - kMantissaBits;  // from the fields of a code to those of an fp32 number
    static constexpr int kSignShift = 32 - kBits;
    static constexpr uint32_t kSign = 1u << (kBits - 1);
    static constexpr uint32_t kLargestCode = kLargestCode_;
    static constexpr bool kHasSpecials = kLargestCode != kSign - 1;
    static constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
    static constexpr uint32_t kSmallestExponent = static_cast<uint32_t>(128 - kBias) << 23;  // of normal numbers
    // As fp32 patterns. Without bits of exponent all codes lie below the smallest normal number, 2^E: the largest is
    // 2^E less one step.
    static constexpr uint32_t kLargestStep =
        kSmallestExponent - (1u << 23) + (((1u << (kMantissaBits - 1)) - 1u) << (24 - kMantissaBits));
    static constexpr uint32_t kLargest =
        kMantissaBits == kBits - 1 ? kLargestStep : (kLargestCode << kShift) + kRebias;
};

using E0M3 = FloatType<4, 3, 0, 0x07>;
using E2M1 = FloatType<4, 1, 1, 0x07>;
using E2M3 = FloatType<6, 3, 1, 0x1f>;
using E3M2 = FloatType<6, 2, 3, 0x1f>;
using E4M3FN = FloatType<8, 3, 7, 0x7e>;
using E5M2 = FloatType<8, 2, 15, 0x7b>;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
