// Codes to and from a little-endian bit stream, least significant bit first. Part of bodies.inl.
//
// Eight codes are one 64-bit word of bytes and become `bits` bytes: neighbours are joined three times, bytes to pairs,
// pairs to quarters, quarters to the whole.

// Every lane of `lane` bits keeps its lowest `kept` bits.
constexpr uint64_t lane_mask(int lane, int kept) {
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += lane) mask |= ((uint64_t{1} << kept) - 1) << at;
    return mask;
}

template <int kBits>
inline uint64_t join_eight(uint64_t codes) {
    constexpr uint64_t kOne = lane_mask(16, kBits), kTwo = lane_mask(32, 2 * kBits), kFour = lane_mask(64, 4 * kBits);
    uint64_t x = (codes & kOne) | ((codes >> (8 - kBits)) & (kOne << kBits));
    x = (x & kTwo) | ((x >> (16 - 2 * kBits)) & (kTwo << (2 * kBits)));
    return (x & kFour) | ((x >> (32 - 4 * kBits)) & (kFour << (4 * kBits)));
}

template <int kBits>
inline uint64_t split_eight(uint64_t stream) {
    constexpr uint64_t kOne = lane_mask(16, kBits), kTwo = lane_mask(32, 2 * kBits), kFour = lane_mask(64, 4 * kBits);
    uint64_t x = (stream & kFour) | ((stream << (32 - 4 * kBits)) & (kFour << 32));
    x = (x & kTwo) | ((x << (16 - 2 * kBits)) & (kTwo << 16));
    return (x & kOne) | ((x << (8 - kBits)) & (kOne << 8));
}

// How many of `eights` strides of `bits` bytes may be touched as 8 bytes without leaving the row.
inline int64_t whole_words(int64_t eights, int bits) {
    const int64_t size_bytes = eights * bits;
    return size_bytes < 8 ? 0 : (size_bytes - 8) / bits + 1;
}

template <int kBits>
inline void pack_row(const uint8_t* SHARDQ_RESTRICT codes, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    const int64_t eights = cols / 8, whole = whole_words(eights, kBits);
    for (int64_t i = 0; i < whole; i++) {
        uint64_t bytes;
        std::memcpy(&bytes, codes + 8 * i, sizeof bytes);
        const uint64_t joined = join_eight<kBits>(bytes);
        std::memcpy(out + kBits * i, &joined, sizeof joined);
    }
    for (int64_t i = whole; i < eights; i++) {
        uint64_t bytes;
        std::memcpy(&bytes, codes + 8 * i, sizeof bytes);
        const uint64_t joined = join_eight<kBits>(bytes);
        std::memcpy(out + kBits * i, &joined, kBits);
    }
}

// Both powers of two join within 16 bits, which compilers turn into wide shifts and a narrowing.
template <>
inline void pack_row<4>(const uint8_t* SHARDQ_RESTRICT codes, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    for (int64_t i = 0; i < cols / 8 * 4; i++) {
        uint16_t pair;
        std::memcpy(&pair, codes + 2 * i, sizeof pair);
        out[i] = static_cast<uint8_t>((pair & 0x0fu) | (pair >> 4 & 0xf0u));
    }
}

template <>
inline void pack_row<2>(const uint8_t* SHARDQ_RESTRICT codes, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    for (int64_t i = 0; i < cols / 8 * 2; i++) {
        uint32_t four;
        std::memcpy(&four, codes + 4 * i, sizeof four);
        four &= 0x03030303u;
        four |= four >> 6;
        out[i] = static_cast<uint8_t>((four & 0x0fu) | (four >> 12 & 0xf0u));
    }
}

template <>
inline void pack_row<8>(const uint8_t* SHARDQ_RESTRICT codes, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    std::memcpy(out, codes, static_cast<size_t>(cols / 8 * 8));
}

template <int kBits>
inline void unpack_row(const uint8_t* SHARDQ_RESTRICT stream, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    const int64_t eights = cols / 8, whole = whole_words(eights, kBits);
    for (int64_t i = 0; i < whole; i++) {
        uint64_t joined;
        std::memcpy(&joined, stream + kBits * i, sizeof joined);
        const uint64_t bytes = split_eight<kBits>(joined);
        std::memcpy(out + 8 * i, &bytes, sizeof bytes);
    }
    for (int64_t i = whole; i < eights; i++) {
        uint64_t joined = 0;
        std::memcpy(&joined, stream + kBits * i, kBits);
        const uint64_t bytes = split_eight<kBits>(joined);
        std::memcpy(out + 8 * i, &bytes, sizeof bytes);
    }
}

template <>
inline void unpack_row<4>(const uint8_t* SHARDQ_RESTRICT stream, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    for (int64_t i = 0; i < cols / 8 * 4; i++) {
        const uint16_t pair = static_cast<uint16_t>((stream[i] & 0x0fu) | (stream[i] & 0xf0u) << 4);
        std::memcpy(out + 2 * i, &pair, sizeof pair);
    }
}

template <>
inline void unpack_row<8>(const uint8_t* SHARDQ_RESTRICT stream, int64_t cols, uint8_t* SHARDQ_RESTRICT out) {
    std::memcpy(out, stream, static_cast<size_t>(cols / 8 * 8));
}

// A whole stream, with zeros behind its last code.
template <int kBits>
inline void pack_stream(const uint8_t* codes, int64_t cols, uint32_t* words) {
    const int64_t written = cols / 8 * kBits, rest = cols % 8;
    auto* bytes = reinterpret_cast<uint8_t*>(words);
    pack_row<kBits>(codes, cols, bytes);
    std::memset(bytes + written, 0, static_cast<size_t>(4 * ceil_div(cols * kBits, 32) - written));
    if (rest == 0) return;
    uint64_t last = 0;
    std::memcpy(&last, codes + cols - rest, static_cast<size_t>(rest));
    const uint64_t joined = join_eight<kBits>(last);
    std::memcpy(bytes + written, &joined, static_cast<size_t>(ceil_div(rest * kBits, 8)));
}

template <int kBits>
inline void pack_rows(const uint8_t* codes, int64_t rows, int64_t cols, uint32_t* out) {
    const int64_t words = ceil_div(cols * kBits, 32);
    for (int64_t row = 0; row < rows; row++) pack_stream<kBits>(codes + row * cols, cols, out + row * words);
}

template <int kBits>
inline void unpack_rows(const uint32_t* in, int64_t rows, int64_t cols, uint8_t* out) {
    const int64_t words = ceil_div(cols * kBits, 32), rest = cols % 8;
    for (int64_t row = 0; row < rows; row++) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(in + row * words);
        unpack_row<kBits>(bytes, cols, out + row * cols);
        if (rest == 0) continue;
        uint64_t last = 0;
        std::memcpy(&last, bytes + cols / 8 * kBits, static_cast<size_t>(ceil_div(rest * kBits, 8)));
        const uint64_t split = split_eight<kBits>(last);
        std::memcpy(out + row * cols + cols - rest, &split, static_cast<size_t>(rest));
    }
}

void pack_bits(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* out) {
    switch (bits) {
        case 2: return pack_rows<2>(codes, rows, cols, out);
        case 3: return pack_rows<3>(codes, rows, cols, out);
        case 4: return pack_rows<4>(codes, rows, cols, out);
        case 5: return pack_rows<5>(codes, rows, cols, out);
        case 6: return pack_rows<6>(codes, rows, cols, out);
        case 7: return pack_rows<7>(codes, rows, cols, out);
        default: return pack_rows<8>(codes, rows, cols, out);
    }
}

void unpack_bits(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* out) {
    switch (bits) {
        case 2: return unpack_rows<2>(words, rows, cols, out);
        case 3: return unpack_rows<3>(words, rows, cols, out);
        case 4: return unpack_rows<4>(words, rows, cols, out);
        case 5: return unpack_rows<5>(words, rows, cols, out);
        case 6: return unpack_rows<6>(words, rows, cols, out);
        case 7: return unpack_rows<7>(words, rows, cols, out);
        default: return unpack_rows<8>(words, rows, cols, out);
    }
}
