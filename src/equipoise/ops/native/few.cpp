// The experts of a few tokens, without gradients: gather, gate and up, SwiGLU, down, weighted sum, in one call.
//
// What takes the time is reading weights, so both threads read long runs of them, each run for all rows of its expert.
// Every output is one dot product, added up in the same order whatever the number of rows, of threads, or of experts in
// one call: a token's result has the same bits alone, in a batch, and with its experts passed one by one. Sums are fp32.
//
// Weights: fp32, bf16, int8 with a scale per output channel, and int4 in the order of torch's AVX-512 kernel
// (pytorch/pytorch:aten/src/ATen/native/cpu/int4mm_kernel.cpp): blocks of 64 channels, for each input 32 bytes, whose
// byte i < 16 has channels i and i + 32, byte 16 + i channels i + 16 and i + 48, the first in the low half.
// Needs AVX-512 with bf16 and vbmi. Shapes are named as in equipoise/types.py; H = 2 F, gate first.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "simd.h"

namespace {

enum Kind { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

Vec silu(Vec x) {
    Vec one = _mm512_set1_ps(1);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// ------------------------------------------------------------------ weights whose rows lie one after the other

// In: what rows are multiplied in. STEP: weights per register. AHEAD: bytes to ask for before they are needed.
struct Fp32 {
    using Weight = float;
    using In = float;
    static constexpr int STEP = 16;
    static Vec load(const float* w) { return _mm512_loadu_ps(w); }
    static Vec add(Vec sum, Vec w, const float* x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum); }
};

struct Bf16 {
    using Weight = bf16;
    using In = bf16;
    static constexpr int STEP = 32;
    static __m512bh load(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static Vec add(Vec sum, __m512bh w, const bf16* x) {
        return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_loadu_si512(x));
    }
};

struct Int8 {
    using Weight = int8_t;
    using In = bf16;
    static constexpr int STEP = 32;
    static __m512bh load(const int8_t* w) { return _mm512_cvtne2ps_pbh(half(w + 16), half(w)); }
    static Vec half(const int8_t* w) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
    }
    static Vec add(Vec sum, __m512bh w, const bf16* x) { return Bf16::add(sum, w, x); }
};

constexpr long AHEAD = 8192;  // bytes: 4096 reads an eighth less in the same time

// out[n * stride + c]: dot product of C consecutive rows of w with N rows x.
template <class K, int C, int N>
void dots(const typename K::Weight* w, long length, const typename K::In* const* x, float* out, long stride) {
    constexpr int STEP = K::STEP;
    Vec even[C][N], odd[C][N];
    for (int c = 0; c < C; c++)
        for (int n = 0; n < N; n++) even[c][n] = odd[c][n] = _mm512_setzero_ps();
    long i = 0;
    for (; i + 2 * STEP <= length; i += 2 * STEP) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const auto* at = w + c * length + i;
            _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T1);
            if (2 * STEP * sizeof(*w) > 64) _mm_prefetch((const char*)at + AHEAD + 64, _MM_HINT_T1);
            auto first = K::load(at), second = K::load(at + STEP);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                even[c][n] = K::add(even[c][n], first, x[n] + i);
                odd[c][n] = K::add(odd[c][n], second, x[n] + i + STEP);
            }
        }
    }
    if (i < length)
        for (int c = 0; c < C; c++)
            for (int n = 0; n < N; n++) even[c][n] = K::add(even[c][n], K::load(w + c * length + i), x[n] + i);
    for (int c = 0; c < C; c++)
        for (int n = 0; n < N; n++) out[n * stride + c] = sum_of(_mm512_add_ps(even[c][n], odd[c][n]));
}

constexpr int MOST = 4;  // rows of x at a time

// out[n * stride + c] for `channels` rows of w, C at a time, and any number of rows x.
template <class K, int C>
void in_steps_of(const typename K::Weight* w, long channels, long length, const typename K::In* const* x, long rows,
                 float* out, long stride) {
    for (long c = 0; c < channels; c += C) {
        const auto* at = w + c * length;
        long n = 0;
        for (; n + MOST <= rows; n += MOST) dots<K, C, MOST>(at, length, x + n, out + n * stride + c, stride);
        auto* rest = out + n * stride + c;
        if (rows - n == 3) dots<K, C, 3>(at, length, x + n, rest, stride);
        if (rows - n == 2) dots<K, C, 2>(at, length, x + n, rest, stride);
        if (rows - n == 1) dots<K, C, 1>(at, length, x + n, rest, stride);
    }
}

// The same. With few rows memory is the limit, which one run of weights reads faster than two; channels are even.
template <class K>
void product(const typename K::Weight* w, long channels, long length, const typename K::In* const* x, long rows,
             float* out, long stride) {
    (rows <= MOST ? in_steps_of<K, 1> : in_steps_of<K, 2>)(w, channels, length, x, rows, out, stride);
}

// ------------------------------------------------------------------ int4

constexpr int BLOCK = 64;  // channels

// 128 + q in bf16 for the low four bits of each 16. Exact: at 128 the last bit of bf16 is worth 1.
__m512bh steps_of(__m512i nibbles) {
    const __m512i low = _mm512_set1_epi16(15), exponent = _mm512_set1_epi16(0x4300);
    return (__m512bh)_mm512_ternarylogic_epi32(nibbles, low, exponent, 0xea);  // (nibbles & low) | exponent
}

// Puts byte i of one input and byte i of the next one into the two halves of lane i. first: 0, or 16 for the far bytes.
struct Pairs {
    alignas(64) uint8_t index[64];
    constexpr explicit Pairs(int first) : index() {
        for (int i = 0; i < 64; i++) index[i] = uint8_t(i % 4 / 2 * 32 + first + i / 4);
    }
};
constexpr Pairs NEAR(0), FAR(16);

// Two inputs, from i on, of N rows times the 64 channels of a block.
template <int N>
inline void add_inputs(const uint8_t* w, const bf16* const* x, long i, __m512i low, __m512i high, Vec (&sums)[4][N]) {
    _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T1);
    const __m512i bytes = _mm512_loadu_si512(w);
    const __m512i near = _mm512_permutexvar_epi8(low, bytes), far = _mm512_permutexvar_epi8(high, bytes);
    const __m512bh steps[4] = {steps_of(near), steps_of(far), steps_of(_mm512_srli_epi16(near, 4)),
                               steps_of(_mm512_srli_epi16(far, 4))};
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
        int32_t pair;
        std::memcpy(&pair, x[n] + i, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        for (int c = 0; c < 4; c++) sums[c][n] = _mm512_dpbf16_ps(sums[c][n], steps[c], both);
    }
}

// out[n * stride + c] for the 64 channels of one block and N rows. scales: of this block, (groups, O, 2) strided by O.
// sums: of each row's inputs by group.
template <int N>
void block(const uint8_t* w, const bf16* scales, long out_dim, long length, long group, const bf16* const* x,
           const float* const* sums, float* out, long stride) {
    const __m512i low = _mm512_load_si512(NEAR.index), high = _mm512_load_si512(FAR.index);
    Vec total[4][N];
    for (auto& channels : total)
        for (auto& each : channels) each = _mm512_setzero_ps();
    for (long start = 0, g = 0; start < length; start += group, g++) {
        Vec even[4][N], odd[4][N];
        for (int c = 0; c < 4; c++)
            for (int n = 0; n < N; n++) even[c][n] = odd[c][n] = _mm512_setzero_ps();
        for (long i = start; i < start + group; i += 4) {
            add_inputs<N>(w + 32 * i, x, i, low, high, even);
            add_inputs<N>(w + 32 * (i + 2), x, i + 2, low, high, odd);
        }
        for (int c = 0; c < 4; c++) {
            const bf16* at = scales + 2 * (g * out_dim + 16 * c);
            _mm_prefetch((const char*)(at + 2 * BLOCK), _MM_HINT_T1);  // of the next block: they lie far apart
            __m512i both = _mm512_loadu_si512(at);
            Vec scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            Vec zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
            zero = _mm512_fnmadd_ps(_mm512_set1_ps(128 + 8), scale, zero);
            for (int n = 0; n < N; n++) {
                total[c][n] = _mm512_fmadd_ps(scale, _mm512_add_ps(even[c][n], odd[c][n]), total[c][n]);
                total[c][n] = _mm512_fmadd_ps(zero, _mm512_set1_ps(sums[n][g]), total[c][n]);
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + n * stride + 16 * c, total[c][n]);
}

// ------------------------------------------------------------------ one call

struct Call {
    int kind;
    bool wide;  // rows, and what comes out, are fp32
    long group, T, D, F, E;
    const void* x;
    const int64_t* tokens_R;
    const float* weights_R;
    const int64_t* counts_e;
    const char *up, *up_scales, *down, *down_scales;
};

struct Busy {
    long expert, start, rows;
};

// Rows in the form in which the weights take them. sums: int4 alone, by group.
struct Rows {
    std::vector<const void*> in;
    std::vector<const float*> sums;
};

using Buffer = std::unique_ptr<char[]>;
Buffer buffer(size_t bytes) { return Buffer(new char[bytes]); }

bool takes_bf16(int kind) { return kind != FP32; }

size_t bytes_of(int kind, long out_dim, long in_dim) {
    size_t weights = size_t(out_dim) * in_dim;
    return kind == FP32 ? 4 * weights : kind == BF16 ? 2 * weights : kind == INT8 ? weights : weights / 2;
}

size_t scale_bytes(const Call& call, long out_dim, long in_dim) {
    return call.kind == INT8 ? 2 * out_dim : call.kind == INT4 ? size_t(4) * out_dim * (in_dim / call.group) : 0;
}

void group_sums(const bf16* x, long length, long group, float* sums) {
    for (long g = 0; g < length / group; g++) {
        Vec total = _mm512_setzero_ps();
        for (long i = g * group; i < (g + 1) * group; i += 16) total = _mm512_add_ps(total, load_bf16(x + i));
        sums[g] = sum_of(total);
    }
}

// One row of x for the weights' products.
void convert(const Call& call, const void* x, long t, char* to) {
    for (long d = 0; d < call.D; d += 16) {
        Vec value = call.wide ? _mm512_loadu_ps((const float*)x + t * call.D + d)
                              : load_bf16((const bf16*)x + t * call.D + d);
        if (takes_bf16(call.kind)) store_bf16((bf16*)to + d, value);
        else _mm512_storeu_ps((float*)to + d, value);
    }
}

// out[n * stride + c], `channels` output channels from `first` on, of one expert's (out_dim, in_dim) weight.
void channels_of(const Call& call, const char* w, const char* scales, long out_dim, long in_dim, long first,
                 long channels, const void* const* x, const float* const* sums, long rows, float* out, long stride) {
    if (call.kind == FP32)
        return product<Fp32>((const float*)w + first * in_dim, channels, in_dim, (const float* const*)x, rows, out,
                             stride);
    if (call.kind == BF16)
        return product<Bf16>((const bf16*)w + first * in_dim, channels, in_dim, (const bf16* const*)x, rows, out,
                             stride);
    if (call.kind == INT8) {
        product<Int8>((const int8_t*)w + first * in_dim, channels, in_dim, (const bf16* const*)x, rows, out, stride);
        for (long n = 0; n < rows; n++)
            for (long c = 0; c < channels; c++) out[n * stride + c] *= to_float(((const bf16*)scales)[first + c]);
        return;
    }
    for (long c = 0; c < channels; c += BLOCK) {
        const auto* at = (const uint8_t*)w + (first + c) * in_dim / 2;
        const auto* its = (const bf16*)scales + 2 * (first + c);
        const auto* in = (const bf16* const*)x;
        long n = 0;
        for (; n + 2 <= rows; n += 2)
            block<2>(at, its, out_dim, in_dim, call.group, in + n, sums + n, out + n * stride + c, stride);
        if (n < rows) block<1>(at, its, out_dim, in_dim, call.group, in + n, sums + n, out + n * stride + c, stride);
    }
}

constexpr long WIDTH = 128;  // output channels that one thread takes at a time, of gate and of up
constexpr long HEIGHT = 16;  // rows whose gate and up are kept meanwhile

// a = silu(gate) * up * weight, for hidden units first .. first + WIDTH of one expert, in the form for the next product.
void activations(const Call& call, const Busy& busy, long first, const Rows& x, char* a_RF) {
    const long F = call.F, width = std::min(WIDTH, F - first);
    const char* w = call.up + busy.expert * bytes_of(call.kind, 2 * F, call.D);
    const char* scales = call.up_scales + busy.expert * scale_bytes(call, 2 * F, call.D);
    const void* const* in = x.in.data() + busy.start;
    const float* const* sums = x.sums.data() + (x.sums.empty() ? 0 : busy.start);
    for (long start = 0; start < busy.rows; start += HEIGHT) {
        const long rows = std::min(HEIGHT, busy.rows - start);
        float gate[HEIGHT * WIDTH], up[HEIGHT * WIDTH];
        channels_of(call, w, scales, 2 * F, call.D, first, width, in + start, sums + start, rows, gate, WIDTH);
        channels_of(call, w, scales, 2 * F, call.D, F + first, width, in + start, sums + start, rows, up, WIDTH);
        for (long n = 0; n < rows; n++) {
            const long row = busy.start + start + n;
            const Vec weight = _mm512_set1_ps(call.weights_R[row]);
            for (long f = 0; f < width; f += 16) {
                Vec value = silu(_mm512_loadu_ps(gate + n * WIDTH + f));
                value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_loadu_ps(up + n * WIDTH + f)), weight);
                if (takes_bf16(call.kind)) store_bf16((bf16*)a_RF + row * F + first + f, value);
                else _mm512_storeu_ps((float*)a_RF + row * F + first + f, value);
            }
        }
    }
}

// y_TD for output columns first .. first + width: each token's rows, added up by ascending expert.
void combine(const Call& call, long num_rows, const float* y_RD, long first, long width, void* out) {
    std::vector<float> sums(call.T * width, 0.f);
    for (long r = 0; r < num_rows; r++) {
        float* sum = sums.data() + call.tokens_R[r] * width;
        const float* y = y_RD + r * call.D + first;
        for (long d = 0; d < width; d++) sum[d] += y[d];
    }
    for (long t = 0; t < call.T; t++) {
        const float* sum = sums.data() + t * width;
        for (long d = 0; d < width; d += 16) {
            Vec value = _mm512_loadu_ps(sum + d);
            if (call.wide) _mm512_storeu_ps((float*)out + t * call.D + first + d, value);
            else store_bf16((bf16*)out + t * call.D + first + d, value);
        }
    }
}

}  // namespace

extern "C" {

// y_RD (fp32, num_rows x D): each computed row's output, weighted. out (T x D, in x's type): their sums; either may be
// null. Rows after sum(counts_e) are not computed.
void equipoise_few(int kind, int wide, long group, int threads, long T, long D, long F, long E, const void* x,
                   const int64_t* tokens_R, const float* weights_R, const int64_t* counts_e, const char* up,
                   const char* up_scales, const char* down, const char* down_scales, float* y_RD, void* out) {
    const Call call{kind, wide != 0, group, T, D, F, E, x, tokens_R, weights_R, counts_e, up, up_scales, down, down_scales};
    std::vector<Busy> busy;
    long R = 0;
    for (long e = 0; e < E; e++)
        if (counts_e[e]) busy.push_back({e, R, long(counts_e[e])}), R += counts_e[e];
    const long size = takes_bf16(kind) ? 2 : 4, groups = kind == INT4 ? std::max(D, F) / group : 0;
    const bool as_it_is = call.wide != takes_bf16(kind);
    Buffer converted = buffer(as_it_is ? 0 : T * D * size), a_RF = buffer(R * F * size);
    Buffer x_sums = buffer(4 * T * groups), a_sums = buffer(4 * R * groups);
    Buffer own = buffer(y_RD ? 0 : 4 * R * D);
    float* y = y_RD ? y_RD : (float*)own.get();
    const char* x_TD = as_it_is ? (const char*)x : converted.get();
    Rows x_rows{std::vector<const void*>(R), std::vector<const float*>(groups ? R : 0)};
    Rows a_rows{std::vector<const void*>(R), std::vector<const float*>(groups ? R : 0)};
    for (long r = 0; r < R; r++) {
        x_rows.in[r] = x_TD + tokens_R[r] * D * size;
        a_rows.in[r] = a_RF.get() + r * F * size;
        if (groups) x_rows.sums[r] = (float*)x_sums.get() + tokens_R[r] * groups;
        if (groups) a_rows.sums[r] = (float*)a_sums.get() + r * groups;
    }
    const long per_up = (F + WIDTH - 1) / WIDTH, per_down = (D + WIDTH - 1) / WIDTH;
    std::atomic<long> next_up{0}, next_down{0};
    const auto run = [&](int me, int of) {
        if (!as_it_is || groups)
            for (long t = me; t < T; t += of) {
                if (!as_it_is) convert(call, x, t, converted.get() + t * D * size);
                if (groups) group_sums((const bf16*)(x_TD + t * D * size), D, group, (float*)x_sums.get() + t * groups);
            }
#pragma omp barrier
        for (long i; (i = next_up++) < long(busy.size()) * per_up;)
            activations(call, busy[i / per_up], i % per_up * WIDTH, x_rows, a_RF.get());
#pragma omp barrier
        if (groups) {
            for (long r = me; r < R; r += of)
                group_sums((const bf16*)a_rows.in[r], F, group, (float*)a_sums.get() + r * groups);
#pragma omp barrier
        }
        for (long i; (i = next_down++) < long(busy.size()) * per_down;) {
            const Busy& its = busy[i / per_down];
            const long first = i % per_down * WIDTH, width = std::min(WIDTH, D - first);
            channels_of(call, down + its.expert * bytes_of(kind, D, F), down_scales + its.expert * scale_bytes(call, D, F),
                        D, F, first, width, a_rows.in.data() + its.start, a_rows.sums.data() + (groups ? its.start : 0),
                        its.rows, y + its.start * D + first, D);
        }
#pragma omp barrier
        if (out)
            for (long i = me; i < per_down; i += of)
                combine(call, R, y, i * WIDTH, std::min(WIDTH, D - i * WIDTH), out);
    };
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}

// out (T x D) from rows that were computed before.
void equipoise_few_sums(int wide, long T, long D, long num_rows, const int64_t* tokens_R, const float* y_RD, void* out) {
    Call call{};
    call.wide = wide != 0, call.T = T, call.D = D, call.tokens_R = tokens_R;
    for (long d = 0; d < D; d += WIDTH) combine(call, num_rows, y_RD, d, std::min(WIDTH, D - d), out);
}
}
