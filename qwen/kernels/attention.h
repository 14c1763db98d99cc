// Attention of one head over a sequence's keys and values, page after page, as in FlashAttention (Dao et al., 2022).
//
// Pages are counted from the sequence's own first token, and a query's running maximum, sum and output pass through them
// in order. So a query's result depends on its own position alone: not on padding, nor on the queries computed beside it.
#pragma once

#include "dense.h"

constexpr int KEYS = 64;     // of a page
constexpr int QUERIES = 32;  // that share a pass over keys and values

// Where a sequence's keys and values lie in a layer; strides in elements.
struct KeyValues {
    void *keys, *values;
    const int32_t* table;  // page i of the sequence is page table[i] there; null where they lie one after the other
    int64_t page_stride, head_stride;

    int64_t page(int i) const { return (table ? table[i] : i) * page_stride; }
    // Padding, at positions below 0, lies before the first page.
    int64_t place(int position, int D) const {
        return position < 0 ? (int64_t)position * D : page(position / KEYS) + position % KEYS * D;
    }
};

// Dimension i turns with dimension i + D/2.
template <class T>
static void rotate(const float* x, const float* cos, const float* sin, int D, float scale, T* out) {
    const int half = D / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i], c = cos[i], s = sin[i];
        put(out + i, (a * c - b * s) * scale);
        put(out + half + i, (b * c + a * s) * scale);
    }
}

// A query's running softmax.
struct Running {
    float top = -INFINITY, total = 0;

    // Scores [lo, hi) of a block become weights relative to the running maximum, all others 0. What has been summed so
    // far is to be multiplied by the result.
    float pass(float* scores, int lo, int hi) {
        if (hi <= lo) {
            std::fill(scores, scores + KEYS, 0.0f);
            return 1.0f;
        }
        std::fill(scores, scores + lo, -INFINITY);
        std::fill(scores + hi, scores + KEYS, -INFINITY);
        vec most = load(scores);
        for (int s = W; s < KEYS; s += W) most = load(scores + s) > most ? load(scores + s) : most;
        const float now = std::max(top, largest(most));
        const float factor = now == top ? 1.0f : exp(vec{} + (top - now))[0];
        vec added = {};
        for (int s = 0; s < KEYS; s += W) {
            const vec score = load(scores + s), e = exp(score - now);
            const vec weight = score == -INFINITY ? vec{} : e;
            store(scores + s, weight);
            added += weight;
        }
        top = now, total = total * factor + sum(added);
        return factor;
    }
};

// out[j] = out[j] * factor[j] + the sum over s of p[j][s] * values[s], for N queries and COLS vectors of the head.
template <int N, int COLS, class T>
static inline void mix_tile(const float (*p)[KEYS], const float* factor, const T* values, int size, int D, float* out,
                            size_t out_stride) {
    vec acc[N][COLS];
    for (int j = 0; j < N; j++)
        for (int c = 0; c < COLS; c++) acc[j][c] = load(out + j * out_stride + c * W) * factor[j];
    for (int s = 0; s < size; s++)
        for (int c = 0; c < COLS; c++) {
            const vec v = load(values + (size_t)s * D + c * W);
            for (int j = 0; j < N; j++) acc[j][c] = fma(v, vec{} + p[j][s], acc[j][c]);
        }
    for (int j = 0; j < N; j++)
        for (int c = 0; c < COLS; c++) store(out + j * out_stride + c * W, acc[j][c]);
}

template <int N, class T>
static void mix(const float (*p)[KEYS], const float* factor, const T* values, int size, int D, float* out,
                size_t out_stride) {
    constexpr int COLS = MANY_REGISTERS ? 4 : 2;
    int d = 0;
    for (; d + COLS * W <= D; d += COLS * W) mix_tile<N, COLS>(p, factor, values + d, size, D, out + d, out_stride);
    for (; d < D; d += W) mix_tile<N, 1>(p, factor, values + d, size, D, out + d, out_stride);
}

// `count` queries (count, D) of head h, the first of them at `position`. A query sees itself and what is before it,
// `window` tokens in all if that is not 0.
template <class T>
static void attend(const float* query, size_t query_stride, const KeyValues& cache, int h, int position, int count,
                   int window, int D, float* out, size_t out_stride) {
    alignas(64) float p[QUERIES][KEYS];
    float factor[QUERIES];
    Running running[QUERIES];
    for (int j = 0; j < count; j++) std::fill(out + j * out_stride, out + j * out_stride + D, 0.0f);
    const int end = position + count, seen = window ? std::max(0, position + 1 - window) : 0;
    for (int begin = seen / KEYS * KEYS; begin < end; begin += KEYS) {
        const int size = std::min(KEYS, end - begin);
        const int64_t place = cache.page(begin / KEYS) + h * cache.head_stride;
        dot_all<Plain<T>>((const T*)cache.keys + place, D, size, query, query_stride, count, D,
                          [&](int s, int j, const float* v, int n) { std::copy(v, v + n, p[j] + s); });
        for (int j = 0; j < count; j++) {
            const int lo = window ? std::max(0, position + j + 1 - window - begin) : 0;
            factor[j] = running[j].pass(p[j], lo, std::min(KEYS, position + j + 1 - begin));
        }
        const T* v = (const T*)cache.values + place;
        int j = 0;
        for (; j + 4 <= count; j += 4) mix<4>(p + j, factor + j, v, size, D, out + j * out_stride, out_stride);
        for (; j < count; j++) mix<1>(p + j, factor + j, v, size, D, out + j * out_stride, out_stride);
    }
    for (int j = 0; j < count; j++) {
        const float inverse = running[j].total > 0 ? 1.0f / running[j].total : 0.0f;
        for (int d = 0; d < D; d++) out[j * out_stride + d] *= inverse;
    }
}
