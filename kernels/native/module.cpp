// The Python face of the kernels: checks every argument, releases the GIL, calls the table. Nothing is allocated or
// copied.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "arguments.h"
#include "array.h"
#include "block_arguments.h"
#include "dispatch.h"
#ifdef SHARDQ_BUILD_AVX
#include "hashing.h"
#endif
#include "searches.h"

namespace nb = nanobind;

namespace {

using shardq::DecodingRule;
using shardq::Dtype;
using shardq::Element;
using shardq::EncodingRule;
using shardq::GroupCodes;
using shardq::IntCodes;
using shardq::IntScheme;
using shardq::Table;
using shardq::Weights;

// What round-to-nearest reads and writes.
struct RtnArrays {
    const Dtype dtype;
    const Array src, codes, scales, zeros;
    const IntScheme scheme;

    RtnArrays(nb::handle source, const std::string& dtype_name, int bits, int64_t group, bool symmetric,
              nb::handle levels, nb::handle steps, nb::handle points)
        : dtype(parse_dtype(dtype_name)),
          src(source, "src", raw_item(dtype), 2, kRead),
          codes(levels, "codes", kU8, 2, kWrite),
          scales(steps, "scales", kF32, 2, kWrite),
          zeros(points, "zeros", kU8, 2, kWrite),
          scheme{checked_bits(bits), least_group(checked_group(group), src.size(1)), symmetric} {
        src.expect_filled();
        const int64_t rows = src.size(0), cols = src.size(1), groups = (cols - 1) / scheme.group + 1;
        codes.expect(rows, cols);
        scales.expect(rows, groups);
        zeros.expect(rows, groups);
    }

    Weights weights() const { return {src.data<void>(), dtype, src.size(0), src.size(1)}; }
};

// One instruction set. Codes, scales and zeros are checked against [rows, cols] and [rows, ceil(cols / group)].
class NativeSet : public SearchSet {
public:
    explicit NativeSet(const Table* table) : SearchSet(table) {}

    const char* name() const { return table_->name; }

    void widen(nb::handle src, const std::string& dtype, nb::handle out) const {
        const Dtype type = parse_dtype(dtype);
        const Array in(src, "src", raw_item(type), 2, kRead), result(out, "out", kF32, 2, kWrite);
        in.expect_filled();
        result.expect(in.size(0), in.size(1));
        const nb::gil_scoped_release unlocked;
        table_->widen(Weights{in.data<void>(), type, in.size(0), in.size(1)}, result.data<float>());
    }

    void group_minmax(nb::handle x, int64_t group, nb::handle out_min, nb::handle out_max) const {
        const Array in(x, "x", kF32, 2, kRead);
        const Array low(out_min, "out_min", kF32, 2, kWrite), high(out_max, "out_max", kF32, 2, kWrite);
        in.expect_filled();
        const int64_t rows = in.size(0), cols = in.size(1), groups = (cols - 1) / checked_group(group) + 1;
        low.expect(rows, groups);
        high.expect(rows, groups);
        const nb::gil_scoped_release unlocked;
        table_->group_minmax(in.data<float>(), rows, cols, least_group(group, cols), low.data<float>(),
                             high.data<float>());
    }

    int64_t rtn_int(nb::handle src, const std::string& dtype, int bits, int64_t group, bool symmetric, nb::handle codes,
                    nb::handle scales, nb::handle zeros) const {
        const RtnArrays a(src, dtype, bits, group, symmetric, codes, scales, zeros);
        const nb::gil_scoped_release unlocked;
        return table_->rtn_int(a.weights(), a.scheme, a.codes.data<uint8_t>(), a.scales.data<float>(),
                               a.zeros.data<uint8_t>());
    }

    int64_t rtn_error_int(nb::handle src, const std::string& dtype, int bits, int64_t group, bool symmetric,
                          nb::handle codes, nb::handle scales, nb::handle zeros, nb::handle stats) const {
        const RtnArrays a(src, dtype, bits, group, symmetric, codes, scales, zeros);
        const Array result(stats, "stats", kF64, 2, kWrite);
        result.expect(a.src.size(0), shardq::kFigures);
        const nb::gil_scoped_release unlocked;
        return table_->rtn_error_int(a.weights(), a.scheme, a.codes.data<uint8_t>(), a.scales.data<float>(),
                                     a.zeros.data<uint8_t>(), result.data<double>());
    }

    void pack_bits(nb::handle codes, int bits, nb::handle out) const {
        const Array in(codes, "codes", kU8, 2, kRead), result(out, "out", kU32, 2, kWrite);
        in.expect_filled();
        result.expect(in.size(0), (in.size(1) * checked_bits(bits) + 31) / 32);
        const nb::gil_scoped_release unlocked;
        table_->pack_bits(in.data<uint8_t>(), in.size(0), in.size(1), bits, result.data<uint32_t>());
    }

    void unpack_bits(nb::handle words, int bits, nb::handle out) const {
        const Array in(words, "words", kU32, 2, kRead), result(out, "out", kU8, 2, kWrite);
        result.expect_filled();
        in.expect(result.size(0), (result.size(1) * checked_bits(bits) + 31) / 32);
        const nb::gil_scoped_release unlocked;
        table_->unpack_bits(in.data<uint32_t>(), result.size(0), result.size(1), bits, result.data<uint8_t>());
    }

    void transpose_u32(nb::handle src, nb::handle out, int64_t row0) const {
        const Array in(src, "src", kU32, 2, kRead), result(out, "out", kU32, 2, kWrite);
        in.expect_filled();
        expect_strip(result, in.size(1), row0, in.size(0));
        const nb::gil_scoped_release unlocked;
        table_->transpose_u32(in.data<uint32_t>(), in.size(0), in.size(1), result.data<uint32_t>(), result.size(1),
                              row0);
    }

    void pack_columns(nb::handle codes, int bits, nb::handle out, int64_t row0) const {
        const Array in(codes, "codes", kU8, 2, kRead), result(out, "out", kU32, 2, kWrite);
        in.expect_filled();
        if (in.size(1) * checked_bits(bits) % 32 != 0) {
            in.fail("expected rows of whole 32-bit words, found " + std::to_string(in.size(1)) + " codes of " +
                    std::to_string(bits) + " bits");
        }
        expect_strip(result, in.size(1) * bits / 32, row0, in.size(0));
        const nb::gil_scoped_release unlocked;
        table_->pack_columns(in.data<uint8_t>(), in.size(0), in.size(1), bits, result.data<uint32_t>(), result.size(1),
                             row0);
    }

    void split_words(nb::handle words, int bits, nb::handle out) const {
        const Array in(words, "words", kU32, 2, kRead), result(out, "out", kU8, 2, kWrite);
        in.expect_filled();
        if (bits != 2 && bits != 4 && bits != 8) {
            throw nb::value_error(("bits: expected 2, 4 or 8, found " + std::to_string(bits)).c_str());
        }
        result.expect(in.size(0) * 32 / bits, in.size(1));
        const nb::gil_scoped_release unlocked;
        table_->split_words(in.data<uint32_t>(), in.size(0), in.size(1), bits, result.data<uint8_t>());
    }

    void dequantize_int(nb::handle codes, nb::handle scales, nb::handle zeros, int64_t group, nb::handle out) const {
        const Array levels(codes, "codes", kU8, 2, kRead), steps(scales, "scales", kF32, 2, kRead);
        const Array points(zeros, "zeros", kU8, 2, kRead), result(out, "out", kF32, 2, kWrite);
        const IntCodes q = int_codes(levels, steps, points, group);
        result.expect(q.rows, q.cols);
        const nb::gil_scoped_release unlocked;
        table_->dequantize_int(q, result.data<float>());
    }

    void error_int(nb::handle src, const std::string& dtype, int bits, nb::handle codes, nb::handle scales,
                   nb::handle zeros, int64_t group, nb::handle stats) const {
        const Dtype type = parse_dtype(dtype);
        const int width = checked_bits(bits);
        const Array in(src, "src", raw_item(type), 2, kRead), levels(codes, "codes", kU8, 2, kRead);
        const Array steps(scales, "scales", kF32, 2, kRead), points(zeros, "zeros", kU8, 2, kRead);
        const Array result(stats, "stats", kF64, 2, kWrite);
        const IntCodes q = int_codes(levels, steps, points, group);
        in.expect(q.rows, q.cols);
        result.expect(q.rows, shardq::kFigures);
        const nb::gil_scoped_release unlocked;
        table_->error_int(Weights{in.data<void>(), type, q.rows, q.cols}, q, width, result.data<double>());
    }

    int64_t group_absmax(nb::handle src, const std::string& dtype, int64_t group, nb::handle out) const {
        const GroupedWeights w(src, dtype, group);
        const Array most(out, "out", kF32, 2, kWrite);
        most.expect(w.rows, w.groups);
        const nb::gil_scoped_release unlocked;
        return table_->group_absmax(w.weights(), w.group, most.data<float>());
    }

    int64_t group_range(nb::handle src, const std::string& dtype, int64_t group, nb::handle out_min,
                        nb::handle out_max) const {
        const GroupedWeights w(src, dtype, group);
        const Array low(out_min, "out_min", kF32, 2, kWrite), high(out_max, "out_max", kF32, 2, kWrite);
        low.expect(w.rows, w.groups);
        high.expect(w.rows, w.groups);
        const nb::gil_scoped_release unlocked;
        return table_->group_range(w.weights(), w.group, low.data<float>(), high.data<float>());
    }

    void encode_scaled(nb::handle src, const std::string& dtype, const std::string& element, int64_t group,
                       nb::handle scales, nb::handle codes) const {
        const Element& type = parse_element(element);
        const GroupedWeights w(src, dtype, group);
        const Array steps(scales, "scales", kF32, 2, kRead), result(codes, "codes", kU8, 2, kWrite);
        steps.expect(w.rows, w.groups);
        result.expect(w.rows, w.cols);
        const nb::gil_scoped_release unlocked;
        table_->encode_scaled(w.weights(), type, w.group, steps.data<float>(), result.data<uint8_t>());
    }

    void encode_affine(nb::handle src, const std::string& dtype, int bits, int64_t group, nb::handle scales,
                       nb::handle offsets, const std::string& rule, nb::handle codes) const {
        const EncodingRule how = parse_encoding_rule(rule);
        const int checked = checked_bits(bits);
        const GroupedWeights w(src, dtype, group);
        const Array steps(scales, "scales", kF32, 2, kRead), places(offsets, "offsets", kF32, 2, kRead);
        const Array result(codes, "codes", kU8, 2, kWrite);
        steps.expect(w.rows, w.groups);
        places.expect(w.rows, w.groups);
        result.expect(w.rows, w.cols);
        const nb::gil_scoped_release unlocked;
        table_->encode_affine(w.weights(), checked, w.group, steps.data<float>(), places.data<float>(), how,
                              result.data<uint8_t>());
    }

    void decode_scaled(nb::handle codes, const std::string& element, nb::handle scales, int64_t group,
                       nb::handle out) const {
        const Element& type = parse_element(element);
        const Array levels(codes, "codes", kU8, 2, kRead), steps(scales, "scales", kF32, 2, kRead);
        const Array result(out, "out", kF32, 2, kWrite);
        const GroupCodes q = scaled_codes(levels, steps, group);
        result.expect(q.rows, q.cols);
        const nb::gil_scoped_release unlocked;
        table_->decode_scaled(q, type, result.data<float>());
    }

    void decode_affine(nb::handle codes, nb::handle scales, nb::handle offsets, int64_t group, const std::string& rule,
                       nb::handle out) const {
        const DecodingRule how = parse_decoding_rule(rule);
        const Array levels(codes, "codes", kU8, 2, kRead), steps(scales, "scales", kF32, 2, kRead);
        const Array places(offsets, "offsets", kF32, 2, kRead), result(out, "out", kF32, 2, kWrite);
        const GroupCodes q = affine_codes(levels, steps, places, group);
        result.expect(q.rows, q.cols);
        const nb::gil_scoped_release unlocked;
        table_->decode_affine(q, how, result.data<float>());
    }

    void error_scaled(nb::handle src, const std::string& dtype, const std::string& element, nb::handle codes,
                      nb::handle scales, int64_t group, nb::handle stats) const {
        const Element& type = parse_element(element);
        const Dtype raw = parse_dtype(dtype);
        const Array in(src, "src", raw_item(raw), 2, kRead), levels(codes, "codes", kU8, 2, kRead);
        const Array steps(scales, "scales", kF32, 2, kRead), result(stats, "stats", kF64, 2, kWrite);
        const GroupCodes q = scaled_codes(levels, steps, group);
        in.expect(q.rows, q.cols);
        result.expect(q.rows, shardq::kFigures);
        const nb::gil_scoped_release unlocked;
        table_->error_scaled(Weights{in.data<void>(), raw, q.rows, q.cols}, q, type, result.data<double>());
    }

    void error_affine(nb::handle src, const std::string& dtype, int bits, nb::handle codes, nb::handle scales,
                      nb::handle offsets, int64_t group, const std::string& rule, nb::handle stats) const {
        const DecodingRule how = parse_decoding_rule(rule);
        const int width = checked_bits(bits);
        const Dtype raw = parse_dtype(dtype);
        const Array in(src, "src", raw_item(raw), 2, kRead), levels(codes, "codes", kU8, 2, kRead);
        const Array steps(scales, "scales", kF32, 2, kRead), places(offsets, "offsets", kF32, 2, kRead);
        const Array result(stats, "stats", kF64, 2, kWrite);
        const GroupCodes q = affine_codes(levels, steps, places, group);
        in.expect(q.rows, q.cols);
        result.expect(q.rows, shardq::kFigures);
        const nb::gil_scoped_release unlocked;
        table_->error_affine(Weights{in.data<void>(), raw, q.rows, q.cols}, q, width, how, result.data<double>());
    }

    void narrow_columns(nb::handle src, nb::handle out, int64_t row0) const {
        const Array in(src, "src", kF32, 2, kRead), result(out, "out", kU16, 2, kWrite);
        in.expect_filled();
        expect_strip(result, in.size(1), row0, in.size(0));
        const nb::gil_scoped_release unlocked;
        table_->narrow_columns(in.data<float>(), in.size(0), in.size(1), result.data<uint16_t>(), result.size(1), row0);
    }

    nb::tuple sum_errors(nb::handle stats) const {
        const Array in(stats, "stats", kF64, 2, kRead);
        in.expect_filled();
        in.expect(in.size(0), shardq::kFigures);
        double sums[shardq::kFigures];
        {
            const nb::gil_scoped_release unlocked;
            table_->sum_errors(in.data<double>(), in.size(0), sums);
        }
        return nb::make_tuple(sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]);
    }

    int64_t quantize_blocks(nb::handle src, const std::string& dtype, const std::string& block_type,
                            nb::handle importance, nb::handle out) const {
        const Quantized a(src, dtype, block_type, importance, out);
        const nb::gil_scoped_release unlocked;
        const IeeeFloats standard;
        return table_->quantize_blocks(a.weights(), a.format, a.importance.data(), a.out.data<uint8_t>());
    }

    void dequantize_blocks(nb::handle blocks, const std::string& block_type, nb::handle out) const {
        const Dequantized a(blocks, block_type, out);
        const nb::gil_scoped_release unlocked;
        const IeeeFloats standard;
        table_->dequantize_blocks(a.blocks(), a.format, a.out.data<float>());
    }

    void error_values(nb::handle src, const std::string& dtype, nb::handle values, int64_t group,
                      nb::handle stats) const {
        const GroupedWeights w(src, dtype, group);
        const Array q(values, "values", kF32, 2, kRead), result(stats, "stats", kF64, 2, kWrite);
        q.expect(w.rows, w.cols);
        result.expect(w.rows, shardq::kFigures);
        const nb::gil_scoped_release unlocked;
        const IeeeFloats standard;
        table_->error_values(w.weights(), q.data<float>(), w.group, result.data<double>());
    }

    uint64_t checksum(nb::handle data) const {
        const Array in(data, "data", kU8, 1, kRead);
        const nb::gil_scoped_release unlocked;
        return table_->checksum(in.data<uint8_t>(), in.size(0));
    }

private:
    // `rows` rows of `cols` words as columns row0 and up of `out`.
    static void expect_strip(const Array& out, int64_t cols, int64_t row0, int64_t rows) {
        if (row0 < 0 || row0 > out.size(1) - rows) {
            out.fail("expected row0 " + std::to_string(row0) + " + " + std::to_string(rows) +
                     " rows to fit in its " + std::to_string(out.size(1)) + " columns");
        }
        out.expect(cols, out.size(1));
    }

    static IntCodes int_codes(const Array& codes, const Array& scales, const Array& zeros, int64_t group) {
        codes.expect_filled();
        const int64_t rows = codes.size(0), cols = codes.size(1), groups = (cols - 1) / checked_group(group) + 1;
        scales.expect(rows, groups);
        zeros.expect(rows, groups);
        return {codes.data<uint8_t>(), scales.data<float>(), zeros.data<uint8_t>(), rows, cols,
                least_group(group, cols)};
    }

    static GroupCodes scaled_codes(const Array& codes, const Array& scales, int64_t group) {
        codes.expect_filled();
        const int64_t rows = codes.size(0), cols = codes.size(1);
        scales.expect(rows, (cols - 1) / checked_group(group) + 1);
        return {codes.data<uint8_t>(), scales.data<float>(), nullptr, rows, cols, least_group(group, cols)};
    }

    static GroupCodes affine_codes(const Array& codes, const Array& scales, const Array& offsets, int64_t group) {
        GroupCodes q = scaled_codes(codes, scales, group);
        offsets.expect(scales.size(0), scales.size(1));
        q.offsets = offsets.data<float>();
        return q;
    }
};

nb::list native_sets() {
    nb::list found;
    const shardq::BuiltSets built = shardq::built_sets();
    for (int i = 0; i < built.count; i++) {
        const shardq::BuiltSet& set = built.sets[i];
        found.append(nb::make_tuple(NativeSet(set.table), set.usable, set.usable ? "" : set.why));
    }
    return found;
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("__version__") = SHARDQ_VERSION;
    m.def("native_sets", &native_sets, "(set, usable, what the CPU lacks) per built set, slowest first.");
#ifdef SHARDQ_BUILD_AVX
    if (shardq::has_sha256()) {
        m.def("hash_blocks", &hash_blocks, nb::arg("states"), nb::arg("data"),
              "SHA-256 of up to three streams: only where the CPU has instructions for it.");
    }
#endif
    nb::class_<NativeSet>(m, "NativeSet")
        .def_prop_ro("name", &NativeSet::name)
        .def("widen", &NativeSet::widen, nb::arg("src"), nb::arg("dtype"), nb::arg("out"))
        .def("group_minmax", &NativeSet::group_minmax, nb::arg("x"), nb::arg("group"), nb::arg("out_min"),
             nb::arg("out_max"))
        .def("rtn_int", &NativeSet::rtn_int, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"), nb::arg("group"),
             nb::arg("symmetric"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"))
        .def("rtn_error_int", &NativeSet::rtn_error_int, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"),
             nb::arg("group"), nb::arg("symmetric"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"),
             nb::arg("stats"))
        .def("pack_bits", &NativeSet::pack_bits, nb::arg("codes"), nb::arg("bits"), nb::arg("out"))
        .def("unpack_bits", &NativeSet::unpack_bits, nb::arg("words"), nb::arg("bits"), nb::arg("out"))
        .def("transpose_u32", &NativeSet::transpose_u32, nb::arg("src"), nb::arg("out"), nb::arg("row0"))
        .def("pack_columns", &NativeSet::pack_columns, nb::arg("codes"), nb::arg("bits"), nb::arg("out"),
             nb::arg("row0"))
        .def("split_words", &NativeSet::split_words, nb::arg("words"), nb::arg("bits"), nb::arg("out"))
        .def("dequantize_int", &NativeSet::dequantize_int, nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"),
             nb::arg("group"), nb::arg("out"))
        .def("error_int", &NativeSet::error_int, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"), nb::arg("codes"),
             nb::arg("scales"), nb::arg("zeros"), nb::arg("group"), nb::arg("stats"))
        .def("group_absmax", &NativeSet::group_absmax, nb::arg("src"), nb::arg("dtype"), nb::arg("group"),
             nb::arg("out"))
        .def("group_range", &NativeSet::group_range, nb::arg("src"), nb::arg("dtype"), nb::arg("group"),
             nb::arg("out_min"), nb::arg("out_max"))
        .def("encode_scaled", &NativeSet::encode_scaled, nb::arg("src"), nb::arg("dtype"), nb::arg("element"),
             nb::arg("group"), nb::arg("scales"), nb::arg("codes"))
        .def("encode_affine", &NativeSet::encode_affine, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"),
             nb::arg("group"), nb::arg("scales"), nb::arg("offsets"), nb::arg("rule"), nb::arg("codes"))
        .def("decode_scaled", &NativeSet::decode_scaled, nb::arg("codes"), nb::arg("element"), nb::arg("scales"),
             nb::arg("group"), nb::arg("out"))
        .def("decode_affine", &NativeSet::decode_affine, nb::arg("codes"), nb::arg("scales"), nb::arg("offsets"),
             nb::arg("group"), nb::arg("rule"), nb::arg("out"))
        .def("error_scaled", &NativeSet::error_scaled, nb::arg("src"), nb::arg("dtype"), nb::arg("element"),
             nb::arg("codes"), nb::arg("scales"), nb::arg("group"), nb::arg("stats"))
        .def("error_affine", &NativeSet::error_affine, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"),
             nb::arg("codes"), nb::arg("scales"), nb::arg("offsets"), nb::arg("group"), nb::arg("rule"), nb::arg("stats"))
        .def("narrow_columns", &NativeSet::narrow_columns, nb::arg("src"), nb::arg("out"), nb::arg("row0"))
        .def("sum_errors", &NativeSet::sum_errors, nb::arg("stats"))
        .def("weigh_squares", &NativeSet::weigh_squares, nb::arg("src"), nb::arg("dtype"), nb::arg("group"),
             nb::arg("importance").none(), nb::arg("objective"), nb::arg("out"))
        .def("search_int", &NativeSet::search_int, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"), nb::arg("group"),
             nb::arg("importance").none(), nb::arg("objective"), nb::arg("factors"), nb::arg("signs"),
             nb::arg("sweeps"), nb::arg("scale"), nb::arg("least"), nb::arg("scales"), nb::arg("losses"))
        .def("center_groups", &NativeSet::center_groups, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"),
             nb::arg("group"), nb::arg("importance").none(), nb::arg("spread"), nb::arg("means"), nb::arg("rule"),
             nb::arg("scale"), nb::arg("least"), nb::arg("scales"), nb::arg("offsets"), nb::arg("out"),
             nb::arg("losses"))
        .def("center_ladder", &NativeSet::center_ladder, nb::arg("src"), nb::arg("dtype"), nb::arg("element"),
             nb::arg("group"), nb::arg("importance").none(), nb::arg("spread"), nb::arg("means"), nb::arg("ladder"),
             nb::arg("first"), nb::arg("last"), nb::arg("chosen"), nb::arg("out"), nb::arg("losses"))
        .def("search_affine", &NativeSet::search_affine, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"),
             nb::arg("group"), nb::arg("importance").none(), nb::arg("objective"), nb::arg("factors"), nb::arg("rule"),
             nb::arg("sweeps"), nb::arg("scale"), nb::arg("least"), nb::arg("scales"), nb::arg("offsets"),
             nb::arg("losses"))
        .def("search_ladder", &NativeSet::search_ladder, nb::arg("src"), nb::arg("dtype"), nb::arg("element"),
             nb::arg("group"), nb::arg("importance").none(), nb::arg("objective"), nb::arg("ladder"), nb::arg("first"),
             nb::arg("last"), nb::arg("chosen"), nb::arg("losses"))
        .def("search_grid", &NativeSet::search_grid, nb::arg("src"), nb::arg("dtype"), nb::arg("bits"),
             nb::arg("group"), nb::arg("importance").none(), nb::arg("factors"), nb::arg("scales"), nb::arg("codes"),
             nb::arg("losses"))
        .def("quantize_blocks", &NativeSet::quantize_blocks, nb::arg("src"), nb::arg("dtype"), nb::arg("block_type"),
             nb::arg("importance").none(), nb::arg("out"))
        .def("dequantize_blocks", &NativeSet::dequantize_blocks, nb::arg("blocks"), nb::arg("block_type"), nb::arg("out"))
        .def("error_values", &NativeSet::error_values, nb::arg("src"), nb::arg("dtype"), nb::arg("values"),
             nb::arg("group"), nb::arg("stats"))
        .def("checksum", &NativeSet::checksum, nb::arg("data"));
}
