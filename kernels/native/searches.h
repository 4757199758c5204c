// The Python face of the searches. Part of module.cpp.
#pragma once

#include "arguments.h"

namespace {

// What all searches read and write, but for what they search.
struct Searched {
    const GroupedWeights w;
    const Importance importance;
    const shardq::Weighing weighing;
    const Array losses;

    Searched(nb::handle source, const std::string& dtype, int64_t group, nb::handle weights,
             const std::string& objective, nb::handle sums)
        : w(source, dtype, group),
          importance(weights, w.cols),
          weighing{importance.data(), parse_objective(objective)},
          losses(sums, "losses", kF64, 2, kWrite) {
        losses.expect(w.rows, 2);
    }

    void expect_groups(const Array& values) const { values.expect(w.rows, w.groups); }
};

// What is known of inputs, column by column.
class Inputs {
public:
    Inputs(nb::handle spread, nb::handle means, int64_t cols)
        : spread_(spread, "spread", kF32, 1, kRead), means_(means, "means", kF32, 1, kRead) {
        if (spread_.size(0) != cols) spread_.fail("expected " + std::to_string(cols) + " numbers");
        if (means_.size(0) != cols) means_.fail("expected " + std::to_string(cols) + " numbers");
        for (int64_t i = 0; i < cols; i++) {
            const float v = this->spread()[i], m = this->means()[i];
            if (!(v >= 0.0f && v <= kMostReal)) spread_.fail("expected finite numbers from 0 up");
            if (!(m >= -kMostReal && m <= kMostReal)) means_.fail("expected finite numbers");
        }
    }

    const float* spread() const { return spread_.data<float>(); }
    const float* means() const { return means_.data<float>(); }

private:
    const Array spread_, means_;
};

// A float element, and the scales that a search may choose.
class Ladder {
public:
    Ladder(const std::string& element, nb::handle ladder)
        : element_(parse_element(element)), rungs_(ladder, "ladder", kF32, 1, kRead) {
        if (element_.kind == ElementKind::Int) {
            throw nb::value_error(("element: expected a float, found " + element).c_str());
        }
        if (rungs_.size(0) != 256) rungs_.fail("expected 256 numbers, found " + std::to_string(rungs_.size(0)));
        for (int i = 0; i < 256; i++) {
            const float each = scales()[i];
            if (!(each >= 0.0f && each <= kMostReal)) rungs_.fail("expected finite numbers from 0 up");
        }
    }

    const Element& element() const { return element_; }
    const float* scales() const { return rungs_.data<float>(); }

private:
    const Element& element_;
    const Array rungs_;
};

// The searches of one instruction set.
class SearchSet {
public:
    explicit SearchSet(const shardq::Table* table) : table_(table) {}

    void weigh_squares(nb::handle src, const std::string& dtype, int64_t group, nb::handle importance,
                       const std::string& objective, nb::handle out) const {
        const GroupedWeights w(src, dtype, group);
        const Importance weights(importance, w.cols);
        const shardq::Weighing weighing{weights.data(), parse_objective(objective)};
        const Array sums(out, "out", kF64, 1, kWrite);
        if (sums.size(0) != w.rows) sums.fail("expected " + std::to_string(w.rows) + " numbers");
        const nb::gil_scoped_release unlocked;
        table_->weigh_squares(w.weights(), w.group, weighing, sums.data<double>());
    }

    void search_int(nb::handle src, const std::string& dtype, int bits, int64_t group, nb::handle importance,
                    const std::string& objective, nb::handle factors, const std::string& signs, int sweeps,
                    const std::string& scale, float least, nb::handle scales, nb::handle losses) const {
        const int width = checked_bits(bits);
        const Searched a(src, dtype, group, importance, objective, losses);
        const Factors list(factors);
        const Array steps(scales, "scales", kF32, 2, kWrite);
        a.expect_groups(steps);
        const shardq::IntSearch search{width,        a.w.group,          a.weighing,
                                       list.data(),  list.count(),       parse_signs(signs),
                                       checked_sweeps(sweeps), parse_scale_format(scale), least};
        const nb::gil_scoped_release unlocked;
        table_->search_int(a.w.weights(), search, steps.data<float>(), a.losses.data<double>());
    }

    void center_groups(nb::handle src, const std::string& dtype, int bits, int64_t group, nb::handle importance,
                       nb::handle spread, nb::handle means, const std::string& rule, const std::string& scale,
                       float least, nb::handle scales, nb::handle offsets, nb::handle out, nb::handle losses) const {
        const int width = checked_bits(bits);
        const Searched a(src, dtype, group, importance, "none", losses);
        const Inputs inputs(spread, means, a.w.cols);
        const Array steps(scales, "scales", kF32, 2, kRead), places(offsets, "offsets", kF32, 2, kRead);
        const Array moved(out, "out", kF32, 2, kWrite);
        a.expect_groups(steps);
        a.expect_groups(places);
        a.expect_groups(moved);
        const shardq::Centering centering{width,
                                          a.w.group,
                                          a.importance.data(),
                                          inputs.spread(),
                                          inputs.means(),
                                          parse_decoding_rule(rule),
                                          parse_scale_format(scale),
                                          least};
        const nb::gil_scoped_release unlocked;
        table_->center_groups(a.w.weights(), centering, steps.data<float>(), places.data<float>(),
                              moved.data<float>(), a.losses.data<double>());
    }

    void search_affine(nb::handle src, const std::string& dtype, int bits, int64_t group, nb::handle importance,
                       const std::string& objective, nb::handle factors, const std::string& rule, int sweeps,
                       const std::string& scale, float least, nb::handle scales, nb::handle offsets,
                       nb::handle losses) const {
        const int width = checked_bits(bits);
        const Searched a(src, dtype, group, importance, objective, losses);
        const Factors list(factors);
        const Array steps(scales, "scales", kF32, 2, kWrite), places(offsets, "offsets", kF32, 2, kWrite);
        a.expect_groups(steps);
        a.expect_groups(places);
        const shardq::AffineSearch search{width,        a.w.group,          a.weighing,
                                          list.data(),  list.count(),       parse_decoding_rule(rule),
                                          checked_sweeps(sweeps), parse_scale_format(scale), least};
        const nb::gil_scoped_release unlocked;
        table_->search_affine(a.w.weights(), search, steps.data<float>(), places.data<float>(),
                              a.losses.data<double>());
    }

    void search_ladder(nb::handle src, const std::string& dtype, const std::string& element, int64_t group,
                       nb::handle importance, const std::string& objective, nb::handle ladder, nb::handle first,
                       nb::handle last, nb::handle chosen, nb::handle losses) const {
        const Ladder rungs(element, ladder);
        const Searched a(src, dtype, group, importance, objective, losses);
        const Array low(first, "first", kU8, 2, kRead), high(last, "last", kU8, 2, kRead);
        const Array best(chosen, "chosen", kU8, 2, kWrite);
        a.expect_groups(low);
        a.expect_groups(high);
        a.expect_groups(best);
        const shardq::LadderSearch search{a.w.group, a.weighing, rungs.scales(), low.data<uint8_t>(),
                                          high.data<uint8_t>()};
        const nb::gil_scoped_release unlocked;
        table_->search_ladder(a.w.weights(), rungs.element(), search, best.data<uint8_t>(), a.losses.data<double>());
    }

    void center_ladder(nb::handle src, const std::string& dtype, const std::string& element, int64_t group,
                       nb::handle importance, nb::handle spread, nb::handle means, nb::handle ladder, nb::handle first,
                       nb::handle last, nb::handle chosen, nb::handle out, nb::handle losses) const {
        const Ladder rungs(element, ladder);
        const Searched a(src, dtype, group, importance, "none", losses);
        const Inputs inputs(spread, means, a.w.cols);
        const Array low(first, "first", kU8, 2, kRead), high(last, "last", kU8, 2, kRead);
        const Array old(chosen, "chosen", kU8, 2, kRead), best(out, "out", kU8, 2, kWrite);
        for (const Array* each : {&low, &high, &old, &best}) a.expect_groups(*each);
        const shardq::LadderCentering centering{
            {a.w.group, a.weighing, rungs.scales(), low.data<uint8_t>(), high.data<uint8_t>()},
            inputs.spread(),
            inputs.means()};
        const nb::gil_scoped_release unlocked;
        table_->center_ladder(a.w.weights(), rungs.element(), centering, old.data<uint8_t>(), best.data<uint8_t>(),
                              a.losses.data<double>());
    }

    int64_t search_grid(nb::handle src, const std::string& dtype, int bits, int64_t group, nb::handle importance,
                        nb::handle factors, nb::handle scales, nb::handle codes, nb::handle losses) const {
        const int width = checked_bits(bits);
        const Searched a(src, dtype, group, importance, "none", losses);
        const Factors list(factors);
        const Array steps(scales, "scales", kF32, 2, kWrite), levels(codes, "codes", kU8, 2, kWrite);
        a.expect_groups(steps);
        levels.expect(a.w.rows, a.w.cols);
        const shardq::GridSearch search{width, a.w.group, a.weighing, list.data(), list.count()};
        const nb::gil_scoped_release unlocked;
        return table_->search_grid(a.w.weights(), search, steps.data<float>(), levels.data<uint8_t>(),
                                   a.losses.data<double>());
    }

protected:
    const shardq::Table* table_;
};

}  // namespace
