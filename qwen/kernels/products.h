// y = x W^T + bias for weights of every kind: prepares the activations, and shares the rows of W between threads.
#pragma once

#include <cstdlib>
#include <memory>
#include "amx.h"
#include "dense.h"
#include "int4.h"
#include "team.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT4 = 2, NATIVE_BF16 = 3 };

struct Matrix {
    const void* weight;   // (rows, cols), or for INT4 words of 8 values: (rows / 16, cols / 8, 16)
    const float* scales;  // INT4: (rows / 16, cols / group, 16)
    const float* bias;    // (rows) or null
    int32_t kind, rows, cols, group;
};

static inline bool in_tiles(int32_t kind) { return kind == NATIVE_BF16 && tiles_allowed(); }

// Whether products with weights of this kind may use tiles.
static inline Tiles tiles_for(int32_t kind) {
    return Tiles((kind == INT4 || kind == NATIVE_BF16) && tiles_allowed(), kind == INT4);
}

// Memory that begins at a cache line and is not cleared.
template <class T>
struct Buffer {
    std::unique_ptr<T, decltype(&std::free)> memory{nullptr, &std::free};

    void resize(size_t size) { memory.reset((T*)std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64)); }
    T* data() const { return memory.get(); }
};

// Activations (T, cols) of a product, and what weights of a kind are multiplied with in their place.
struct Activations {
    Buffer<float> values, prepared;
    Buffer<int8_t> q;
    Buffer<float> scale;
    Buffer<int32_t> start;
    Buffer<uint16_t> tiles;  // where NATIVE_BF16 runs in tiles
    int T = 0, cols = 0;

    void resize(int tokens, int columns, int32_t kind) {
        T = tokens, cols = columns;
        const size_t size = (size_t)T * cols;
        values.resize(size);
        if (in_tiles(kind)) {
            tiles.resize(tiles_size(T, cols));
            if (T % TILE_TOKENS) {  // columns that no token has
                const size_t last = tiles_size(TILE_TOKENS, cols);
                memset(tiles.data() + tiles_size(T, cols) - last, 0, last * sizeof(uint16_t));
            }
        } else if (kind == BFLOAT16 || kind == NATIVE_BF16) {
            prepared.resize(size);
        }
        if (kind != INT4) return;
        q.resize(size), scale.resize(size / BLOCK), start.resize(size / BLOCK);
    }

    // Called when row t of `values` is there.
    void prepare(int t, int32_t kind) {
        const float* x = values.data() + (size_t)t * cols;
        if (kind == INT4)
            for (size_t b = 0; b < (size_t)cols / BLOCK; b++) {
                const size_t place = b * T + t;
                quantise(x + b * BLOCK, q.data() + place * BLOCK, scale.data() + place, start.data() + place);
            }
        if (kind == BFLOAT16) split_pairs(x, cols, prepared.data() + (size_t)t * cols);
        if (in_tiles(kind)) {
            fill_tiles(x, cols, t, tiles.data());
        } else if (kind == NATIVE_BF16) {  // as the sum of two bfloat16
            float rounded[2 * W];
            for (int k = 0; k < cols; k += 2 * W) {
                for (int i = 0; i < 2 * W; i++) {
                    const float high = round_to_bf16(x[k + i]);
                    rounded[i] = high + round_to_bf16(x[k + i] - high);
                }
                split_pairs(rounded, 2 * W, prepared.data() + (size_t)t * cols + k);
            }
        }
    }
};

// y[i] (+)= v[i] + bias[i].
static inline void give(float* y, const float* v, const float* bias, int count, bool add) {
    int i = 0;
    for (; i + W <= count; i += W) {
        const vec value = bias ? load(v + i) + load(bias + i) : load(v + i);
        store(y + i, add ? load(y + i) + value : value);
    }
    for (; i < count; i++) {
        const float value = bias ? v[i] + bias[i] : v[i];
        y[i] = add ? y[i] + value : value;
    }
}

// y[t][r] (+)= W[r] . x[t] + bias[r] for rows [from, to); multiples of INT4_ROWS where W is INT4.
static void multiply_rows(const Matrix& m, int from, int to, const Activations& x, float* y, bool add) {
    const auto out = [&](int r, int t, const float* v, int count) {
        give(y + (size_t)t * m.rows + r, v, m.bias ? m.bias + r : nullptr, count, add);
    };
    if (m.kind == INT4) {
        const int groups = m.cols / m.group, blocks = m.group / BLOCK;
        const Quantised input{x.q.data(), x.scale.data(), x.start.data(), x.T};
        for (int r = from; r < to; r += W) {
            const size_t block = r / INT4_ROWS, lane = r % INT4_ROWS;
            const uint32_t* words = (const uint32_t*)m.weight + block * (m.cols / 8) * INT4_ROWS + lane;
            const float* scales = m.scales + block * groups * INT4_ROWS + lane;
            const auto take = [&](int t, vec v) {
                float values[W];
                store(values, v);
                out(r, t, values, W);
            };
            const bool many = x.T >= MANY_TOKENS && tiles_allowed();
            const int done = many ? int4_tiles(words, scales, groups, blocks, input, take) : 0;
            int4_tokens(words, scales, groups, blocks, input, take, done);
        }
        return;
    }
    const auto shifted = [&](int r, int t, const float* v, int count) { out(from + r, t, v, count); };
    const size_t cols = m.cols, begin = from * cols;
    if (in_tiles(m.kind))
        tile_all((const bf16*)m.weight + begin, cols, to - from, x.tiles.data(), x.T, shifted);
    else if (m.kind == FLOAT32)
        dot_all<Plain<float>>((const float*)m.weight + begin, cols, to - from, x.values.data(), cols, x.T, cols, shifted);
    else
        dot_all<Pairs>((const bf16*)m.weight + begin, cols, to - from, x.prepared.data(), cols, x.T, cols, shifted);
}

// Rows of W that a thread takes at a time: several shares for each, so that none waits long for a slower one; not more
// than stay in its second-level cache while all tokens pass.
static int share(const Matrix& m, const Team& team) {
    if (in_tiles(m.kind)) {
        constexpr int tall = TALL * TILE_ROWS;  // what is read at once
        return std::clamp(m.rows / (8 * team.threads) / tall * tall, tall, 2 * tall);
    }
    const int bits = m.kind == INT4 ? 5 : m.kind == FLOAT32 ? 32 : 16;
    const int most = std::max(16, (1 << 21) / (m.cols * bits) / 16 * 16);  // 256 KiB
    return std::clamp(m.rows / (8 * team.threads) / 16 * 16, 16, std::min(128, most));
}

// Called by all threads.
static void multiply(Team& team, const Matrix& m, const Activations& x, float* y, bool add) {
    team.each(m.rows, share(m, team), [&](int from, int to) { multiply_rows(m, from, to, x, y, add); });
}

// Called by all threads: `make(t)` fills row t of x; then x is ready for products with weights of this kind.
template <class Make>
static void prepare(Team& team, Activations& x, int32_t kind, Make make) {
    // Tokens of a tile lie in the same cache lines, which two threads would take from each other.
    team.each(x.T, in_tiles(kind) ? TILE_TOKENS : 1, [&](int from, int to) {
        for (int t = from; t < to; t++) {
            make(t);
            x.prepare(t, kind);
        }
    });
}
