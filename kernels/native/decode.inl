// Values of scaled and affine codes, and the error that they make. Part of bodies.inl.

// Decoders as IntDecoder of error.inl; `zero` is the offset.
template <class Decoder>
inline float difference_from(const Decoder& decoder, float weight, int32_t code, float scale, float zero) {
    return weight - decoder.value(code, scale, zero);
}

struct LevelDecoder {
    static constexpr bool kHasZeros = false;
    int32_t half;

    explicit LevelDecoder(const Element& e) : half(1 << (e.bits - 1)) {}

    float value(int32_t code, float scale, float) const { return scale * static_cast<float>(code - half); }
    float difference_of(float weight, int32_t code, float scale, float zero) const {
        return difference_from(*this, weight, code, scale, zero);
    }
};

// The fields of a float's code are moved to those of an fp32 number. Where the exponent is 0, fraction * 2^E with the
// smallest E is (1 + fraction) * 2^E - 2^E, exactly.
struct FloatDecoder {
    static constexpr bool kHasZeros = false;
    uint32_t magnitude, rebias, smallest;
    int32_t largest_code;
    int shift, sign_shift;

    explicit FloatDecoder(const Element& e)
        : magnitude((1u << (e.bits - 1)) - 1u),
          rebias(static_cast<uint32_t>(127 - e.bias) << 23),
          smallest(static_cast<uint32_t>(128 - e.bias) << 23),
          largest_code(e.largest_code),
          shift(23 - e.mantissa_bits),
          sign_shift(32 - e.bits) {}

    float value(int32_t code, float scale, float) const {
        const uint32_t bare = static_cast<uint32_t>(code) & magnitude, moved = bare << shift;
        const uint32_t small = bits_of_float(float_of_bits(moved + smallest) - float_of_bits(smallest));
        uint32_t bits = moved < 0x800000u ? small : moved + rebias;
        bits |= static_cast<int32_t>(bare) > largest_code ? 0x7f800000u : 0u;
        return scale * float_of_bits(bits | ((static_cast<uint32_t>(code) << sign_shift) & 0x80000000u));
    }
    float difference_of(float weight, int32_t code, float scale, float zero) const {
        return difference_from(*this, weight, code, scale, zero);
    }
};

template <DecodingRule kRule>
struct AffineDecoder {
    static constexpr bool kHasZeros = true;

    float value(int32_t code, float scale, float offset) const {
        const float level = static_cast<float>(code);
        return kRule == DecodingRule::Zero ? scale * (level - offset) : scale * level + offset;
    }
    float difference_of(float weight, int32_t code, float scale, float zero) const {
        return difference_from(*this, weight, code, scale, zero);
    }
};

template <class Decoder>
inline void decode_rows(const Decoder& decoder, const GroupCodes& q, float* out) {
    const int64_t groups = ceil_div(q.cols, q.group);
    const Decoder d = decoder;
    for (int64_t row = 0; row < q.rows; row++) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = row * q.cols + g * q.group, width = least(q.group, q.cols - g * q.group);
            const float scale = q.scales[row * groups + g];
            const float offset = Decoder::kHasZeros ? q.offsets[row * groups + g] : 0.0f;
            const uint8_t* SHARDQ_RESTRICT codes = q.codes + at;
            float* SHARDQ_RESTRICT values = out + at;
            for (int64_t i = 0; i < width; i++) values[i] = d.value(codes[i], scale, offset);
        }
    }
}

template <class T, class Decoder>
inline void error_rows_of(const Decoder& decoder, const Weights& w, const GroupCodes& q, double* stats) {
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    const int64_t groups = ceil_div(q.cols, q.group);
    Piece p;
    for (int64_t row = 0; row < w.rows; row++) {
        RowSums sums = {};
        for (int64_t at = 0; at < w.cols; at += 2 * kPairs) {
            const int64_t width = least(2 * kPairs, w.cols - at), first = row * groups + at / q.group;
            spread_groups(p.scales, at, width, q.group, q.scales + first);
            if constexpr (Decoder::kHasZeros) spread_groups(p.zeros, at, width, q.group, q.offsets + first);
            add_piece<T>(decoder, src + row * w.cols + at, q.codes + row * w.cols + at, width, q.group, p, sums);
        }
        sums.store(stats + row * 3);
    }
}

template <class Decoder>
inline void error_any(const Decoder& decoder, const Weights& w, const GroupCodes& q, double* stats) {
    if (w.dtype == Dtype::BF16) return error_rows_of<Bf16>(decoder, w, q, stats);
    if (w.dtype == Dtype::F16) return error_rows_of<F16>(decoder, w, q, stats);
    return error_rows_of<F32>(decoder, w, q, stats);
}

void decode_scaled(const GroupCodes& q, const Element& element, float* out) {
    if (element.mantissa_bits == 0) return decode_rows(LevelDecoder(element), q, out);
    decode_rows(FloatDecoder(element), q, out);
}

void decode_affine(const GroupCodes& q, DecodingRule rule, float* out) {
    if (rule == DecodingRule::Zero) return decode_rows(AffineDecoder<DecodingRule::Zero>{}, q, out);
    decode_rows(AffineDecoder<DecodingRule::Bias>{}, q, out);
}

void error_scaled(const Weights& w, const GroupCodes& q, const Element& element, double* stats) {
    if (element.mantissa_bits == 0) return error_any(LevelDecoder(element), w, q, stats);
    error_any(FloatDecoder(element), w, q, stats);
}

void error_affine(const Weights& w, const GroupCodes& q, DecodingRule rule, double* stats) {
    if (rule == DecodingRule::Zero) return error_any(AffineDecoder<DecodingRule::Zero>{}, w, q, stats);
    error_any(AffineDecoder<DecodingRule::Bias>{}, w, q, stats);
}
