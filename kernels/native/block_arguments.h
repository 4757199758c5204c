// What the kernels of blocks are passed, and the state that their arithmetic needs. Part of module.cpp.
#pragma once

#include <string>

#include "arguments.h"
#include "blocks.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace {

// Subnormal numbers are numbers, and rounding is to nearest, while this lives: another library of the process may have
// said otherwise for the thread, and then ggml's bytes would be others.
class IeeeFloats {
public:
    IeeeFloats(const IeeeFloats&) = delete;
    IeeeFloats& operator=(const IeeeFloats&) = delete;
#if defined(__x86_64__) || defined(_M_X64)
    IeeeFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~IeeeFloats() { _mm_setcsr(before_); }

private:
    const unsigned before_;
#elif defined(__aarch64__)
    IeeeFloats() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~IeeeFloats() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

private:
    uint64_t before_;
#else
    IeeeFloats() {}
#endif
};

const shardq::BlockFormat& parse_block_type(const std::string& name) {
    std::string names;
    for (const shardq::BlockFormat& format : shardq::kBlockFormats) {
        if (name == format.name) return format;
        names += (names.empty() ? "" : ", ") + std::string(format.name);
    }
    throw nb::value_error(("block_type: expected one of " + names + ", found " + name).c_str());
}

void expect_whole_blocks(const Array& array, const char* unit, int64_t size, const shardq::BlockFormat& format) {
    array.expect_filled();
    if (array.size(1) % size == 0) return;
    array.fail("expected rows of whole " + std::string(format.name) + " blocks of " + std::to_string(size) + " " +
               unit + ", found " + std::to_string(array.size(1)));
}

struct Quantized {
    const shardq::BlockFormat& format;
    const Dtype dtype;
    const Array src, out;
    const Importance importance;

    Quantized(nb::handle source, const std::string& dtype_name, const std::string& type, nb::handle weights,
              nb::handle target)
        : format(parse_block_type(type)),
          dtype(parse_dtype(dtype_name)),
          src(source, "src", raw_item(dtype), 2, kRead),
          out(target, "out", kU8, 2, kWrite),
          importance(weights, src.size(1)) {
        expect_whole_blocks(src, "columns", format.cols, format);
        out.expect(src.size(0), src.size(1) / format.cols * format.size_bytes);
    }

    Weights weights() const { return {src.data<void>(), dtype, src.size(0), src.size(1)}; }
};

struct Dequantized {
    const shardq::BlockFormat& format;
    const Array in, out;

    Dequantized(nb::handle source, const std::string& type, nb::handle target)
        : format(parse_block_type(type)), in(source, "blocks", kU8, 2, kRead), out(target, "out", kF32, 2, kWrite) {
        expect_whole_blocks(in, "bytes", format.size_bytes, format);
        out.expect(in.size(0), in.size(1) / format.size_bytes * format.cols);
    }

    shardq::Blocks blocks() const { return {in.data<uint8_t>(), in.size(0) * (in.size(1) / format.size_bytes)}; }
};

}  // namespace
