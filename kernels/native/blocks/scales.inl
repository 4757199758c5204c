// ggml's searches for the scale of a super-block's scales under importance: 8 or 16 numbers, one after the other
// (make_qp_quants and make_qx_quants of ggml 0.25.3). Part of bodies.inl.

// The scale of codes from 0 to `top` for x, none of them negative. The first codes are not held to `top`, as in ggml.
inline float scale_of_positive(const float* x, const float* w, int count, int top, int* codes) {
    float most = 0.0f;
    for (int i = 0; i < count; i++) most = most > x[i] ? most : x[i];
    for (int i = 0; i < count; i++) codes[i] = 0;
    if (most < kTiny) return 0.0f;
    const auto highest = static_cast<float>(top);
    float inverse = highest / most, best = 0.0f;
    const float first_scale = 1.0f / inverse;
    for (int i = 0; i < count; i++) {
        const auto level = static_cast<float>(static_cast<uint8_t>(nearest_int(inverse * x[i])));
        const float difference = x[i] - first_scale * level;
        best += w[i] * difference * difference;
    }
    for (int k = -4; k <= 4; k++) {
        if (k == 0) continue;
        const float tried = (0.1f * static_cast<float>(k) + highest) / most, scale = 1.0f / tried;
        float error = 0.0f;
        for (int i = 0; i < count; i++) {
            const int code = nearest_int(tried * x[i]);
            const float difference = x[i] - scale * static_cast<float>(code < top ? code : top);
            error += w[i] * difference * difference;
        }
        inverse = error < best ? tried : inverse;
        best = error < best ? error : best;
    }
    float product = 0.0f, square = 0.0f;
    for (int i = 0; i < count; i++) {
        const int code = nearest_int(inverse * x[i]), held = code < top ? code : top;
        codes[i] = static_cast<uint8_t>(held);
        product += w[i] * x[i] * static_cast<float>(held);
        square += w[i] * static_cast<float>(held) * static_cast<float>(held);
    }
    for (int pass = 0; pass < 5; pass++) {
        bool changed = false;
        for (int i = 0; i < count; i++) {
            const auto level = static_cast<float>(codes[i]);
            float less_product = product - w[i] * x[i] * level, less_square = square - w[i] * level * level;
            if (!(less_product > 0.0f && less_square > 0.0f)) continue;
            const int code = nearest_int(x[i] * less_square / less_product), held = code < top ? code : top;
            if (held == codes[i]) continue;
            less_product += w[i] * x[i] * static_cast<float>(held);
            less_square += w[i] * static_cast<float>(held) * static_cast<float>(held);
            if (!(less_product * less_product * square > product * product * less_square)) continue;
            codes[i] = static_cast<uint8_t>(held);
            product = less_product;
            square = less_square;
            changed = true;
        }
        if (!changed) break;
    }
    return square > 0.0f ? product / square : 0.0f;
}

// The scale of codes from -half to half - 1; `codes` are plus half, or 0 where all x are tiny.
inline float scale_of_signed(const float* x, const float* w, int count, int half, int* codes) {
    for (int i = 0; i < count; i++) codes[i] = 0;
    float leader = 0.0f, most = 0.0f;
    for (int i = 0; i < count; i++) {
        const float size = float_of_bits(static_cast<uint32_t>(magnitude_bits(x[i])));
        leader = size > most ? x[i] : leader;
        most = size > most ? size : most;
    }
    if (most < kTiny) return 0.0f;
    const auto highest = static_cast<float>(half);
    float scale = 0.0f, best = 0.0f, inverse = 0.0f;
    for (int n = 0; n < 19; n++) {  // the leader's own first, then the others
        const int k = n == 0 ? 0 : n <= 9 ? n - 10 : n - 9;
        const float tried = n == 0 ? -highest / leader : -(highest + 0.1f * static_cast<float>(k)) / leader;
        float product = 0.0f, square = 0.0f;
        for (int i = 0; i < count; i++) {
            const auto level = static_cast<float>(clamp_int(nearest_int(tried * x[i]), -half, half - 1));
            product += w[i] * x[i] * level;
            square += w[i] * level * level;
        }
        if (n > 0 && !(square > 0.0f && product * product > best * square)) continue;
        scale = n > 0 || square != 0.0f ? product / square : 0.0f;
        best = scale * product;
        inverse = tried;
    }
    for (int i = 0; i < count; i++) codes[i] = clamp_int(nearest_int(inverse * x[i]), -half, half - 1) + half;
    return scale;
}
