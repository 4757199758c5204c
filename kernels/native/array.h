// Arrays that Python passes: checked, borrowed, never copied. Part of module.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

namespace {

namespace nb = nanobind;

// Struct-module format characters that mean an array's item, and its size.
struct Item {
    const char* name;
    const char* formats;
    Py_ssize_t size_bytes;
};

constexpr Item kU8{"uint8", "B", 1};
constexpr Item kU16{"uint16", "H", 2};
constexpr Item kU32{"uint32", "IL", 4};
constexpr Item kF32{"float32", "f", 4};
constexpr Item kF64{"float64", "d", 8};

std::string shape_text(const Py_ssize_t* shape, int dimensions) {
    std::string text = "[";
    for (int i = 0; i < dimensions; i++) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// A borrowed C-contiguous array of one item type. Made and destroyed with the GIL held.
class Array {
public:
    enum class Access { Read, Write };

    Array(nb::handle source, const char* name, const Item& item, int dimensions, Access access) : name_(name) {
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
        const bool known = format.size() == 1 && std::string(item.formats).find(format) != std::string::npos;
        if (!known || view_.itemsize != item.size_bytes || view_.ndim != dimensions) {
            const std::string found = "format '" + format + "', shape " + shape_text(view_.shape, view_.ndim);
            PyBuffer_Release(&view_);
            fail("expected " + std::string(item.name) + " with " + std::to_string(dimensions) +
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

}  // namespace
