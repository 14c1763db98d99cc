// Vectors of float32 and bfloat16 for every processor, in GCC's own vector types.
//
// The compiler is told not to contract a * b + c: where a product is added without rounding in between, the source says
// `fma`. So all paths round alike, however the compiler unrolls them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int W = 16;  // float32 lanes of a vector
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
#if defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;  // 32 of them, else 16
#else
constexpr bool MANY_REGISTERS = W == 16;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

static inline vec load(const float* p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vec load(const bf16* p) {  // a bfloat16 is the upper half of a float32
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

// a * b + c, rounded once where the processor can.
static inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// The nearest bfloat16, ties to even, as a float32. Loops over it become vector instructions.
static inline float round_to_bf16(float x) {
    const uint32_t u = bits_of(x);
    return float_of((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}

static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) { p->bits = bits_of(round_to_bf16(x)) >> 16; }

// ---- sums over lanes: always lane i with lane i + W/2, then i + W/4, and so on ----

template <int size, int upper, int... I>
static inline vec halves(vec a, vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / (size / 2) * size + I % (size / 2) + upper * (size / 2))...);
}

// Each run of `size` lanes of a, then of b, is added up to half the size.
template <int size>
static inline vec fold(vec a, vec b) {
    constexpr std::make_integer_sequence<int, W> lanes;
    return halves<size, 0>(a, b, lanes) + halves<size, 1>(a, b, lanes);
}

static inline vec sum_each(vec (&v)[W]) {  // lane i of the result is the sum of v[i]
    if constexpr (W == 16)
        for (int i = 0; i < 8; i++) v[i] = fold<16>(v[2 * i], v[2 * i + 1]);
    if constexpr (W >= 8)
        for (int i = 0; i < 4; i++) v[i] = fold<8>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++) v[i] = fold<4>(v[2 * i], v[2 * i + 1]);
    return fold<2>(v[0], v[1]);
}

// out[i] = the sum of v[i], N of them.
template <int N>
static inline void sums(const vec* v, float* out) {
    vec some[W] = {};
    for (int i = 0; i < std::min(N, W); i++) some[i] = v[i];
    const vec total = sum_each(some);
    memcpy(out, &total, std::min(N, W) * sizeof(float));
    if constexpr (N > W) sums<N - W>(v + W, out + W);
}

static inline float sum(vec v) {
    float out;
    sums<1>(&v, &out);
    return out;
}

static inline float largest(vec v) {
    float top = v[0];
    for (int i = 1; i < W; i++) top = std::max(top, v[i]);
    return top;
}

static inline vec exp(vec x) {  // e^x to about 1e-7: x = n ln 2 + r, a polynomial in r, n into the exponent bits
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const vec n = fma(x, vec{} + 1.44269504f, magic) - magic;
    const vec r = fma(n, vec{} + 2.12194440e-4f, fma(n, vec{} - 0.693359375f, x));
    vec p = vec{} + 1.9875691e-4f;
    p = fma(p, r, vec{} + 1.3981999e-3f);
    p = fma(p, r, vec{} + 8.3334519e-3f);
    p = fma(p, r, vec{} + 4.1665796e-2f);
    p = fma(p, r, vec{} + 1.6666665e-1f);
    p = fma(p, r, vec{} + 5.0000001e-1f);
    p = fma(p * r, r, r + 1.0f);
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}
