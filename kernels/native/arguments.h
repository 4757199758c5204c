// Arguments that Python passes beside arrays, and what follows from them. Part of module.cpp.
#pragma once

#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "array.h"
#include "kernels.h"

namespace {

using shardq::DecodingRule;
using shardq::Dtype;
using shardq::Element;
using shardq::ElementKind;
using shardq::EncodingRule;
using shardq::Weights;

Dtype parse_dtype(const std::string& dtype) {
    if (dtype == "BF16") return Dtype::BF16;
    if (dtype == "F16") return Dtype::F16;
    if (dtype == "F32") return Dtype::F32;
    throw nb::value_error(("dtype: expected BF16, F16 or F32, found " + dtype).c_str());
}

const Item& raw_item(Dtype dtype) { return dtype == Dtype::F32 ? kF32 : kU16; }

constexpr Element kElements[] = {
    {"int2", ElementKind::Int, 2},  {"int3", ElementKind::Int, 3},  {"int4", ElementKind::Int, 4},
    {"int5", ElementKind::Int, 5},  {"int6", ElementKind::Int, 6},  {"int7", ElementKind::Int, 7},
    {"int8", ElementKind::Int, 8},  {"e0m3", ElementKind::E0M3, 4}, {"e2m1", ElementKind::E2M1, 4},
    {"e2m3", ElementKind::E2M3, 6}, {"e3m2", ElementKind::E3M2, 6}, {"e4m3fn", ElementKind::E4M3FN, 8},
    {"e5m2", ElementKind::E5M2, 8},
};

const Element& parse_element(const std::string& name) {
    std::string names;
    for (const Element& element : kElements) {
        if (name == element.name) return element;
        names += (names.empty() ? "" : ", ") + std::string(element.name);
    }
    throw nb::value_error(("element: expected one of " + names + ", found " + name).c_str());
}

EncodingRule parse_encoding_rule(const std::string& rule) {
    if (rule == "round_add") return EncodingRule::RoundAdd;
    if (rule == "add_round") return EncodingRule::AddRound;
    if (rule == "subtract") return EncodingRule::Subtract;
    throw nb::value_error(("rule: expected round_add, add_round or subtract, found " + rule).c_str());
}

DecodingRule parse_decoding_rule(const std::string& rule) {
    if (rule == "zero") return DecodingRule::Zero;
    if (rule == "bias") return DecodingRule::Bias;
    throw nb::value_error(("rule: expected zero or bias, found " + rule).c_str());
}

int checked_bits(int bits) {
    if (bits >= 2 && bits <= 8) return bits;
    throw nb::value_error(("bits: expected 2 to 8, found " + std::to_string(bits)).c_str());
}

int64_t checked_group(int64_t group) {
    if (group >= 1) return group;
    throw nb::value_error(("group: expected at least 1 column, found " + std::to_string(group)).c_str());
}

// A group wider than the row is the row; the kernels may then multiply without overflow.
int64_t least_group(int64_t group, int64_t cols) { return group < cols ? group : cols; }

// Raw weights, and how their columns are grouped.
struct GroupedWeights {
    const Dtype dtype;
    const Array src;
    const int64_t rows, cols, group, groups;

    GroupedWeights(nb::handle source, const std::string& dtype_name, int64_t width)
        : dtype(parse_dtype(dtype_name)),
          src(source, "src", raw_item(dtype), 2, kRead),
          rows(src.size(0)),
          cols(src.size(1)),
          group(least_group(checked_group(width), cols)),
          groups(group < 1 ? 0 : (cols - 1) / group + 1) {
        src.expect_filled();
    }

    Weights weights() const { return {src.data<void>(), dtype, rows, cols}; }
};

shardq::Objective parse_objective(const std::string& name) {
    if (name == "none") return shardq::Objective::None;
    if (name == "square") return shardq::Objective::Square;
    if (name == "root") return shardq::Objective::Root;
    throw nb::value_error(("objective: expected none, square or root, found " + name).c_str());
}

shardq::Signs parse_signs(const std::string& name) {
    if (name == "range") return shardq::Signs::Range;
    if (name == "both") return shardq::Signs::Both;
    if (name == "positive") return shardq::Signs::Positive;
    throw nb::value_error(("signs: expected range, both or positive, found " + name).c_str());
}

shardq::ScaleFormat parse_scale_format(const std::string& name) {
    if (name == "fp16") return shardq::ScaleFormat::Fp16;
    if (name == "bf16") return shardq::ScaleFormat::Bf16;
    if (name == "fp32") return shardq::ScaleFormat::Fp32;
    throw nb::value_error(("scale: expected fp16, bf16 or fp32, found " + name).c_str());
}

int checked_sweeps(int sweeps) {
    if (sweeps >= 0 && sweeps <= 64) return sweeps;
    throw nb::value_error(("sweeps: expected 0 to 64, found " + std::to_string(sweeps)).c_str());
}

constexpr float kMostReal = 3.4028234663852886e38f;

// What an error in a column counts: a number for each, or None, which is 1 for all.
class Importance {
public:
    Importance(nb::handle source, int64_t cols) {
        if (source.is_none()) return;
        array_.emplace(source, "importance", kF32, 1, kRead);
        if (array_->size(0) != cols) {
            array_->fail("expected " + std::to_string(cols) + " numbers, found " + std::to_string(array_->size(0)));
        }
        for (int64_t i = 0; i < cols; i++) {
            if (!(data()[i] >= 0.0f && data()[i] <= kMostReal)) {
                array_->fail("expected finite numbers from 0 up, found another in column " + std::to_string(i));
            }
        }
    }
    const float* data() const { return array_ ? array_->data<float>() : nullptr; }

private:
    std::optional<Array> array_;
};

// The candidates of a search.
class Factors {
public:
    explicit Factors(nb::handle source) : array_(source, "factors", kF32, 1, kRead) {
        if (count() < 1 || count() > 256) {
            array_.fail("expected 1 to 256 numbers, found " + std::to_string(count()));
        }
        for (int64_t i = 0; i < count(); i++) {
            if (!(data()[i] > 0.0f && data()[i] <= kMostReal)) array_.fail("expected finite numbers above 0");
        }
    }
    const float* data() const { return array_.data<float>(); }
    int64_t count() const { return array_.size(0); }

private:
    const Array array_;
};

}  // namespace
