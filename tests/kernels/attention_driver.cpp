// Random calls of the attention and of its gradient without Python: for sanitizers, and for other processors under an emulator.
//
// Every piece is an allocation of exactly its size. Every backend that runs here must give the bytes of the plain one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "attention.h"

extern "C" int64_t qv_attention_work_bytes(const qv::Attention*);
extern "C" void qv_attention(const qv::Attention*);
extern "C" void qv_attention_gradient(const qv::AttentionGradient*);
extern "C" int qv_supported(int32_t);

// Gradients of queries, keys and values, as one piece of bytes.
static std::vector<float> differentiate(const qv::Attention& call) {
    const int64_t columns = qv::padded_head(call), keys = qv::key_blocks(call) * qv::kKeys;
    std::mt19937 draw(7);
    std::normal_distribution<float> normal;
    std::vector<float> grad(call.heads * call.queries * columns), query(grad.size()), key(call.heads * keys * columns), value(key.size());
    for (auto* piece : {&grad, &query, &key, &value})
        for (float& x : *piece) x = normal(draw);
    std::vector<float> of_query(grad.size()), of_key(key.size()), of_value(key.size());
    const qv::AttentionGradient gradient{call, grad.data(), query.data(), key.data(), value.data(),
                                         of_query.data(), of_key.data(), of_value.data()};
    qv_attention_gradient(&gradient);
    of_query.insert(of_query.end(), of_key.begin(), of_key.end());
    of_query.insert(of_query.end(), of_value.begin(), of_value.end());
    return of_query;
}

int main() {
    std::mt19937 draw(5);
    std::normal_distribution<float> normal(0.3f, 2.0f);
    for (int trial = 0; trial < 8; ++trial) {
        const int64_t heads = 1 + draw() % 2, queries = 1 + draw() % 70, keys = 1 + draw() % 140, size = 4 * (1 + draw() % 36);
        std::vector<float> q(heads * queries * size), k(heads * keys * size), v(k.size());
        for (auto* piece : {&q, &k, &v})
            for (float& value : *piece) value = normal(draw);
        if (trial % 4 == 3) q[draw() % q.size()] = NAN;
        std::vector<uint8_t> mask(queries * keys);
        for (uint8_t& seen : mask) seen = draw() % 3 != 0;
        std::vector<float> clip(heads, 0.8f), plain;
        for (int32_t backend = 0; backend < 6; ++backend) {
            if (qv_supported(backend) != 1) continue;
            std::vector<float> y(q.size());
            qv::Attention call{};
            call.batch = 1, call.heads = heads, call.queries = queries, call.keys = keys, call.head_size = size;
            call.q = q.data(), call.k = k.data(), call.v = v.data(), call.y = y.data();
            call.q_head = call.y_head = queries * size, call.k_head = call.v_head = keys * size;
            call.q_row = call.k_row = call.v_row = call.y_row = size;
            if (trial % 2) call.mask = mask.data(), call.mask_row = keys, call.mask_key = 1, call.key_clip = clip.data();
            call.plain = trial % 4 > 1, call.factor = 0.2f, call.smooth_key = trial % 3 != 0, call.backend = backend, call.threads = 2;
            void* work = nullptr;
            if (posix_memalign(&work, 64, static_cast<size_t>(qv_attention_work_bytes(&call)))) return 1;
            call.work = static_cast<uint8_t*>(work);
            qv_attention(&call);
            const std::vector<float> gradients = differentiate(call);
            y.insert(y.end(), gradients.begin(), gradients.end());
            std::free(work);
            if (plain.empty()) plain = y;
            if (std::memcmp(plain.data(), y.data(), y.size() * sizeof(float))) {
                std::fprintf(stderr, "backend %d differs in trial %d\n", backend, trial);
                return 1;
            }
        }
    }
    return 0;
}
