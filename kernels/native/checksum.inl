// A 64-bit digest that finds torn and misplaced writes; not cryptographic. Part of bodies.inl.
//
// kernels/__init__.py specifies it. Each step is a bijection of the lane for fixed data and of the data for a fixed lane,
// so a change within one 8-byte word always changes the digest.

constexpr int kDigestLanes = 16;
constexpr uint64_t kDigestFactor = 0x9e3779b1u;  // odd and below 2^32: two 32-bit multiplications make the 64-bit product

inline uint64_t digest_step(uint64_t lane, uint64_t word) {
    const uint64_t sum = lane + word;
    const uint64_t mixed = sum ^ (sum >> 29);
    return (mixed & 0xffffffffu) * kDigestFactor + (((mixed >> 32) * kDigestFactor) << 32);
}

inline void digest_blocks(const uint8_t* SHARDQ_RESTRICT data, int64_t blocks, uint64_t* SHARDQ_RESTRICT lanes) {
    uint64_t state[kDigestLanes];
    std::memcpy(state, lanes, sizeof state);
    for (int64_t k = 0; k < blocks; k++) {
        uint64_t words[kDigestLanes];
        std::memcpy(words, data + k * static_cast<int64_t>(sizeof words), sizeof words);
        for (int i = 0; i < kDigestLanes; i++) state[i] = digest_step(state[i], words[i]);
    }
    std::memcpy(lanes, state, sizeof state);
}

uint64_t checksum(const uint8_t* data, int64_t size_bytes) {
    constexpr int64_t kBlockBytes = 8 * kDigestLanes;
    uint64_t lanes[kDigestLanes];
    for (int i = 0; i < kDigestLanes; i++) lanes[i] = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    const int64_t blocks = size_bytes / kBlockBytes, rest = size_bytes % kBlockBytes;
    digest_blocks(data, blocks, lanes);
    if (rest != 0) {
        uint8_t last[kBlockBytes] = {};
        std::memcpy(last, data + blocks * kBlockBytes, static_cast<size_t>(rest));
        digest_blocks(last, 1, lanes);
    }
    uint64_t digest = static_cast<uint64_t>(size_bytes);
    for (int i = 0; i < kDigestLanes; i++) {
        digest = (digest ^ lanes[i]) * 0xff51afd7ed558ccdu;
        digest ^= digest >> 32;
    }
    return digest;
}
