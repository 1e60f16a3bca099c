// Attention of one new token each of many sequences, over keys and values in blocks, where they lie: no copy, no padding.
//
// A task is one sequence and one key/value head with all its query heads: scores of 16 keys at a time, their softmax,
// the sum of values. Sums are fp32 in an order that follows from the sequence alone: its bits don't depend on the others.
// Only the sequence's own keys and values are read, whatever else is in its blocks.
// Needs AVX-512 with bf16. Shapes: B sequences, H query heads, G of them per key/value head, K keys, D width of a head.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

struct Call {
    long B, heads, kv_heads, D, block_size, most_blocks, window;
    float scale;
    const float* sinks;
    const int64_t *blocks_BM, *ends_B;
    long q_row, q_head;
};

// Where a sequence's keys of one head are; a slot's values lie value_step numbers behind its keys.
template <class Number>
struct Keys {
    const Number* base;
    const int64_t* blocks;
    long block_size, slot_step;
    const Number* at(long position) const {
        return base + (blocks[position / block_size] * block_size + position % block_size) * slot_step;
    }
};

// scores[k] for 16 keys, those beyond the last one of the last key.
template <class Number>
Vec scores_of(const float* q, const Number* const (&keys)[16], long D) {
    Vec sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 16) {
        const Vec query = load(q + d);
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) sums[k] = _mm512_fmadd_ps(query, load(keys[k] + d), sums[k]);
    }
    return sums_of(sums);
}

// out[d .. d + 16 C] = sum of shares[k] * value k.
template <int C, class Number>
void add_values(const std::vector<const Number*>& values, const float* shares, long d, Number* out) {
    Vec sums[C];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (size_t k = 0; k < values.size(); k++) {
        const Vec share = _mm512_set1_ps(shares[k]);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sums[c] = _mm512_fmadd_ps(share, load(values[k] + d + 16 * c), sums[c]);
    }
    for (int c = 0; c < C; c++) store(out + d + 16 * c, sums[c]);
}

// Scores become shares, which sum to 1, or to less where a sink takes its part.
void softmax(float* scores, long count, float scale, const float* sink) {
    const long whole = count / 16 * 16;
    const __mmask16 rest = __mmask16((1u << (count - whole)) - 1);
    const Vec factor = _mm512_set1_ps(scale), least = _mm512_set1_ps(-INFINITY);
    Vec most = sink ? _mm512_set1_ps(*sink) : least;
    for (long k = 0; k < count; k += 16) {
        const __mmask16 mask = k < whole ? __mmask16(0xffff) : rest;
        const Vec value = _mm512_mul_ps(factor, _mm512_mask_loadu_ps(least, mask, scores + k));
        _mm512_mask_storeu_ps(scores + k, mask, value);
        most = _mm512_max_ps(most, value);  // NaN is seen again below
    }
    const Vec top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    Vec total = _mm512_setzero_ps();
    for (long k = 0; k < count; k += 16) {
        const __mmask16 mask = k < whole ? __mmask16(0xffff) : rest;
        const Vec share = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + k), top));
        _mm512_mask_storeu_ps(scores + k, mask, share);
        total = _mm512_mask_add_ps(total, mask, total, share);
    }
    float sum = sum_of(total);
    if (sink) sum += sum_of(_mm512_maskz_mov_ps(1, exponential(_mm512_sub_ps(_mm512_set1_ps(*sink), top))));
    const Vec inverse = _mm512_set1_ps(1 / sum);
    for (long k = 0; k < count; k += 16) {
        const __mmask16 mask = k < whole ? __mmask16(0xffff) : rest;
        _mm512_mask_storeu_ps(scores + k, mask, _mm512_mul_ps(inverse, _mm512_maskz_loadu_ps(mask, scores + k)));
    }
}

template <class Number>
struct Space {
    std::vector<float> q, scores;
    std::vector<const Number*> keys, values;
};

template <class Number>
void one_head(const Call& call, long b, long head, const Number* q_BHD, const Number* cache, Number* out, Space<Number>& space) {
    const long D = call.D, G = call.heads / call.kv_heads, end = call.ends_B[b];
    const long start = call.window > 0 ? std::max(0L, end - call.window) : 0, count = end - start;
    const Keys<Number> keys{cache + head * D, call.blocks_BM + b * call.most_blocks, call.block_size, 2 * call.kv_heads * D};
    space.keys.resize((count + 15) / 16 * 16), space.values.resize(count), space.scores.resize(space.keys.size());
    space.q.resize(D);
    for (long k = 0; k < count; k++) space.keys[k] = keys.at(start + k), space.values[k] = space.keys[k] + call.kv_heads * D;
    for (size_t k = count; k < space.keys.size(); k++) space.keys[k] = space.keys[count - 1];
    for (long h = head * G; h < (head + 1) * G; h++) {
        for (long d = 0; d < D; d += 16) store(space.q.data() + d, load(q_BHD + b * call.q_row + h * call.q_head + d));
        for (size_t k = 0; k < space.keys.size(); k += 16)
            store(space.scores.data() + k, scores_of(space.q.data(), *(const Number* const(*)[16])(space.keys.data() + k), D));
        softmax(space.scores.data(), count, call.scale, call.sinks ? call.sinks + h : nullptr);
        Number* to = out + (b * call.heads + h) * D;
        long d = 0;
        for (; d + 128 <= D; d += 128) add_values<8>(space.values, space.scores.data(), d, to);
        for (; d + 64 <= D; d += 64) add_values<4>(space.values, space.scores.data(), d, to);
        for (; d < D; d += 16) add_values<1>(space.values, space.scores.data(), d, to);
    }
}

template <class Number>
void attend(const Call& call, int threads, const Number* q_BHD, const Number* cache, Number* out) {
    std::atomic<long> next{0};
    const auto run = [&] {
        Space<Number> space;
        for (long task; (task = next++) < call.B * call.kv_heads;)
            one_head(call, task / call.kv_heads, task % call.kv_heads, q_BHD, cache, out, space);
    };
    if (threads < 2 || call.B * call.kv_heads < 2) return run();
#pragma omp parallel num_threads(threads)
    run();
}

}  // namespace

extern "C" {

// q: row b, head h at b q_row + h q_head. cache: a slot's keys of all heads, then its values. out: (B, H, D).
// blocks_BM: of each sequence, most_blocks numbers. ends_B: its tokens, at least 1. window: of the last so many, 0 is all.
// sinks: of each query head a logit, or null.
void equipoise_paged(int is_bf16, int threads, long B, long heads, long kv_heads, long D, long block_size,
                     long most_blocks, long window, float scale, const float* sinks, const int64_t* blocks_BM,
                     const int64_t* ends_B, const void* q, long q_row, long q_head, const void* cache, void* out) {
    const Call call{B, heads, kv_heads, D, block_size, most_blocks, window, scale, sinks, blocks_BM, ends_B, q_row, q_head};
    if (is_bf16) attend(call, threads, (const bf16*)q, (const bf16*)cache, (bf16*)out);
    else attend(call, threads, (const float*)q, (const float*)cache, (float*)out);
}
}
