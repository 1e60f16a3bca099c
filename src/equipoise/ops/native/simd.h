// What the native sources share: fp32 and bf16 in registers of AVX-512, sums across a register, e^x.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;
using Vec = __m512;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline Vec load_bf16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

inline void store_bf16(bf16* y, Vec x) { _mm256_storeu_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh(x)); }

inline float sum_of(Vec x) {
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, (__m512d)x, 1)));
    __m128 quarters = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    __m128 pairs = _mm_add_ps(quarters, _mm_movehl_ps(quarters, quarters));
    return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline Vec load(const bf16* x) { return load_bf16(x); }
inline void store(float* y, Vec x) { _mm512_storeu_ps(y, x); }
inline void store(bf16* y, Vec x) { store_bf16(y, x); }

// e^x to 1 or 2 units in the last place; NaN stays NaN.
inline Vec exponential(Vec x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104), _mm512_min_ps(_mm512_set1_ps(104), x));
    Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    Vec p = _mm512_set1_ps(1.f / 720);
    for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// Lane k: sum_of(v[k]), with the same additions in the same order.
inline Vec sums_of(const Vec (&v)[16]) {
    Vec halves[8], quarters[4], pairs[2];
    for (int k = 0; k < 8; k++)
        halves[k] = _mm512_add_ps(_mm512_shuffle_f32x4(v[k], v[k + 8], 0x44), _mm512_shuffle_f32x4(v[k], v[k + 8], 0xee));
    for (int k = 0; k < 4; k++)
        quarters[k] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[k], halves[k + 4], 0x88),
                                    _mm512_shuffle_f32x4(halves[k], halves[k + 4], 0xdd));
    for (int k = 0; k < 2; k++)
        pairs[k] = _mm512_add_ps(_mm512_shuffle_ps(quarters[k], quarters[k + 2], 0x44),
                                 _mm512_shuffle_ps(quarters[k], quarters[k + 2], 0xee));
    Vec sums = _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), sums);
}

}  // namespace
