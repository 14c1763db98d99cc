// Products with float32 and bfloat16 weights in float32 arithmetic.
//
// The columns lie along the lanes of a vector: one sum for each lane, over the columns in order, and the lanes' sums at
// the end. That order is the same for every token and every tile, so a result depends on nothing but its own row of
// weights and its own token.
#pragma once

#include "vectors.h"

// Some columns of a row of weights, and how they meet the same columns of an activation.
template <class T>
struct Plain {
    typedef T Weight;
    static constexpr int COLUMNS = W;
    vec values;
    void read(const T* w) { values = load(w); }
    vec add_product(vec sum, const float* x) const { return fma(values, load(x), sum); }
};

// A register of bfloat16 pairs widens cheapest into its even and its odd elements, so activations lie in that order too
// (see `split_pairs`).
struct Pairs {
    typedef bf16 Weight;
    static constexpr int COLUMNS = 2 * W;
    vec even, odd;
    void read(const bf16* w) {
        uvec u;
        memcpy(&u, w, sizeof u);
        even = (vec)(u << 16), odd = (vec)(u & 0xffff0000u);
    }
    vec add_product(vec sum, const float* x) const { return fma(odd, load(x + W), fma(even, load(x), sum)); }
};

static inline void split_pairs(const float* x, int size, float* out) {
    for (int i = 0; i < size; i += 2 * W)
        for (int j = 0; j < W; j++) out[i + j] = x[i + 2 * j], out[i + W + j] = x[i + 2 * j + 1];
}

// RM rows of W by RN tokens: `out(token, values)` takes the dot products of RM rows with a token.
template <class Columns, int RM, int RN, class Out>
static inline void dot_tile(const typename Columns::Weight* w, size_t w_stride, const float* x, size_t x_stride,
                            int cols, Out out) {
    vec acc[RN * RM] = {};
    for (int k = 0; k < cols; k += Columns::COLUMNS) {
        Columns rows[RM];
        for (int i = 0; i < RM; i++) {
            // The rows after these: short rows end before the processor has seen where they lead.
            __builtin_prefetch(w + (i + RM) * w_stride + k);
            rows[i].read(w + i * w_stride + k);
        }
        for (int j = 0; j < RN; j++) {
            for (int i = 0; i < RM; i++)
                acc[j * RM + i] = rows[i].add_product(acc[j * RM + i], x + j * x_stride + k);
        }
    }
    float totals[RN * RM];
    sums<RN * RM>(acc, totals);
    for (int j = 0; j < RN; j++) out(j, totals + j * RM);
}

// All rows by RN tokens.
template <class Columns, int RN, class Out>
static void dot_rows(const typename Columns::Weight* w, size_t w_stride, int rows, const float* x, size_t x_stride,
                     int cols, Out out) {
    constexpr int RM = (MANY_REGISTERS ? 4 : 2) * (RN == 1 ? 2 : 1);
    int r = 0;
    for (; r + RM <= rows; r += RM)
        dot_tile<Columns, RM, RN>(w + r * w_stride, w_stride, x, x_stride, cols,
                                  [&](int t, const float* values) { out(r, t, values, RM); });
    for (; r < rows; r++)
        dot_tile<Columns, 1, RN>(w + r * w_stride, w_stride, x, x_stride, cols,
                                 [&](int t, const float* values) { out(r, t, values, 1); });
}

// All rows by all tokens, RN at a time, and what is left over at once: `out(row, token, values, count)`.
template <class Columns, int RN = 4, class Out>
static void dot_all(const typename Columns::Weight* w, size_t w_stride, int rows, const float* x, size_t x_stride,
                    int tokens, int cols, Out out, int t = 0) {
    for (; t + RN <= tokens; t += RN)
        dot_rows<Columns, RN>(w, w_stride, rows, x + t * x_stride, x_stride, cols,
                              [&](int r, int j, const float* values, int count) { out(r, t + j, values, count); });
    if constexpr (RN > 1) dot_all<Columns, RN - 1>(w, w_stride, rows, x, x_stride, tokens, cols, out, t);
}
