// Products of a few rows with one or more weights, without gradients: y = x W^T for each W, side by side in one output.
//
// torch's own products of so few rows take a call each, and read weights at a fraction of what the memory gives.
// Every output is one dot product, added up in the same order whatever the number of rows and threads: a row's result
// has the same bits alone and among others. fp32, or bf16 with sums in fp32.
// Needs AVX-512 with bf16. Shapes: N rows, I inputs, O outputs of all weights together.

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "simd.h"

namespace {

constexpr long AHEAD = 8192;      // bytes, that are asked for before they are needed
constexpr long CHANNELS = 32;     // outputs that one thread takes at a time
constexpr long ENOUGH = 1 << 17;  // products of two numbers that are worth another thread

struct Fp32 {
    using Number = float;
    static constexpr int STEP = 16;
    static Vec get(const float* x) { return _mm512_loadu_ps(x); }
    static Vec add(Vec sum, Vec w, Vec x) { return _mm512_fmadd_ps(w, x, sum); }
};

struct Bf16 {
    using Number = bf16;
    static constexpr int STEP = 32;
    static __m512bh get(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
    static Vec add(Vec sum, __m512bh w, __m512bh x) { return _mm512_dpbf16_ps(sum, w, x); }
};

void put(float* y, float x) { *y = x; }
void put(bf16* y, float x) { *y = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0); }
void put4(float* y, __m128 x) { _mm_storeu_ps(y, x); }
void put4(bf16* y, __m128 x) { _mm_storel_epi64((__m128i*)y, (__m128i)_mm_cvtneps_pbh(x)); }

template <class Number>
struct Rows {
    const Number* x;
    long step, inputs;  // step: from one row to the next
};

// y[n * to + c]: C outputs of N rows, from row `first` on. C N <= 16. w: the first output's weights.
template <class K, int C, int N, class Number = typename K::Number>
void tile(const Number* w, const Rows<Number>& rows, long first, Number* y, long to) {
    const Number* x = rows.x + first * rows.step;
    Vec sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (long i = 0; i < rows.inputs; i += K::STEP) {
        decltype(K::get(x)) values[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) values[n] = K::get(x + n * rows.step + i);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            if (C == 1) _mm_prefetch((const char*)(w + i) + AHEAD, _MM_HINT_T1);
            const auto weight = K::get(w + c * rows.inputs + i);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[4 * n + c] = K::add(sums[4 * n + c], weight, values[n]);
        }
    }
    if (C == 1) {
        for (int n = 0; n < N; n++) put(y + (first + n) * to, sum_of(sums[4 * n]));
        return;
    }
    const Vec all = sums_of(sums);
    const __m128 quarters[4] = {_mm512_extractf32x4_ps(all, 0), _mm512_extractf32x4_ps(all, 1),
                                _mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3)};
    for (int n = 0; n < N; n++) put4(y + (first + n) * to, quarters[n]);
}

template <class K, int C, class Number = typename K::Number>
void outputs(const Number* w, const Rows<Number>& rows, long num_rows, Number* y, long to) {
    long n = 0;
    for (; n + 4 <= num_rows; n += 4) tile<K, C, 4>(w, rows, n, y, to);
    if (num_rows - n == 3) tile<K, C, 3>(w, rows, n, y, to);
    if (num_rows - n == 2) tile<K, C, 2>(w, rows, n, y, to);
    if (num_rows - n == 1) tile<K, C, 1>(w, rows, n, y, to);
}

// With few rows memory is the limit, which one run of weights reads faster than four.
template <class K, class Number = typename K::Number>
void outputs_of(const Number* w, long count, const Rows<Number>& rows, long num_rows, Number* y, long to) {
    long c = 0;
    if (num_rows > 4)
        for (; c + 4 <= count; c += 4) outputs<K, 4>(w + c * rows.inputs, rows, num_rows, y + c, to);
    for (; c < count; c++) outputs<K, 1>(w + c * rows.inputs, rows, num_rows, y + c, to);
}

template <class K, class Number = typename K::Number>
void products(int threads, long num_rows, const Rows<Number>& rows, int count, const void* const* weights,
              const long* sizes, Number* y) {
    long total = 0, tasks = 0;
    for (int j = 0; j < count; j++) total += sizes[j], tasks += (sizes[j] + CHANNELS - 1) / CHANNELS;
    std::atomic<long> next{0};
    const auto run = [&] {
        for (long task; (task = next++) < tasks;) {
            long place = 0;
            int j = 0;
            for (long before; task >= (before = (sizes[j] + CHANNELS - 1) / CHANNELS); j++) task -= before, place += sizes[j];
            const long first = task * CHANNELS;
            outputs_of<K>((const Number*)weights[j] + first * rows.inputs, std::min(CHANNELS, sizes[j] - first), rows,
                          num_rows, y + place + first, total);
        }
    };
    threads = (int)std::min<long>(threads, 1 + num_rows * total * rows.inputs / ENOUGH);
    if (threads < 2) return run();
#pragma omp parallel num_threads(threads)
    run();
}

}  // namespace

extern "C" {

// x: (N, I), its rows x_step numbers apart. weights: `count` of (sizes[j], I). y: (N, sum of sizes).
void equipoise_linear(int is_bf16, int threads, long N, long I, const void* x, long x_step, int count,
                      const void* const* weights, const long* sizes, void* y) {
    if (is_bf16) products<Bf16>(threads, N, {(const bf16*)x, x_step, I}, count, weights, sizes, (bf16*)y);
    else products<Fp32>(threads, N, {(const float*)x, x_step, I}, count, weights, sizes, (float*)y);
}
}
