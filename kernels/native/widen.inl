// Raw weights to fp32, bit for bit: a NaN keeps its sign, payload and quiet bit. Part of bodies.inl.

template <class T>
inline void widen_all(const Weights& w, float* out_values) {
    const auto* SHARDQ_RESTRICT src = static_cast<const typename T::Raw*>(w.data);
    unsigned char* SHARDQ_RESTRICT out = reinterpret_cast<unsigned char*>(out_values);
    const int64_t count = w.rows * w.cols;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = T::widen_bits(src[i]);  // never a float on the way: some processors would quiet a NaN
        std::memcpy(out + 4 * i, &bits, sizeof bits);
    }
}

void widen(const Weights& w, float* out) {
    if (w.dtype == Dtype::BF16) return widen_all<Bf16>(w, out);
    if (w.dtype == Dtype::F16) return widen_all<F16>(w, out);
    return widen_all<F32>(w, out);
}
