// A 64-bit digest that finds torn and misplaced writes; not cryptographic. Part of bodies.inl.
//
// contract.py specifies it. Each step is a bijection of the lane for fixed data and of the data for a fixed
// lane, so a change within one 8-byte word always changes the digest.

constexpr int kDigestLanes = 16;
constexpr uint64_t kDigestFactor = 0x9e3779b97f4a7c15u;

inline void digest_blocks(const uint8_t* SHARDQ_RESTRICT data, int64_t blocks, uint64_t* SHARDQ_RESTRICT lanes) {
    uint64_t state[kDigestLanes];  // a copy that stays in registers
    std::memcpy(state, lanes, sizeof state);
    for (int64_t k = 0; k < blocks; k++) {
        for (int i = 0; i < kDigestLanes; i++) {
            uint64_t word;
            std::memcpy(&word, data + 8 * (k * kDigestLanes + i), sizeof word);
            const uint64_t sum = state[i] + word;
            state[i] = (sum ^ (sum >> 29)) * kDigestFactor;
        }
    }
    std::memcpy(lanes, state, sizeof state);
}

uint64_t checksum(const uint8_t* data, int64_t size_bytes) {
    constexpr int64_t kBlockBytes = 8 * kDigestLanes;
    uint64_t lanes[kDigestLanes];
    for (int i = 0; i < kDigestLanes; i++) lanes[i] = static_cast<uint64_t>(i + 1) * kDigestFactor;
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
