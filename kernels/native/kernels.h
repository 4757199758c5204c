// The one list of kernels: what every instruction set implements, and the table that holds them.
//
// A body is a plain C++ loop in one of the *.inl files, compiled once per instruction set (isa/*.cpp). Every set
// returns the same bits. Adding a kernel: one body, one line here, one in bodies.inl, one binding in module.cpp and
// _native.pyi, one paragraph in contract.py (or contract_blocks.py), one function in reference/.
//
// All matrices are row-major and contiguous; sizes were checked by module.cpp. Inputs and outputs never overlap.
#pragma once

#include <cstdint>

#include "blocks.h"

#if !defined(_WIN32) && !defined(_WIN64)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shardq reads and writes little-endian streams in place");
#endif

namespace shardq {

enum class Dtype : int { BF16, F16, F32 };

// A matrix of raw weights: BF16 and F16 as their 16 bits, F32 as float.
struct Weights {
    const void* data;
    Dtype dtype;
    int64_t rows, cols;
};

// Integer codes with one scale and zero point per group of columns; the last group of a row may be short.
struct IntCodes {
    const uint8_t* codes;  // [rows, cols]
    const float* scales;   // [rows, groups]
    const uint8_t* zeros;  // [rows, groups]
    int64_t rows, cols, group;
};

constexpr int kFigures = 6;  // of each row: what an error kernel writes to stats

struct IntScheme {
    int bits;  // 2..8
    int64_t group;
    bool symmetric;
};

// What a code of a symmetric scheme stands for; contract.py says it.
enum class ElementKind : int { Int, E0M3, E2M1, E2M3, E3M2, E4M3FN, E5M2 };

struct Element {
    const char* name;
    ElementKind kind;
    int bits;
};

enum class EncodingRule : int { RoundAdd, AddRound, Subtract };
enum class DecodingRule : int { Zero, Bias };

// Codes with one fp32 scale per group of columns, and one offset if they are affine.
struct GroupCodes {
    const uint8_t* codes;   // [rows, cols]
    const float* scales;    // [rows, groups]
    const float* offsets;   // [rows, groups], or null
    int64_t rows, cols, group;
};

// How much a squared error counts: the importance of its column (null: 1) times what the objective makes of the weight.
enum class Objective : int { None, Square, Root };

struct Weighing {
    const float* importance;  // [cols], or null
    Objective objective;
};

enum class ScaleFormat : int { Fp16, Bf16, Fp32 };
enum class Signs : int { Range, Both, Positive };

// A search for scales of symmetric integers.
struct IntSearch {
    int bits;  // 2..8
    int64_t group;
    Weighing weighing;
    const float* factors;  // [factor_count]
    int64_t factor_count;
    Signs signs;
    int sweeps;
    ScaleFormat format;
    float least;
};

// A search for scales and zero points (rule Zero) or biases (rule Bias) of affine codes.
struct AffineSearch {
    int bits;  // 2..8
    int64_t group;
    Weighing weighing;
    const float* factors;  // [factor_count], of the range
    int64_t factor_count;
    DecodingRule rule;
    int sweeps;
    ScaleFormat format;
    float least;
};

// A search among the scales that a format of 8 bits has.
struct LadderSearch {
    int64_t group;
    Weighing weighing;
    const float* ladder;         // [256]
    const uint8_t *first, *last;  // [rows, groups]
};

// The search of auto-round; factors [factor_count] of the inverse scale, the first is round-to-nearest's own.
struct GridSearch {
    int bits;  // 2..8
    int64_t group;
    Weighing weighing;
    const float* factors;
    int64_t factor_count;
};

// Scales or biases of affine codes that move together, for a smaller mean error of each row's output.
struct Centering {
    int bits;  // 2..8
    int64_t group;
    const float* importance;  // [cols], or null: 1
    const float *spread, *means;  // [cols]
    DecodingRule rule;            // zero: scales move; bias: biases
    ScaleFormat format;
    float least;
};

// A search among the scales of a format, one group after the other, for a smaller mean error of each row's output.
struct LadderCentering {
    LadderSearch search;
    const float *spread, *means;  // [cols]
};

struct Table {
    const char* name;
    void (*widen)(const Weights& src, float* out);
    void (*group_minmax)(const float* x, int64_t rows, int64_t cols, int64_t group, float* out_min, float* out_max);
    int64_t (*rtn_int)(const Weights& src, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros);
    int64_t (*rtn_error_int)(const Weights& src, const IntScheme& scheme, uint8_t* codes, float* scales, uint8_t* zeros,
                             double* stats);
    void (*pack_bits)(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* out);
    void (*unpack_bits)(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* out);
    void (*transpose_u32)(const uint32_t* src, int64_t rows, int64_t cols, uint32_t* out, int64_t out_cols,
                          int64_t row0);
    void (*pack_columns)(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint32_t* out, int64_t out_cols,
                         int64_t row0);
    void (*split_words)(const uint32_t* words, int64_t rows, int64_t cols, int bits, uint8_t* out);
    void (*dequantize_int)(const IntCodes& q, float* out);
    void (*error_int)(const Weights& src, const IntCodes& q, int bits, double* stats);
    int64_t (*group_absmax)(const Weights& src, int64_t group, float* out);
    int64_t (*group_range)(const Weights& src, int64_t group, float* out_min, float* out_max);
    void (*encode_scaled)(const Weights& src, const Element& element, int64_t group, const float* scales,
                          uint8_t* codes);
    void (*encode_affine)(const Weights& src, int bits, int64_t group, const float* scales, const float* offsets,
                          EncodingRule rule, uint8_t* codes);
    void (*decode_scaled)(const GroupCodes& q, const Element& element, float* out);
    void (*decode_affine)(const GroupCodes& q, DecodingRule rule, float* out);
    void (*error_scaled)(const Weights& src, const GroupCodes& q, const Element& element, double* stats);
    void (*error_affine)(const Weights& src, const GroupCodes& q, int bits, DecodingRule rule, double* stats);
    void (*narrow_columns)(const float* src, int64_t rows, int64_t cols, uint16_t* out, int64_t out_cols, int64_t row0);
    void (*sum_errors)(const double* stats, int64_t rows, double* out);
    void (*weigh_squares)(const Weights& src, int64_t group, const Weighing& weighing, double* out);
    void (*search_int)(const Weights& src, const IntSearch& search, float* scales, double* losses);
    void (*center_groups)(const Weights& src, const Centering& centering, const float* scales, const float* offsets,
                          float* out, double* losses);
    void (*center_ladder)(const Weights& src, const Element& element, const LadderCentering& centering,
                          const uint8_t* chosen, uint8_t* out, double* losses);
    void (*search_affine)(const Weights& src, const AffineSearch& search, float* scales, float* offsets,
                          double* losses);
    void (*search_ladder)(const Weights& src, const Element& element, const LadderSearch& search, uint8_t* chosen,
                          double* losses);
    int64_t (*search_grid)(const Weights& src, const GridSearch& search, float* scales, uint8_t* codes,
                           double* losses);
    int64_t (*quantize_blocks)(const Weights& src, const BlockFormat& format, const float* importance, uint8_t* out);
    void (*dequantize_blocks)(const Blocks& blocks, const BlockFormat& format, float* out);
    void (*error_values)(const Weights& src, const float* values, int64_t group, double* stats);
    uint64_t (*checksum)(const uint8_t* data, int64_t size_bytes);
};

}  // namespace shardq
