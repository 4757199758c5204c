// The Python face of the kernels: checks every argument, releases the GIL, calls the table. Nothing is allocated or
// copied.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "dispatch.h"

namespace nb = nanobind;

namespace {

using shardq::Dtype;
using shardq::IntCodes;
using shardq::IntScheme;
using shardq::Table;
using shardq::Weights;

// Struct-module format characters that mean the element, and its size.
struct Element {
    const char* name;
    const char* formats;
    Py_ssize_t size_bytes;
};

constexpr Element kU8{"uint8", "B", 1};
constexpr Element kU16{"uint16", "H", 2};
constexpr Element kU32{"uint32", "IL", 4};
constexpr Element kF32{"float32", "f", 4};
constexpr Element kF64{"float64", "d", 8};

std::string shape_text(const Py_ssize_t* shape, int dimensions) {
    std::string text = "[";
    for (int i = 0; i < dimensions; i++) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// A borrowed C-contiguous array of one element type. Made and destroyed with the GIL held.
class Array {
public:
    enum class Access { Read, Write };

    Array(nb::handle source, const char* name, const Element& element, int dimensions, Access access) : name_(name) {
        if (!PyObject_CheckBuffer(source.ptr())) {
            const std::string found = nb::cast<std::string>(nb::str(source.type().attr("__name__")));
            throw nb::type_error((std::string(name) + ": expected a numpy array, found " + found).c_str());
        }
        const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT;
        if (PyObject_GetBuffer(source.ptr(), &view_, access == Access::Write ? flags | PyBUF_WRITABLE : flags) != 0) {
            PyErr_Clear();
            fail(access == Access::Write ? "expected a writable C-contiguous array; it is read-only or strided"
                                         : "expected a C-contiguous array; pass numpy.ascontiguousarray(...)");
        }
        const std::string format = view_.format == nullptr ? "B" : view_.format;
        const bool known = format.size() == 1 && std::string(element.formats).find(format) != std::string::npos;
        if (!known || view_.itemsize != element.size_bytes || view_.ndim != dimensions) {
            const std::string found = "format '" + format + "', shape " + shape_text(view_.shape, view_.ndim);
            PyBuffer_Release(&view_);
            fail("expected " + std::string(element.name) + " with " + std::to_string(dimensions) +
                 " dimension(s), found " + found);
        }
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { PyBuffer_Release(&view_); }

    template <class T>
    T* data() const {
        return static_cast<T*>(view_.buf);
    }
    int64_t size(int dimension) const { return view_.shape[dimension]; }

    void expect(int64_t rows, int64_t cols) const {
        if (size(0) == rows && size(1) == cols) return;
        fail("expected shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "], found " +
             shape_text(view_.shape, view_.ndim));
    }
    void expect_filled() const {
        if (size(0) > 0 && size(1) > 0) return;
        fail("expected at least one row and one column, found " + shape_text(view_.shape, view_.ndim));
    }
    [[noreturn]] void fail(const std::string& message) const {
        throw nb::value_error((std::string(name_) + ": " + message).c_str());
    }

private:
    const char* name_;
    Py_buffer view_ = {};
};

constexpr Array::Access kRead = Array::Access::Read;
constexpr Array::Access kWrite = Array::Access::Write;

Dtype parse_dtype(const std::string& dtype) {
    if (dtype == "BF16") return Dtype::BF16;
    if (dtype == "F16") return Dtype::F16;
    if (dtype == "F32") return Dtype::F32;
    throw nb::value_error(("dtype: expected BF16, F16 or F32, found " + dtype).c_str());
}

const Element& raw_element(Dtype dtype) { return dtype == Dtype::F32 ? kF32 : kU16; }

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

// What round-to-nearest reads and writes.
struct RtnArrays {
    const Dtype dtype;
    const Array src, codes, scales, zeros;
    const IntScheme scheme;

    RtnArrays(nb::handle source, const std::string& dtype_name, int bits, int64_t group, bool symmetric,
              nb::handle levels, nb::handle steps, nb::handle points)
        : dtype(parse_dtype(dtype_name)),
          src(source, "src", raw_element(dtype), 2, kRead),
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
class NativeSet {
public:
    explicit NativeSet(const Table* table) : table_(table) {}

    const char* name() const { return table_->name; }

    void widen(nb::handle src, const std::string& dtype, nb::handle out) const {
        const Dtype type = parse_dtype(dtype);
        const Array in(src, "src", raw_element(type), 2, kRead), result(out, "out", kF32, 2, kWrite);
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
        result.expect(a.src.size(0), 3);
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

    void dequantize_int(nb::handle codes, nb::handle scales, nb::handle zeros, int64_t group, nb::handle out) const {
        const Array levels(codes, "codes", kU8, 2, kRead), steps(scales, "scales", kF32, 2, kRead);
        const Array points(zeros, "zeros", kU8, 2, kRead), result(out, "out", kF32, 2, kWrite);
        const IntCodes q = int_codes(levels, steps, points, group);
        result.expect(q.rows, q.cols);
        const nb::gil_scoped_release unlocked;
        table_->dequantize_int(q, result.data<float>());
    }

    void error_int(nb::handle src, const std::string& dtype, nb::handle codes, nb::handle scales, nb::handle zeros,
                   int64_t group, nb::handle stats) const {
        const Dtype type = parse_dtype(dtype);
        const Array in(src, "src", raw_element(type), 2, kRead), levels(codes, "codes", kU8, 2, kRead);
        const Array steps(scales, "scales", kF32, 2, kRead), points(zeros, "zeros", kU8, 2, kRead);
        const Array result(stats, "stats", kF64, 2, kWrite);
        const IntCodes q = int_codes(levels, steps, points, group);
        in.expect(q.rows, q.cols);
        result.expect(q.rows, 3);
        const nb::gil_scoped_release unlocked;
        table_->error_int(Weights{in.data<void>(), type, q.rows, q.cols}, q, result.data<double>());
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
        in.expect(in.size(0), 3);
        double sums[3];
        {
            const nb::gil_scoped_release unlocked;
            table_->sum_errors(in.data<double>(), in.size(0), sums);
        }
        return nb::make_tuple(sums[0], sums[1], sums[2]);
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

    const Table* table_;
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
        .def("dequantize_int", &NativeSet::dequantize_int, nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"),
             nb::arg("group"), nb::arg("out"))
        .def("error_int", &NativeSet::error_int, nb::arg("src"), nb::arg("dtype"), nb::arg("codes"), nb::arg("scales"),
             nb::arg("zeros"), nb::arg("group"), nb::arg("stats"))
        .def("narrow_columns", &NativeSet::narrow_columns, nb::arg("src"), nb::arg("out"), nb::arg("row0"))
        .def("sum_errors", &NativeSet::sum_errors, nb::arg("stats"))
        .def("checksum", &NativeSet::checksum, nb::arg("data"));
}
