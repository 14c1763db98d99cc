// Products with 4-bit weights in integers: value = (nibble - 8) * scale, as in GPTQ files.
//
// Sums of BLOCK columns are exact integers, so all instructions give the same; they are scaled and added in float32,
// block after block, group after group, for every token alike.
#pragma once

#include "amx.h"

constexpr int BLOCK = 32;      // activations that share a scale
constexpr int INT4_ROWS = 16;  // rows of weights whose words lie side by side

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define FOUR_AT_ONCE _mm512_dpbusd_epi32
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
#define FOUR_AT_ONCE _mm256_dpbusd_avx_epi32
#endif

// 32 columns of W rows, and their dot products with 32 activations in 8-bit integers.
#if defined(__AVX2__) && defined(__FMA__)
#if defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i octets;
static inline octets everywhere(int32_t x) { return _mm512_set1_epi32(x); }
static inline octets low_nibbles(octets x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline octets shifted(octets x) { return _mm512_srli_epi16(x, 4); }
static inline octets pairs_of(octets w, octets x) { return _mm512_maddubs_epi16(w, x); }
static inline octets add_pairs(octets a, octets b) { return _mm512_add_epi16(a, b); }
static inline octets quads_of(octets pairs) { return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)); }
#else
typedef __m256i octets;
static inline octets everywhere(int32_t x) { return _mm256_set1_epi32(x); }
static inline octets low_nibbles(octets x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
static inline octets shifted(octets x) { return _mm256_srli_epi16(x, 4); }
static inline octets pairs_of(octets w, octets x) { return _mm256_maddubs_epi16(w, x); }
static inline octets add_pairs(octets a, octets b) { return _mm256_add_epi16(a, b); }
static inline octets quads_of(octets pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
#endif
struct Words {
    octets low[4], high[4];
    explicit Words(const uint32_t* w) {
        for (int u = 0; u < 4; u++) {
            octets word;
            memcpy(&word, w + INT4_ROWS * u, sizeof word);
            low[u] = low_nibbles(word), high[u] = low_nibbles(shifted(word));
        }
    }
    inline ivec dot(const int8_t* x, int32_t start) const {
        int32_t q[8];
        memcpy(q, x, sizeof q);
#ifdef FOUR_AT_ONCE
        octets a = everywhere(start), b = everywhere(0);
        for (int u = 0; u < 4; u++) {
            a = FOUR_AT_ONCE(a, low[u], everywhere(q[2 * u]));
            b = FOUR_AT_ONCE(b, high[u], everywhere(q[2 * u + 1]));
        }
        return (ivec)a + (ivec)b;
#else
        octets acc = everywhere(0);  // of 16-bit sums: 8 * 2 * 15 * 127 < 32768
        for (int u = 0; u < 4; u++) {
            acc = add_pairs(acc, pairs_of(low[u], everywhere(q[2 * u])));
            acc = add_pairs(acc, pairs_of(high[u], everywhere(q[2 * u + 1])));
        }
        return (ivec)quads_of(acc) + start;
#endif
    }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Words {
    int8x16_t low[4], high[4];
    explicit Words(const uint32_t* w) {
        for (int u = 0; u < 4; u++) {
            const uint8x16_t word = vld1q_u8((const uint8_t*)(w + INT4_ROWS * u));
            low[u] = vreinterpretq_s8_u8(vandq_u8(word, vdupq_n_u8(15)));
            high[u] = vreinterpretq_s8_u8(vshrq_n_u8(word, 4));
        }
    }
    inline ivec dot(const int8_t* x, int32_t start) const {
        int32_t q[8];
        memcpy(q, x, sizeof q);
        int32x4_t acc = vdupq_n_s32(start);
        for (int u = 0; u < 4; u++) {
            acc = vdotq_s32(acc, low[u], vreinterpretq_s8_s32(vdupq_n_s32(q[2 * u])));
            acc = vdotq_s32(acc, high[u], vreinterpretq_s8_s32(vdupq_n_s32(q[2 * u + 1])));
        }
        return (ivec)acc;
    }
};
#else
struct Words {
    int16_t values[W][BLOCK];
    explicit Words(const uint32_t* w) {
        for (int r = 0; r < W; r++)
            for (int i = 0; i < BLOCK; i++)
                values[r][i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = w[i / 8 * INT4_ROWS + r] >> i % 8 * 4 & 15;
    }
    inline ivec dot(const int8_t* x, int32_t start) const {
        ivec out;
        for (int r = 0; r < W; r++) {
            int32_t total = start;
            for (int i = 0; i < BLOCK; i++) total += values[r][i] * x[i];
            out[r] = total;
        }
        return out;
    }
};
#endif

// What such products read in place of activations (T, cols).
struct Quantised {
    const int8_t* q;       // (cols / BLOCK, T, BLOCK), in the order in which a word of weights is unpacked
    const float* scale;    // (cols / BLOCK, T)
    const int32_t* start;  // (cols / BLOCK, T): -8 * sum of q, what the weights' zero point adds
    int T;
};

// One block of BLOCK activations.
static inline void quantise(const float* x, int8_t* q, float* scale, int32_t* start) {
    float top = 0;
    for (int i = 0; i < BLOCK; i += W) {
        const vec v = load(x + i);
        top = std::max(top, largest(v < 0 ? -v : v));
    }
    const float inverse = top > 0 ? 127.0f / top : 0.0f, magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    int8_t rounded[BLOCK];
    int32_t total = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t value = (int32_t)((x[i] * inverse + magic) - magic);
        rounded[i] = (int8_t)value;
        total += value;
    }
    // An octet of a GPTQ word holds columns 2j (low nibble) and 2j + 1 (high nibble).
    for (int i = 0; i < BLOCK; i++) q[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = rounded[i];
    *scale = top / 127.0f;
    *start = -8 * total;
}

// W rows by N tokens from t0 on: `out(token, vec)`.
template <int N, class Out>
static inline void int4_tile(const uint32_t* words, const float* scales, int groups, int blocks, const Quantised& x,
                             int t0, Out out) {
    vec total[N] = {};
    for (int g = 0; g < groups; g++) {
        vec part[N] = {};
        for (int b = g * blocks; b < (g + 1) * blocks; b++) {
            const Words w(words + (size_t)b * (BLOCK / 8 * INT4_ROWS));
            const size_t place = (size_t)b * x.T + t0;
            for (int j = 0; j < N; j++) {
                const ivec integers = w.dot(x.q + (place + j) * BLOCK, x.start[place + j]);
                part[j] = fma(__builtin_convertvector(integers, vec), vec{} + x.scale[place + j], part[j]);
            }
        }
        const vec scale = load(scales + (size_t)g * INT4_ROWS);
        for (int j = 0; j < N; j++) total[j] = fma(part[j], scale, total[j]);
    }
    for (int j = 0; j < N; j++) out(t0 + j, total[j]);
}

template <int N = MANY_REGISTERS ? 8 : 4, class Out>
static void int4_tokens(const uint32_t* words, const float* scales, int groups, int blocks, const Quantised& x, Out out,
                        int t = 0) {
    for (; t + N <= x.T; t += N) int4_tile<N>(words, scales, groups, blocks, x, t, out);
    if constexpr (N > 1) int4_tokens<N / 2>(words, scales, groups, blocks, x, out, t);
}

#if QWEN_AMX && defined(__AMX_INT8__) && defined(FOUR_AT_ONCE)
constexpr int MANY_TOKENS = 16;  // that fill a tile

// Sums of one block for 16 tokens and 16 rows (16, 16), in one or the other set of tiles: two can be under way.
static inline void block_sums_0(const int8_t* q, const uint8_t* unpacked, int32_t* sums) {
    _tile_zero(0);
    _tile_loadd(4, q, BLOCK);
    _tile_loadd(6, unpacked, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, sums, 64);
}

static inline void block_sums_1(const int8_t* q, const uint8_t* unpacked, int32_t* sums) {
    _tile_zero(1);
    _tile_loadd(5, q, BLOCK);
    _tile_loadd(7, unpacked, 64);
    _tile_dpbsud(1, 5, 7);
    _tile_stored(1, sums, 64);
}

// 16 rows of weights as bytes, 4 columns of each side by side: (cols / BLOCK, 8, 16, 4).
static inline void unpack_rows(const uint32_t* words, int count, uint8_t* unpacked) {
    for (int i = 0; i < count * BLOCK / 8; i++, words += INT4_ROWS, unpacked += 2 * sizeof(octets)) {
        octets word;
        memcpy(&word, words, sizeof word);
        const octets low = low_nibbles(word), high = low_nibbles(shifted(word));
        memcpy(unpacked, &low, sizeof low), memcpy(unpacked + sizeof low, &high, sizeof high);
    }
}

// 16 rows by as many tokens as fill tiles; how many those are. The same numbers as those of `int4_tokens`.
template <class Out>
static int int4_tiles(const uint32_t* words, const float* scales, int groups, int blocks, const Quantised& x, Out out) {
    static thread_local std::vector<uint8_t> unpacked;
    constexpr int SIZE = BLOCK * INT4_ROWS;
    unpacked.resize((size_t)groups * blocks * SIZE);
    unpack_rows(words, groups * blocks, unpacked.data());
    alignas(64) int32_t sums[2][MANY_TOKENS * INT4_ROWS];
    int t = 0;
    for (; t + MANY_TOKENS <= x.T; t += MANY_TOKENS) {
        const auto begin = [&](int b) {
            const int8_t* q = x.q + ((size_t)b * x.T + t) * BLOCK;
            b % 2 ? block_sums_1(q, &unpacked[(size_t)b * SIZE], sums[1])
                  : block_sums_0(q, &unpacked[(size_t)b * SIZE], sums[0]);
        };
        vec total[MANY_TOKENS] = {};
        begin(0);
        for (int g = 0; g < groups; g++) {
            vec part[MANY_TOKENS] = {};
            for (int b = g * blocks; b < (g + 1) * blocks; b++) {
                if (b + 1 < groups * blocks) begin(b + 1);
                asm volatile("" ::: "memory");
                const size_t place = (size_t)b * x.T + t;
                for (int j = 0; j < MANY_TOKENS; j++) {
                    ivec integers;
                    memcpy(&integers, sums[b % 2] + j * INT4_ROWS, sizeof integers);
                    integers += x.start[place + j];
                    part[j] = fma(__builtin_convertvector(integers, vec), vec{} + x.scale[place + j], part[j]);
                }
            }
            const vec scale = load(scales + (size_t)g * INT4_ROWS);
            for (int j = 0; j < MANY_TOKENS; j++) total[j] = fma(part[j], scale, total[j]);
        }
        for (int j = 0; j < MANY_TOKENS; j++) out(t + j, total[j]);
    }
    return t;
}
#else
constexpr int MANY_TOKENS = 1 << 30;
template <class Out>
static int int4_tiles(const uint32_t*, const float*, int, int, const Quantised&, Out) {
    return 0;
}
#endif
