// SHA-256 (FIPS 180-4) with the processor's own instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shardq {

struct HashedStream {
    uint32_t* state;  // eight words
    const uint8_t* data;
};

// A round waits for the one before it, which leaves the processor room for other streams: two take 1.4 times as long
// as one, three 1.7 times (Zen 5), more take what they take apart.
constexpr int kHashedTogether = 3;

// True where the processor has these instructions; what follows must not be called elsewhere.
bool has_sha256();

// Takes `blocks` blocks of 64 bytes of each of up to kHashedTogether streams into its state.
void sha256(const HashedStream* streams, int count, size_t blocks);

}  // namespace shardq
