// Expert products in bf16 with their backward, on a CPU with avx512_bf16. The twin in torch: ops/lean_experts.py.
//
// Shapes as there: T tokens, D dim, F hidden, H = 2F (gate first), E experts, R rows sorted by expert. D and F are
// multiples of 32. Each number is a sum of products in fp32 in ascending order of the inner dim, rounded once, so
// results depend neither on the number of threads nor on which of them computes what, nor on other rows.
//
// One product is C (M, N) = A (M, K) B (K, N), in tiles of 12 x 32: 24 registers of sums, two of B, one of A. Pairs of
// neighbours in K are one 32-bit word ("dword"), which the instruction multiplies and adds up. B lies in panels of
// 32 columns: [K/2][32] dwords. A lies row by row, or, for the weights' gradients, where K are the expert's rows, in panels of 12.
//
// An expert is computed by one thread, with all of its products in that thread's cache, or by all threads together
// (a "team"), where experts can't be shared out evenly. Both are the same code: a thread does its share of each phase.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr int64_t MR = 12, NR = 32;      // a tile
constexpr int64_t PAD = 32;              // numbers behind each row of a block: rows don't meet in the same cache sets
constexpr int64_t BLOCK_BYTES = 420000;  // of a block's widest rows: under half of an L2 cache
constexpr int64_t MAX_BLOCK = 96;        // rows
constexpr double UNEVEN = 1.05;          // a thread's load over the mean, from which a team is better

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// ------------------------------------------------------------------------------------------------ numbers

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m512 load16(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline void store16(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
inline __m512i narrow32(const float* c) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(c + 16), _mm512_load_ps(c));
}

// e^x to 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. NaN stays NaN: min and max return their second operand.
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// ------------------------------------------------------------------------------------------------ one tile

// c (12, 32) = A B over k2 dwords. a[m * row + k * step].
template <int64_t STEP>
__attribute__((noinline)) void tile(const uint32_t* a, int64_t row, const uint32_t* b, int64_t k2, float* c) {
    __m512 sums[MR][2];
#pragma GCC unroll 12
    for (int m = 0; m < MR; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < k2; k++) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * NR);
        __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * NR + 16);
#pragma GCC unroll 12
        for (int m = 0; m < MR; m++) {
            __m512bh am = (__m512bh)_mm512_set1_epi32((int)a[m * row + k * STEP]);
            sums[m][0] = _mm512_dpbf16_ps(sums[m][0], am, b0);
            sums[m][1] = _mm512_dpbf16_ps(sums[m][1], am, b1);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; m++) {
        _mm512_store_ps(c + m * NR, sums[m][0]);
        _mm512_store_ps(c + m * NR + 16, sums[m][1]);
    }
}

// ------------------------------------------------------------------------------------------------ packing

inline uint32_t* words(bf16* p) { return (uint32_t*)p; }
inline const uint32_t* words(const bf16* p) { return (const uint32_t*)p; }

// 16 rows of 16 dwords become 16 columns.
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Half a panel, 16 columns: W (16, K) from row-major, transposed. out: the panel, or its second half.
void pack_transposed(const bf16* w, int64_t K, uint32_t* out) {
    for (int64_t k2 = 0; k2 < K / 2; k2 += 16) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(words(w + i * K) + k2);
        transpose16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + (k2 + i) * NR, r[i]);
    }
}

// One dword row of a panel: 32 pairs, one of each pair from row0 and one from row1.
inline void interleave32(const bf16* row0, const bf16* row1, uint32_t* out) {
    const __m512i low = _mm512_add_epi16(_mm512_set1_epi32(0x00200000), [] {
        __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_or_si512(i, _mm512_slli_epi32(i, 16));
    }());
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i a = _mm512_loadu_si512(row0), b = _mm512_loadu_si512(row1);
    _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
    _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(a, high, b));
}

// Panels of 32 columns from rows (pairs of neighbouring rows), sequential in the source: for weights out of memory.
void pack_rows_of_weight(const bf16* w, int64_t N, int64_t first, int64_t last, int64_t K2, uint32_t* out) {
    for (int64_t k = first; k < last; k++)
        for (int64_t p = 0; p < N / NR; p++)
            interleave32(w + 2 * k * N + p * NR, w + (2 * k + 1) * N + p * NR, out + (p * K2 + k) * NR);
}

// The same from a block of rows in the cache, sequential in the target. out: the first panel at this block's first pair.
void pack_b(const bf16* rows, int64_t ld, int64_t pairs, int64_t N, int64_t K2, uint32_t* out) {
    for (int64_t p = 0; p < N / NR; p++)
        for (int64_t k = 0; k < pairs; k++)
            interleave32(rows + 2 * k * ld + p * NR, rows + (2 * k + 1) * ld + p * NR, out + (p * K2 + k) * NR);
}

// Panels of 12 for A. The last one reads beyond N, into the rows' padding: rows of tiles that are not stored.
void pack_a(const bf16* rows, int64_t ld, int64_t pairs, int64_t N, int64_t K2, uint32_t* out) {
    for (int64_t p = 0; p < div_up(N, MR); p++)
        for (int64_t k = 0; k < pairs; k++) {
            const bf16* at = rows + 2 * k * ld + p * MR;
            __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + ld)));
            _mm512_mask_storeu_epi32(out + (p * K2 + k) * MR, 0x0fff, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// `count` rows of x, then zeros up to `padded` rows.
void gather(const bf16* x, const int64_t* tokens, int64_t count, int64_t padded, int64_t D, bf16* out, int64_t ld) {
    for (int64_t i = 0; i < count; i++) memcpy(out + i * ld, x + tokens[i] * D, D * sizeof(bf16));
    for (int64_t i = count; i < padded; i++) memset(out + i * ld, 0, D * sizeof(bf16));
}

// ------------------------------------------------------------------------------------------------ who does what

struct Member {  // this thread's place among those that compute an expert
    int64_t me, of;
    void sync() const {
        if (of > 1) {
#pragma omp barrier
        }
    }
    int64_t first(int64_t items) const { return items * me / of; }
    int64_t last(int64_t items) const { return items * (me + 1) / of; }
};

struct Shares {  // experts for teams, in order; then experts for one thread each, the largest first; then idle ones
    std::vector<int64_t> team, solo, idle, starts;
    int64_t team_rows = 0, solo_rows = 0, num_rows = 0;
};

double heaviest_over_mean(const int64_t* counts, const int64_t* first, const int64_t* last, int64_t threads) {
    std::vector<double> loads(threads, 0.0);
    double total = 0;
    for (; first != last; first++) {
        double cost = (double)counts[*first] + 3 * MR;  // packing the weights costs about as much as three tiles of rows
        *std::min_element(loads.begin(), loads.end()) += cost;
        total += cost;
    }
    return total ? *std::max_element(loads.begin(), loads.end()) * threads / total : 1.0;
}

Shares shares_of(const int64_t* counts, int64_t E, int64_t threads) {
    Shares s;
    s.starts.assign(E + 1, 0);
    std::partial_sum(counts, counts + E, s.starts.begin() + 1);
    s.num_rows = s.starts[E];
    for (int64_t e = 0; e < E; e++) (counts[e] ? s.solo : s.idle).push_back(e);
    std::stable_sort(s.solo.begin(), s.solo.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
    int64_t n = 0, size = (int64_t)s.solo.size();
    const int64_t* order = s.solo.data();
    while (n < size && threads > 1 && heaviest_over_mean(counts, order + n, order + size, threads) > UNEVEN) n++;
    s.team.assign(s.solo.begin(), s.solo.begin() + n);
    s.solo.erase(s.solo.begin(), s.solo.begin() + n);
    if (n) s.team_rows = counts[s.team[0]];
    if (!s.solo.empty()) s.solo_rows = counts[s.solo[0]];
    return s;
}

struct Sizes {
    int64_t D, F, H;
    int64_t block(int64_t count, int64_t members, int64_t widest) const {  // rows of a block, so that members have as many
        int64_t most = std::clamp(BLOCK_BYTES / (2 * widest) / MR * MR, MR, MAX_BLOCK);
        return std::min(most, round_up(div_up(count, round_up(div_up(count, most), members)), MR));
    }
};

// Parts of one block of memory, each at a multiple of 64 bytes.
struct Arena {
    char* base;
    int64_t used = 0;
    template <class T>
    T* take(int64_t n) {
        T* at = (T*)(base + used);
        used += round_up(n * (int64_t)sizeof(T), 64);
        return at;
    }
};

struct ForExpert {  // packed matrices, shared by a team. forward: up and down. backward: those and four of rows
    uint32_t *up, *down, *grad_y, *a, *grad_z, *x;
    ForExpert(Arena& arena, const Sizes& s, int64_t rows, bool backward) {
        int64_t k2 = div_up(rows, 2);
        up = arena.take<uint32_t>(s.H * s.D / 2);
        down = arena.take<uint32_t>(s.D * s.F / 2);
        if (!backward) return;
        grad_y = arena.take<uint32_t>(round_up(s.D, MR) * k2);
        grad_z = arena.take<uint32_t>(round_up(s.H, MR) * k2);
        a = arena.take<uint32_t>(s.F * k2);
        x = arena.take<uint32_t>(s.D * k2);
    }
};

struct ForBlock {  // rows of one block, a thread's own
    bf16 *rows, *a, *grad_z;
    ForBlock(Arena& arena, const Sizes& s, bool backward) {
        rows = arena.take<bf16>(MAX_BLOCK * (s.D + PAD));
        a = arena.take<bf16>(MAX_BLOCK * (s.F + PAD));
        grad_z = backward ? arena.take<bf16>(MAX_BLOCK * (s.H + PAD)) : nullptr;
    }
};

struct Scratch {
    int64_t own, shared, bytes;
    Scratch(const Sizes& s, const Shares& shares, int64_t threads, bool backward) {
        Arena team{nullptr}, solo{nullptr};
        ForExpert(team, s, shares.team_rows, backward);
        ForExpert(solo, s, shares.solo_rows, backward);
        shared = shares.team.empty() ? 0 : team.used;
        ForBlock(solo, s, backward);
        own = round_up(solo.used, 4096) + 64;  // not a power of two: threads don't meet in the same cache sets
        bytes = shared + threads * own;
    }
};

// Each thread: the teams' experts, then the next of the others until there are none. expert(e, member, packed).
template <class Expert, class Idle>
void for_each_expert(const Sizes& s, const Shares& shares, int64_t most_threads, char* memory, bool backward, Expert expert,
                     Idle idle) {
    std::atomic<size_t> next{0};
#pragma omp parallel num_threads(most_threads)
    {
        int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        Scratch scratch(s, shares, threads, backward);
        Arena own{memory + scratch.shared + me * scratch.own}, team{memory};
        ForBlock block(own, s, backward);
        if (!shares.team.empty()) {
            ForExpert packed(team, s, shares.team_rows, backward);
            for (int64_t e : shares.team) expert(e, Member{me, threads}, packed, block);
        }
        ForExpert packed(own, s, shares.solo_rows, backward);
        for (size_t i = next++; i < shares.solo.size() + shares.idle.size(); i = next++)
            if (i < shares.solo.size()) expert(shares.solo[i], Member{0, 1}, packed, block);
            else idle(shares.idle[i - shares.solo.size()]);
    }
}

// ------------------------------------------------------------------------------------------------ products

// rows (m tiles of a block, row by row) times panels; store(m tile, panel, sums).
template <class Store>
void times_panels(const bf16* rows, int64_t ld, int64_t tiles, const uint32_t* b, int64_t panels, int64_t k2, Store store) {
    alignas(64) float c[MR * NR];
    for (int64_t p = 0; p < panels; p++)
        for (int64_t m = 0; m < tiles; m++) {
            tile<1>(words(rows + m * MR * ld), ld / 2, b + p * k2 * NR, k2, c);
            store(m, p, c);
        }
}

// out (M, N) from packed rows: the gradient of a weight; a member's share of the panels of A.
void weight_gradient(const uint32_t* a, const uint32_t* b, int64_t M, int64_t N, int64_t k2, bf16* out, Member member) {
    alignas(64) float c[MR * NR];
    int64_t tiles = div_up(M, MR), end = member.last(tiles), group = std::max<int64_t>(1, BLOCK_BYTES / (4 * MR * k2));
    for (int64_t start = member.first(tiles); start < end; start += group)
        for (int64_t p = 0; p < N / NR; p++)
            for (int64_t t = start; t < std::min(end, start + group); t++) {
                tile<MR>(a + t * k2 * MR, 1, b + p * k2 * NR, k2, c);
                for (int64_t m = t * MR; m < std::min(M, (t + 1) * MR); m++)
                    _mm512_stream_si512((__m512i*)(out + m * N + p * NR), narrow32(c + (m - t * MR) * NR));
            }
    _mm_sfence();
}

void store_rows(bf16* out, int64_t N, int64_t count, int64_t m, int64_t p, const float* c) {
    for (int64_t i = m * MR; i < std::min(count, (m + 1) * MR); i++)
        _mm512_storeu_si512(out + i * N + p * NR, narrow32(c + (i - m * MR) * NR));
}

struct Forward {
    const bf16 *x, *up, *down;
    const float* weights;
    const int64_t *tokens, *counts;
    bf16 *z, *y;  // z: null where it is not kept

    void expert(int64_t e, const Sizes& s, int64_t start, Member member, ForExpert& packed, ForBlock& block) const {
        const bf16 *up_e = up + e * s.H * s.D, *down_e = down + e * s.D * s.F;
        for (int64_t p = member.first(s.F / 16); p < member.last(s.F / 16); p++) {  // 16 gates and their 16 values
            pack_transposed(up_e + p * 16 * s.D, s.D, packed.up + p * s.D / 2 * NR);
            pack_transposed(up_e + (s.F + p * 16) * s.D, s.D, packed.up + p * s.D / 2 * NR + 16);
        }
        for (int64_t p = member.first(s.D / 16); p < member.last(s.D / 16); p++)
            pack_transposed(down_e + p * 16 * s.F, s.F, packed.down + p / 2 * (s.F / 2) * NR + p % 2 * 16);
        member.sync();
        int64_t rows = s.block(counts[e], member.of, std::max(s.D, s.F)), blocks = div_up(counts[e], rows);
        for (int64_t i = member.first(blocks); i < member.last(blocks); i++)
            rows_of(start + i * rows, std::min(rows, counts[e] - i * rows), s, packed, block);
        member.sync();
    }

    void rows_of(int64_t first, int64_t count, const Sizes& s, const ForExpert& packed, ForBlock& block) const {
        int64_t tiles = div_up(count, MR), ld_x = s.D + PAD, ld_a = s.F + PAD;
        gather(x, tokens + first, count, tiles * MR, s.D, block.rows, ld_x);
        times_panels(block.rows, ld_x, tiles, packed.up, s.F / 16, s.D / 2, [&](int64_t m, int64_t p, const float* c) {
            for (int64_t i = m * MR; i < (m + 1) * MR; i++, c += NR) {
                bf16* a = block.a + i * ld_a + p * 16;
                if (i >= count) {
                    store16(a, _mm512_setzero_ps());
                    continue;
                }
                __m256i gate16 = narrow(_mm512_load_ps(c)), value16 = narrow(_mm512_load_ps(c + 16));
                if (z) {
                    _mm256_storeu_si256((__m256i*)(z + (first + i) * s.H + p * 16), gate16);
                    _mm256_storeu_si256((__m256i*)(z + (first + i) * s.H + s.F + p * 16), value16);
                }
                __m512 gate = widen(gate16), silu = _mm512_mul_ps(gate, sigmoid(gate));  // as backward will see them
                store16(a, _mm512_mul_ps(_mm512_mul_ps(silu, widen(value16)), _mm512_set1_ps(weights[first + i])));
            }
        });
        times_panels(block.a, ld_a, tiles, packed.down, s.D / NR, s.F / 2, [&](int64_t m, int64_t p, const float* c) {
            store_rows(y + first * s.D, s.D, count, m, p, c);
        });
    }
};

struct Backward {
    const bf16 *grad_y, *x, *z, *up, *down;
    const float* weights;
    const int64_t *tokens, *counts;
    bf16* grad_x;
    float* grad_weights;
    bf16 *grad_up, *grad_down;

    void expert(int64_t e, const Sizes& s, int64_t start, Member member, ForExpert& packed, ForBlock& block) const {
        const bf16 *up_e = up + e * s.H * s.D, *down_e = down + e * s.D * s.F;
        int64_t D2 = s.D / 2, F2 = s.H / 2, k2 = div_up(counts[e], 2);
        pack_rows_of_weight(down_e, s.F, member.first(D2), member.last(D2), D2, packed.down);
        pack_rows_of_weight(up_e, s.D, member.first(F2), member.last(F2), F2, packed.up);
        member.sync();
        int64_t rows = s.block(counts[e], member.of, s.H), blocks = div_up(counts[e], rows);
        for (int64_t i = member.first(blocks); i < member.last(blocks); i++)
            rows_of(start, i * rows, std::min(rows, counts[e] - i * rows), k2, s, packed, block);
        member.sync();
        weight_gradient(packed.grad_y, packed.a, s.D, s.F, k2, grad_down + e * s.D * s.F, member);
        weight_gradient(packed.grad_z, packed.x, s.H, s.D, k2, grad_up + e * s.H * s.D, member);
        member.sync();
    }

    // `count` rows from the expert's row `from`, which is even: their gradients, and their part of the packed rows.
    void rows_of(int64_t start, int64_t from, int64_t count, int64_t k2, const Sizes& s, const ForExpert& packed,
                 ForBlock& block) const {
        int64_t tiles = div_up(count, MR), first = start + from, pairs = div_up(count, 2);
        int64_t ld_x = s.D + PAD, ld_a = s.F + PAD, ld_z = s.H + PAD;
        for (int64_t i = 0; i < count * s.H; i += 32) _mm_prefetch((const char*)(z + first * s.H + i), _MM_HINT_T1);
        for (int64_t i = 0; i < count; i++) grad_weights[first + i] = 0;
        gather(grad_y, tokens + first, count, tiles * MR, s.D, block.rows, ld_x);
        times_panels(block.rows, ld_x, tiles, packed.down, s.F / NR, s.D / 2, [&](int64_t m, int64_t p, const float* c) {
            for (int64_t i = m * MR; i < (m + 1) * MR; i++, c += NR)
                activation_backward(i < count, first + i, p * NR, c, s, block.a + i * ld_a, block.grad_z + i * ld_z);
        });
        times_panels(block.grad_z, ld_z, tiles, packed.up, s.D / NR, s.H / 2, [&](int64_t m, int64_t p, const float* c) {
            store_rows(grad_x + first * s.D, s.D, count, m, p, c);
        });
        pack_a(block.grad_z, ld_z, pairs, s.H, k2, packed.grad_z + from / 2 * MR);
        pack_b(block.a, ld_a, pairs, s.F, k2, packed.a + from / 2 * NR);
        pack_a(block.rows, ld_x, pairs, s.D, k2, packed.grad_y + from / 2 * MR);
        gather(x, tokens + first, count, 2 * pairs, s.D, block.rows, ld_x);
        pack_b(block.rows, ld_x, pairs, s.D, k2, packed.x + from / 2 * NR);
    }

    // 32 of a row's hidden units: a, times the row's weight, and the gradient of z. c: the gradient of a over the weight.
    void activation_backward(bool is_row, int64_t row, int64_t f, const float* c, const Sizes& s, bf16* a, bf16* grad_z) const {
        __m512 sum = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
        for (int64_t j = 0; j < NR; j += 16, f += 16, c += 16) {
            if (!is_row) {
                for (bf16* at : {a + f, grad_z + f, grad_z + s.F + f}) store16(at, _mm512_setzero_ps());
                continue;
            }
            __m512 gate = load16(z + row * s.H + f), value = load16(z + row * s.H + s.F + f);
            __m512 weight = _mm512_set1_ps(weights[row]), grad = _mm512_load_ps(c), share = sigmoid(gate);
            __m512 silu = _mm512_mul_ps(gate, share), out = _mm512_mul_ps(silu, value);
            sum = _mm512_fmadd_ps(grad, out, sum);
            grad = _mm512_mul_ps(grad, weight);
            __m512 slope = _mm512_mul_ps(share, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, share), one));
            store16(a + f, _mm512_mul_ps(out, weight));
            store16(grad_z + f, _mm512_mul_ps(_mm512_mul_ps(grad, value), slope));
            store16(grad_z + s.F + f, _mm512_mul_ps(grad, silu));
        }
        if (is_row) grad_weights[row] += _mm512_reduce_add_ps(sum);
    }
};

}  // namespace

// ------------------------------------------------------------------------------------------------ for ctypes

extern "C" {

// Bytes of memory, at a multiple of 64, that the calls below want for these counts and so many threads.
int64_t lean_scratch_bytes(const int64_t* counts, int64_t E, int64_t D, int64_t F, int64_t threads, int64_t backward) {
    return Scratch(Sizes{D, F, 2 * F}, shares_of(counts, E, threads), threads, backward != 0).bytes;
}

// y (R, D), and z (R, H) where it isn't null. Rows after the last expert's are left as they are.
void lean_forward(const bf16* x, const float* weights, const bf16* up, const bf16* down, const int64_t* tokens,
                  const int64_t* counts, int64_t E, int64_t D, int64_t F, int64_t threads, bf16* z, bf16* y, char* memory) {
    Sizes s{D, F, 2 * F};
    Shares shares = shares_of(counts, E, threads);
    Forward forward{x, up, down, weights, tokens, counts, z, y};
    for_each_expert(
        s, shares, threads, memory, false,
        [&](int64_t e, Member m, ForExpert& p, ForBlock& b) { forward.expert(e, s, shares.starts[e], m, p, b); },
        [](int64_t) {});
}

// grad_x (R, D) by rows, grad_weights (R), grad_up (E, H, D), grad_down (E, D, F), of which idle experts' are zero.
void lean_backward(const bf16* grad_y, const bf16* x, const bf16* z, const float* weights, const bf16* up, const bf16* down,
                   const int64_t* tokens, const int64_t* counts, int64_t E, int64_t D, int64_t F, int64_t threads,
                   bf16* grad_x, float* grad_weights, bf16* grad_up, bf16* grad_down, char* memory) {
    Sizes s{D, F, 2 * F};
    Shares shares = shares_of(counts, E, threads);
    Backward backward{grad_y, x, z, up, down, weights, tokens, counts, grad_x, grad_weights, grad_up, grad_down};
    for_each_expert(
        s, shares, threads, memory, true,
        [&](int64_t e, Member m, ForExpert& p, ForBlock& b) { backward.expert(e, s, shares.starts[e], m, p, b); },
        [&](int64_t e) {
            memset(grad_up + e * s.H * D, 0, s.H * D * sizeof(bf16));
            memset(grad_down + e * D * F, 0, D * F * sizeof(bf16));
        });
}
}
