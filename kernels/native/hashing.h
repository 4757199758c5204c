// SHA-256 of several streams, as Python calls it. Part of module.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <vector>

#include "array.h"
#include "sha256.h"

namespace {

// Takes equally many whole blocks of each of `data` into the state of the same place.
void hash_blocks(nb::list states, nb::list data) {
    const size_t count = nb::len(states);
    if (count < 1 || count > shardq::kHashedTogether || nb::len(data) != count) {
        throw nb::value_error("states and data: expected as many of one as of the other, 1 to 3");
    }
    std::vector<std::unique_ptr<Array>> arrays;
    std::vector<shardq::HashedStream> streams;
    int64_t size_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        arrays.push_back(std::make_unique<Array>(states[i], "states", kU32, 1, kWrite));
        const Array& state = *arrays.back();
        arrays.push_back(std::make_unique<Array>(data[i], "data", kU8, 1, kRead));
        const Array& bytes = *arrays.back();
        if (state.size(0) != 8) state.fail("expected eight words");
        if (i == 0) size_bytes = bytes.size(0);
        if (bytes.size(0) != size_bytes || size_bytes % 64 != 0) bytes.fail("expected equally many whole blocks of 64");
        streams.push_back({state.data<uint32_t>(), bytes.data<const uint8_t>()});
    }
    const nb::gil_scoped_release unlocked;
    shardq::sha256(streams.data(), static_cast<int>(count), static_cast<size_t>(size_bytes / 64));
}

}  // namespace
