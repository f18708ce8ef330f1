// Random calls of the errors of candidate ranges without Python: for sanitizers, and for other processors under an emulator.
//
// Every piece is an allocation of exactly its size. Every backend that runs here must be within a thousandth of the definition,
// in double precision, where a sum was not given up; one that was given up must be above the limit.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "range_search.h"

extern "C" void qv_range_errors(const qv::RangeErrors*);
extern "C" int qv_supported(int32_t);

int main() {
    std::mt19937 draw(3);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    for (int trial = 0; trial < 24; ++trial) {
        const int64_t rows = 1 + draw() % 3, columns = 1 + draw() % (trial % 4 ? 70 : 1100), candidates = 1 + draw() % 9;
        const bool real = trial % 2;
        std::vector<float> x(rows * columns), inverse(rows * candidates), scale(inverse.size()), zero(inverse.size());
        std::vector<int32_t> order(candidates);
        for (float& value : x) value = normal(draw);
        for (size_t i = 0; i < scale.size(); ++i) {
            scale[i] = 0.01f / (1 + i % candidates), inverse[i] = 1 / scale[i], zero[i] = real ? 3.37f : 3.0f;
        }
        for (int64_t i = 0; i < candidates; ++i) order[i] = static_cast<int32_t>(candidates - 1 - i);
        for (int32_t backend = 0; backend < 6; ++backend) {
            if (qv_supported(backend) != 1) continue;
            std::vector<float> error(inverse.size());
            const qv::RangeErrors call{rows, columns, candidates, x.data(), inverse.data(), scale.data(), zero.data(),
                                       order.data(), error.data(), 0.0f, 7.0f, 1.01f, real, backend, 2};
            qv_range_errors(&call);
            for (int64_t row = 0; row < rows; ++row) {
                float least = INFINITY;
                for (int64_t i = 0; i < candidates; ++i) {
                    const int64_t at = row * candidates + order[i];
                    double sum = 0;
                    for (int64_t k = 0; k < columns; ++k) {
                        const float v = x[row * columns + k], scaled = v * inverse[at];
                        const float code = real ? std::nearbyint(scaled + zero[at]) : std::nearbyint(scaled) + zero[at];
                        const float kept = std::fmin(std::fmax(code, 0.0f), 7.0f);
                        sum += std::pow(std::fabs((kept - zero[at]) * scale[at] - v), 2.4);
                    }
                    const bool given_up = error[at] > least * 1.01f;
                    if (given_up ? error[at] > sum * 1.001 : std::fabs(error[at] - sum) > 1e-3 * sum) {
                        std::fprintf(stderr, "backend %d trial %d: %g for %g\n", backend, trial, error[at], sum);
                        return 1;
                    }
                    least = std::fmin(least, error[at]);
                }
            }
        }
    }
    return 0;
}
