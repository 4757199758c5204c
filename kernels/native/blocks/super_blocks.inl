// What the super-blocks of 256 columns share, whose scales are codes themselves. Part of bodies.inl.
//
// A format says: its columns, those of a sub-block, the least magnitude for which there is a search, what the search
// finds, how a tile is searched, and how block `block` of it is put.

inline float leader_of_scales(const float* x, int count) {
    float leader = 0.0f, most = 0.0f;
    for (int i = 0; i < count; i++) {
        const float size = float_of_bits(static_cast<uint32_t>(magnitude_bits(x[i])));
        leader = size > most ? x[i] : leader;
        most = size > most ? size : most;
    }
    return leader;
}

// Importance times sqrt(of the super-block's `factor` * mean of squares + x^2), and what a sub-block weighs.
inline void weigh_super_blocks(int sub_cols, float factor, Tile& t) {
    for (int at = 0; at < kTileCols; at += 256) {
        const float mean = factor * sum_of_squares(t.x + at, 256) / 256.0f;
        weigh_block(t.x + at, t.importance + at, mean, 256, t.weights + at);
    }
    turn_subs(t, t.weights, sub_cols, t.turned_weights);
}

inline void sum_weights(const float* weights, int sub_cols, int subs, float* sums) {
    for (int s = 0; s < subs; s++) {
        sums[s] = 0.0f;
        for (int i = 0; i < sub_cols; i++) sums[s] += weights[s * sub_cols + i];
    }
}
