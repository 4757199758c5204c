// ggml's search for the scales of Q3_K, a sub-block in each lane (make_q3_quants of ggml 0.25.3). Part of bodies.inl;
// contract_blocks.py has the formulas.
//
// A sub-block that a pass leaves as it was is left by all later ones. Of weights as layers have them the first pass
// leaves four of five: the others are packed side by side for the next.

// What make_q3_quants keeps, by lanes as Tile::turned is.
struct alignas(64) Descents {
    float levels[kTileCols], product[kTileSubs], square[kTileSubs];
    int32_t changed[kTileSubs];  // by the last pass
};

// Those that go on, as many as whole vectors hold.
struct alignas(64) DescentsLeft {
    float x[kTileCols];
    Descents d;
    int origin[kTileSubs];  // the lanes that they had
    int count;
};

template <int kCols>
inline int place_of(int lane, int column) {
    return (lane / kStrip * kCols + column) * kStrip + lane % kStrip;
}

// The leader's levels.
template <int kCols, int kHalf>
inline void begin_descents(const float* x, int at, Descents& d) {
    const float* from = x + at * kCols;
    const Reals inverse = -static_cast<float>(kHalf) / lane_leader<kCols>(from);
    Reals product = {}, square = {};
    for (int i = 0; i < kCols; i++) {
        const Reals value = load_lanes(from + i * kStrip), w = value * value;
        const Reals level = nearest_lanes(inverse * value, -kHalf, kHalf - 1);
        store_lanes(d.levels + at * kCols + i * kStrip, level);
        product += w * value * level;
        square += w * level * level;
    }
    store_lanes(d.product + at, product);
    store_lanes(d.square + at, square);
}

// One pass over all levels of kVectors vectors: each is changed where that makes the error smaller.
template <int kCols, int kHalf, int kVectors>
inline void descend_once(const float* x, int at, Descents& d) {
    Reals product[kVectors], square[kVectors];
    Ints changed[kVectors];
    for (int k = 0; k < kVectors; k++) {
        product[k] = load_lanes(d.product + at + k * kStrip);
        square[k] = load_lanes(d.square + at + k * kStrip);
        changed[k] = Ints{};
    }
    for (int i = 0; i < kCols; i++) {
        for (int k = 0; k < kVectors; k++) {
            const int here = at * kCols + (k * kCols + i) * kStrip;
            const Reals value = load_lanes(x + here), w = value * value, wx = w * value;
            const Reals level = load_lanes(d.levels + here);
            const Reals less_product = product[k] - wx * level, less_square = square[k] - w * level * level;
            const Reals other = nearest_lanes(value * less_square / less_product, -kHalf, kHalf - 1);
            const Reals more_product = less_product + wx * other, more_square = less_square + w * other * other;
            const auto better = (less_product > 0.0f) & (other != level) & (more_square > 0.0f) &
                                (more_product * more_product * square[k] > product[k] * product[k] * more_square);
            store_lanes(d.levels + here, better ? other : level);
            product[k] = better ? more_product : product[k];
            square[k] = better ? more_square : square[k];
            changed[k] = better ? Ints{} + 1 : changed[k];
        }
    }
    for (int k = 0; k < kVectors; k++) {
        store_lanes(d.product + at + k * kStrip, product[k]);
        store_lanes(d.square + at + k * kStrip, square[k]);
        std::memcpy(d.changed + at + k * kStrip, &changed[k], sizeof changed[k]);
    }
}

// A vector waits for its own divisions: several go side by side.
template <int kCols, int kHalf>
inline void descend_all(const float* x, int lanes, Descents& d) {
    int at = 0;
    for (; at + kDescents * kStrip <= lanes; at += kDescents * kStrip) {
        descend_once<kCols, kHalf, kDescents>(x, at, d);
    }
    for (; at < lanes; at += kStrip) descend_once<kCols, kHalf, 1>(x, at, d);
}

template <int kCols>
inline void move_descent(const float* x, const Descents& from, int lane, DescentsLeft& left, int to) {
    for (int i = 0; i < kCols; i++) {
        left.x[place_of<kCols>(to, i)] = x[place_of<kCols>(lane, i)];
        left.d.levels[place_of<kCols>(to, i)] = from.levels[place_of<kCols>(lane, i)];
    }
    left.d.product[to] = from.product[lane];
    left.d.square[to] = from.square[lane];
}

// Those of `count` lanes that changed; `origin` may be that of `left`.
template <int kCols>
inline void keep_changed(const float* x, const Descents& d, int count, const int* origin, DescentsLeft& left) {
    int lanes[kTileSubs + 1], kept = 0;
    for (int lane = 0; lane < count; lane++) {  // no branch: which ones change is not to be guessed
        lanes[kept] = lane;
        kept += d.changed[lane];
    }
    for (int to = 0; to < kept; to++) {
        left.origin[to] = origin == nullptr ? lanes[to] : origin[lanes[to]];
        move_descent<kCols>(x, d, lanes[to], left, to);
    }
    left.count = kept;
    for (int to = kept; to % kStrip != 0; to++) move_descent<kCols>(left.x, left.d, kept - 1, left, to);
}

template <int kCols>
inline void give_back(const DescentsLeft& left, Descents& d) {
    for (int lane = 0; lane < left.count; lane++) {
        const int to = left.origin[lane];
        for (int i = 0; i < kCols; i++) d.levels[place_of<kCols>(to, i)] = left.d.levels[place_of<kCols>(lane, i)];
        d.product[to] = left.d.product[lane];
        d.square[to] = left.d.square[lane];
    }
}

// make_q3_quants of the first `count` lanes, at most five passes; `scales` by lane.
template <int kCols, int kHalf>
inline void descend_rays(const float* x, int count, Descents& d, float* scales) {
    const int lanes = static_cast<int>(ceil_div(count, kStrip)) * kStrip;
    for (int at = 0; at < lanes; at += kStrip) begin_descents<kCols, kHalf>(x, at, d);
    descend_all<kCols, kHalf>(x, lanes, d);
    DescentsLeft left;
    keep_changed<kCols>(x, d, count, nullptr, left);
    for (int pass = 1; pass < 5 && left.count > 0; pass++) {
        descend_all<kCols, kHalf>(left.x, static_cast<int>(ceil_div(left.count, kStrip)) * kStrip, left.d);
        give_back<kCols>(left, d);
        keep_changed<kCols>(left.x, left.d, left.count, left.origin, left);
    }
    for (int at = 0; at < lanes; at += kStrip) {
        const Reals product = load_lanes(d.product + at), square = load_lanes(d.square + at);
        store_lanes(scales + at, square > 0.0f ? product / square : Reals{});
    }
}
