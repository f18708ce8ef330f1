// Random calls of fused fake quantization without Python: for sanitizers, and for other processors under an emulator.
//
// Every piece is an allocation of exactly its size, so that a sanitizer sees a byte too far. Every backend that runs here must
// give the bytes of the portable one.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "fake_quantize.h"

extern "C" void qv_fake_quantize(const qv::FakeQuantize*);
extern "C" void qv_scale_output(const qv::ScaleOutput*);
extern "C" void qv_scale_gradient(const qv::ScaleGradient*);
extern "C" int qv_supported(int32_t);

namespace {

using Floats = std::vector<float>;
std::mt19937 draw(7);

int64_t below(int64_t n) { return static_cast<int64_t>(draw() % static_cast<uint64_t>(n)); }

Floats numbers(int64_t count, float low, float high) {
    std::uniform_real_distribution<float> any(low, high);
    Floats made(static_cast<size_t>(count));
    for (float& value : made) value = any(draw);
    return made;
}

struct Case {
    qv::FakeQuantize p{};
    Floats x, first, second, helper, grad;
};

// Everything that the passes of one case write, one after the other.
Floats run(const Case& c, int32_t backend) {
    qv::FakeQuantize p = c.p;
    p.backend = backend;
    const int64_t scales = p.rows * p.groups, all = scales * p.columns;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    Floats x = c.x, first = c.first, second = c.second, helper = c.helper, grad = c.grad;
    Floats low(size(scales)), high(size(scales)), scale(size(scales)), zero(size(scales)), sums(size(p.rows));
    Floats operand(size(all)), again(size(all)), one(size(scales)), two(size(scales));
    p.x = x.data(), p.first = first.data(), p.second = second.data();
    p.low = low.data(), p.high = high.data(), p.scale = scale.data(), p.zero = zero.data(), p.row_sum = sums.data();
    p.operand = operand.data(), p.helper = helper.data();
    qv_fake_quantize(&p);
    p.row_sum = nullptr, p.helper = nullptr, p.operand = again.data(), p.known = 1;
    p.grad = p.grad_x = grad.data(), p.grad_first = one.data(), p.grad_second = two.data();
    qv_fake_quantize(&p);
    const int64_t width = p.groups * p.columns;
    Floats row(size(p.rows)), column(size(width)), y = operand, by_row(size(all)), by_column(size(all));
    for (size_t i = 0; i < row.size(); ++i) row[i] = scale[i * size(p.groups)];
    for (size_t i = 0; i < column.size(); ++i) column[i] = static_cast<float>(i % 7);
    const qv::ScaleOutput output{p.rows, width,  y.data(),      row.data(), column.data(), sums.data(), column.data(),
                                 again.data(), column.data(), 0,            backend,       2};
    qv_scale_output(&output);
    const qv::ScaleGradient gradient{p.rows, width, grad.data(), row.data(), column.data(), by_row.data(), by_column.data(), 0, backend, 2};
    qv_scale_gradient(&gradient);
    Floats made;
    for (const Floats* part : {&low, &high, &scale, &zero, &sums, &operand, &again, &one, &two, &grad, &y, &by_row, &by_column})
        made.insert(made.end(), part->begin(), part->end());
    return made;
}

Case draw_case(int64_t index) {
    Case c;
    qv::FakeQuantize& p = c.p;
    p.rows = 1 + below(9), p.groups = 1 + below(3), p.columns = 8 + below(index % 5 == 0 ? 1200 : 90);
    p.kind = static_cast<int32_t>(below(3)), p.zero_kind = static_cast<int32_t>(below(3));
    if (p.kind != qv::kLearned && p.zero_kind == qv::kRealZero) p.zero_kind = qv::kIntegerZero;
    if (p.kind == qv::kDynamic && p.zero_kind == qv::kNoZero) p.arithmetic = static_cast<int32_t>(below(3));
    p.qmax = static_cast<int32_t>((1 << (1 + below(7))) - 1), p.qmin = p.zero_kind == qv::kNoZero ? -p.qmax : 0;
    p.scale_dtype = static_cast<int32_t>(below(3)), p.factored = below(2) == 0, p.raw = below(2) == 0;
    p.params = p.kind == qv::kLearned ? p.groups : 1;
    p.floor = 1e-8f, p.ceiling = 3e38f, p.factor = 0.25f, p.x_row_stride = p.groups * p.columns, p.threads = 2;
    const int64_t all = p.rows * p.groups * p.columns;
    c.x = numbers(all, -2.0f, 2.0f), c.grad = numbers(all, -1.0f, 1.0f), c.helper = numbers(all, -1.0f, 1.0f);
    c.first = numbers(p.rows * p.params, 0.1f, 1.0f), c.second = numbers(p.rows * p.params, 0.1f, 1.0f);
    for (float& value : c.x) value = below(9) == 0 ? 2.0f : value;
    return c;
}

}  // namespace

int main() {
    for (int64_t index = 0; index < 60; ++index) {
        const Case c = draw_case(index);
        const Floats expected = run(c, qv::kPortable);
        for (int32_t backend : {qv::kAvx2, qv::kVnni}) {
            if (qv_supported(backend) != 1) continue;
            const Floats found = run(c, backend);
            if (memcmp(found.data(), expected.data(), expected.size() * sizeof(float)) != 0) {
                fprintf(stderr, "case %d: backend %d differs\n", static_cast<int>(index), backend);
                return 1;
            }
        }
    }
    return 0;
}
