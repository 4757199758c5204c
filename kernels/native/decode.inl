// Values of scaled and affine codes, and the error that they make. Part of bodies.inl.

// Decoders as IntDecoder of error.inl; `zero` is the offset.
template <class Decoder>
inline float difference_from(const Decoder& decoder, float weight, int32_t code, float scale, float zero) {
    return weight - decoder.value(code, scale, zero);
}

struct LevelDecoder {
    static constexpr bool kHasZeros = false;
    int32_t half;

    explicit LevelDecoder(int bits) : half(1 << (bits - 1)) {}

    float value(int32_t code, float scale, float) const { return scale * static_cast<float>(code - half); }
    float difference_of(float weight, int32_t code, float scale, float zero) const {
        return difference_from(*this, weight, code, scale, zero);
    }
};

// The fields of a float's code are moved to those of an fp32 number. Where the exponent is 0, fraction * 2^E with the
// smallest E is (1 + fraction) * 2^E - 2^E, exactly.
template <class E>
struct FloatDecoder {
    static constexpr bool kHasZeros = false;

    float value(int32_t code, float scale, float) const {
        const int32_t moved = static_cast<int32_t>((static_cast<uint32_t>(code) & (E::kSign - 1u)) << E::kShift);
        const float one = float_of_bits(E::kSmallestExponent);
        const uint32_t fields = static_cast<uint32_t>(moved);
        const uint32_t small = bits_of_float(float_of_bits(fields + E::kSmallestExponent) - one);
        uint32_t bits = moved < 0x800000 ? small : fields + E::kRebias;
        // By the sign of a difference: of a second choice compilers make three comparisons.
        constexpr auto kLargest = static_cast<int32_t>(E::kLargestCode << E::kShift);
        if (E::kHasSpecials) bits |= static_cast<uint32_t>((kLargest - moved) >> 31) & 0x7f800000u;
        return scale * float_of_bits(bits | ((static_cast<uint32_t>(code) << E::kSignShift) & 0x80000000u));
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
inline void decode_columns(const Decoder& decoder, const uint8_t* SHARDQ_RESTRICT codes, int64_t cols,
                           const Spread& scales, const Spread& offsets, float* SHARDQ_RESTRICT out) {
    const Decoder d = decoder;
    for (int64_t i = 0; i < cols; i++) {
        out[i] = d.value(codes[i], scales.even[i], Decoder::kHasZeros ? offsets.even[i] : 0.0f);
    }
}

// Here the columns themselves are spread: as the even ones of twice as many.
template <class Decoder>
inline void decode_rows(const Decoder& decoder, const GroupCodes& q, float* out) {
    const int64_t groups = ceil_div(q.cols, q.group);
    Spread scales, offsets;
    for (int64_t row = 0; row < q.rows; row++) {
        for (int64_t at = 0; at < q.cols; at += kPairs) {
            const int64_t width = least(kPairs, q.cols - at), first = row * groups + at / q.group;
            spread_groups(scales, 2 * at, 2 * width, 2 * q.group, q.scales + first);
            if constexpr (Decoder::kHasZeros) {
                spread_groups(offsets, 2 * at, 2 * width, 2 * q.group, q.offsets + first);
            }
            const int64_t from = row * q.cols + at;
            decode_columns(decoder, q.codes + from, width, scales, offsets, out + from);
        }
    }
}

// Nearly all of FP8 sources.
inline void decode_e4m3_rows(const GroupCodes& q, float* out) {
    const FloatDecoder<E4M3FN> decoder{};
#ifdef SHARDQ_DECODE_E4M3
    if (q.group >= 32) {
        const int64_t groups = ceil_div(q.cols, q.group);
        for (int64_t row = 0; row < q.rows; row++) {
            for (int64_t at = 0; at < q.cols; at += q.group) {
                const int64_t width = least(q.group, q.cols - at), from = row * q.cols + at;
                const float scale = q.scales[row * groups + at / q.group];
                int64_t i = decode_e4m3(q.codes + from, width, scale, out + from);
                for (; i < width; i++) out[from + i] = decoder.value(q.codes[from + i], scale, 0.0f);
            }
        }
        return;
    }
#endif
    decode_rows(decoder, q, out);
}

template <class T, class Decoder>
inline void error_rows_of(const Decoder& decoder, const Weights& w, const GroupCodes& q, Ends ends, double* stats) {
    const auto* src = static_cast<const typename T::Raw*>(w.data);
    const int64_t groups = ceil_div(q.cols, q.group);
    Piece p;
    for (int64_t row = 0; row < w.rows; row++) {
        const auto* from = src + row * w.cols;
        const uint8_t* codes = q.codes + row * w.cols;
        const float* scales = q.scales + row * groups;
        const float* offsets = Decoder::kHasZeros ? q.offsets + row * groups : nullptr;
        RowSums sums = {};
        for (int64_t at = 0; at < w.cols; at += 2 * kPairs) {
            const int64_t width = least(2 * kPairs, w.cols - at), first = at / q.group;
            spread_groups(p.scales, at, width, q.group, scales + first);
            if constexpr (Decoder::kHasZeros) spread_groups(p.zeros, at, width, q.group, offsets + first);
            add_piece<T>(decoder, from + at, codes + at, width, q.group, p, sums);
        }
        sums.at_ends = count_ends(codes, w.cols, ends);
        sums.zeroed = count_zeroed<T>(decoder, from, codes, w.cols, q.group, scales, offsets, ends.mask);
        sums.store(stats + row * kFigures);
    }
}

template <class Decoder>
inline void error_any(const Decoder& decoder, const Weights& w, const GroupCodes& q, Ends ends, double* stats) {
    if (w.dtype == Dtype::BF16) return error_rows_of<Bf16>(decoder, w, q, ends, stats);
    if (w.dtype == Dtype::F16) return error_rows_of<F16>(decoder, w, q, ends, stats);
    return error_rows_of<F32>(decoder, w, q, ends, stats);
}

template <class E>
inline void error_float(const Weights& w, const GroupCodes& q, double* stats) {
    error_any(FloatDecoder<E>{}, w, q, ends_of_float<E>(), stats);
}

void decode_scaled(const GroupCodes& q, const Element& element, float* out) {
    switch (element.kind) {
        case ElementKind::Int: return decode_rows(LevelDecoder(element.bits), q, out);
        case ElementKind::E0M3: return decode_rows(FloatDecoder<E0M3>{}, q, out);
        case ElementKind::E2M1: return decode_rows(FloatDecoder<E2M1>{}, q, out);
        case ElementKind::E2M3: return decode_rows(FloatDecoder<E2M3>{}, q, out);
        case ElementKind::E3M2: return decode_rows(FloatDecoder<E3M2>{}, q, out);
        case ElementKind::E4M3FN: return decode_e4m3_rows(q, out);
        case ElementKind::E5M2: return decode_rows(FloatDecoder<E5M2>{}, q, out);
    }
}

void decode_affine(const GroupCodes& q, DecodingRule rule, float* out) {
    if (rule == DecodingRule::Zero) return decode_rows(AffineDecoder<DecodingRule::Zero>{}, q, out);
    decode_rows(AffineDecoder<DecodingRule::Bias>{}, q, out);
}

void error_scaled(const Weights& w, const GroupCodes& q, const Element& element, double* stats) {
    switch (element.kind) {
        case ElementKind::Int:
            return error_any(LevelDecoder(element.bits), w, q, ends_of_bits(element.bits), stats);
        case ElementKind::E0M3: return error_float<E0M3>(w, q, stats);
        case ElementKind::E2M1: return error_float<E2M1>(w, q, stats);
        case ElementKind::E2M3: return error_float<E2M3>(w, q, stats);
        case ElementKind::E3M2: return error_float<E3M2>(w, q, stats);
        case ElementKind::E4M3FN: return error_float<E4M3FN>(w, q, stats);
        case ElementKind::E5M2: return error_float<E5M2>(w, q, stats);
    }
}

void error_affine(const Weights& w, const GroupCodes& q, int bits, DecodingRule rule, double* stats) {
    const Ends ends = ends_of_bits(bits);
    if (rule == DecodingRule::Zero) return error_any(AffineDecoder<DecodingRule::Zero>{}, w, q, ends, stats);
    error_any(AffineDecoder<DecodingRule::Bias>{}, w, q, ends, stats);
}
