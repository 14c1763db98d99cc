// Products with bfloat16 weights in the tiles of Intel's AMX.
//
// A float32 activation is two bfloat16, its rounded value and what rounding left, so hardly anything is lost: each has a
// column of its own in a tile, and the two sums are added at the end. A column's sum runs over the weights' columns in
// order, whatever the other columns hold: so a result depends on its own token alone.
#pragma once

#include <vector>
#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define QWEN_AMX 1
#else
#define QWEN_AMX 0
#endif

constexpr int TILE_TOKENS = 8;                    // that share a tile: 16 columns
constexpr int TILE_ROWS = 16;                     // rows of weights
constexpr int TALL = 4;                           // times TILE_ROWS are read at once for few tokens
constexpr int TILE_COLUMNS = 32;                  // columns of weights
constexpr int TILE_SIZE = TILE_ROWS * TILE_COLUMNS;  // bfloat16 values of weights, and of activations

// Tokens (T, cols) as tiles: (T / 8, cols / 32, 16 pairs of columns, 8 tokens rounded and 8 times what was left, 2).
static inline size_t tiles_size(int tokens, int cols) {
    return (size_t)(tokens + TILE_TOKENS - 1) / TILE_TOKENS * (cols / TILE_COLUMNS) * TILE_SIZE;
}

static inline void fill_tiles(const float* x, int cols, int t, uint16_t* tiles) {
    tiles += (size_t)(t / TILE_TOKENS) * (cols / TILE_COLUMNS) * TILE_SIZE + 2 * (t % TILE_TOKENS);
    for (int k = 0; k < cols; k += TILE_COLUMNS, x += TILE_COLUMNS) {
        uint16_t rounded[TILE_COLUMNS], left[TILE_COLUMNS];
        for (int i = 0; i < TILE_COLUMNS; i++) {  // in vectors
            const float high = round_to_bf16(x[i]);
            rounded[i] = bits_of(high) >> 16;
            left[i] = bits_of(round_to_bf16(x[i] - high)) >> 16;
        }
        for (int i = 0; i < TILE_COLUMNS; i += 2, tiles += 2 * TILE_ROWS)
            memcpy(tiles, rounded + i, 4), memcpy(tiles + 2 * TILE_TOKENS, left + i, 4);
    }
}

#if QWEN_AMX
// Whether the system lets this process use tiles; asked once.
static bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return allowed;
}

// While it lives, its thread computes in tiles: of 16 rows of 64 bytes; for 4-bit weights tiles 4 and 5 hold 16 tokens
// of 32 bytes, and tiles 6 and 7 those 32 columns of 16 rows of weights.
struct Tiles {
    bool used;
    explicit Tiles(bool use, bool four_bits = false) : used(use) {
        if (!used) return;
        alignas(64) uint8_t config[64] = {1};  // the palette
        for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
        if (four_bits) config[16 + 2 * 4] = config[16 + 2 * 5] = 32, config[48 + 6] = config[48 + 7] = 8;
        _tile_loadconfig(config);
    }
    ~Tiles() {
        if (used) _tile_release();
    }
    Tiles(const Tiles&) = delete;
};

// RM x 16 rows of weights by RN x 8 tokens into sums (RM, RN, 16 rows, 16 columns).
template <int RM, int RN>
static inline void tile_products(const bf16* w, size_t cols, const uint16_t* x, float* sums) {
    const size_t stride = cols * sizeof(bf16), steps = cols / TILE_COLUMNS, more = steps * TILE_SIZE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t s = 0; s < steps; s++, w += TILE_COLUMNS, x += TILE_SIZE) {
        _tile_loadd(4, w, stride);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (RN > 1) {
            _tile_loadd(7, x + more, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (RM > 1) {
            _tile_loadd(5, w + TILE_ROWS * cols, stride);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (RN > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    if constexpr (RN > 1) _tile_stored(1, sums + 256, 64);
    if constexpr (RM > 1) _tile_stored(2, sums + RN * 256, 64);
    if constexpr (RM > 1 && RN > 1) _tile_stored(3, sums + 3 * 256, 64);
    asm volatile("" ::: "memory");
}

template <int from, int... I>
static inline vec zip(vec a, vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (from + I / 2 + I % 2 * W)...);
}

// A tile's sums (16 rows, 8 tokens rounded and 8 times what was left): `out(token, values)` takes each token's 16 rows.
template <class Out>
static inline void read_tile(const float* sums, int tokens, Out out) {
    if (tokens < 3) {
        float column[TILE_ROWS];
        for (int t = 0; t < tokens; t++) {
            for (int r = 0; r < TILE_ROWS; r++) column[r] = sums[r * 16 + t] + sums[r * 16 + TILE_TOKENS + t];
            out(t, column);
        }
        return;
    }
    constexpr std::make_integer_sequence<int, W> lanes;
    vec rows[W];
    for (int r = 0; r < W; r++) rows[r] = load(sums + r * W);
    for (int pass = 1; pass < W; pass *= 2) {  // as two halves of a pack of cards are shuffled: rows become columns
        vec next[W];
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = zip<0>(rows[i], rows[i + W / 2], lanes);
            next[2 * i + 1] = zip<W / 2>(rows[i], rows[i + W / 2], lanes);
        }
        memcpy(rows, next, sizeof next);
    }
    for (int t = 0; t < tokens; t++) {
        float column[TILE_ROWS];
        store(column, rows[t] + rows[TILE_TOKENS + t]);
        out(t, column);
    }
}

// 64 rows of weights by 8 tokens into sums (4, 16 rows, 16 columns): few tokens wait for the memory, which is fastest
// when many rows are read at once.
static inline void tall_products(const bf16* w, size_t cols, const uint16_t* x, float* sums) {
    const size_t stride = cols * sizeof(bf16), steps = cols / TILE_COLUMNS, next = TILE_ROWS * cols;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t s = 0; s < steps; s++, w += TILE_COLUMNS, x += TILE_SIZE) {
        _tile_loadd(6, x, 64);
        _tile_loadd(4, w, stride);
        _tile_loadd(5, w + next, stride);
        _tile_loadd(7, w + 2 * next, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(4, w + 3 * next, stride);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 7, 6);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    asm volatile("" ::: "memory");
}

// RM x 16 rows by all tokens [from, to), a multiple of 8 apart from the last: `out(row, token, values, 16)`.
template <int RM, class Out>
static inline void tile_tokens(const bf16* w, size_t cols, const uint16_t* x, int from, int to, Out out) {
    alignas(64) float sums[4 * 256];
    const size_t group = cols / TILE_COLUMNS * TILE_SIZE;
    for (int t = from; t < to;) {
        const bool two = RM != TALL && to - t > TILE_TOKENS;
        const uint16_t* tokens = x + t / TILE_TOKENS * group;
        if constexpr (RM == TALL)
            tall_products(w, cols, tokens, sums);
        else if (two)
            tile_products<RM, 2>(w, cols, tokens, sums);
        else
            tile_products<RM, 1>(w, cols, tokens, sums);
        for (int n = 0; n <= two; n++, t += TILE_TOKENS)
            for (int m = 0; m < RM; m++)
                read_tile(sums + (m * (1 + two) + n) * 256, std::min(TILE_TOKENS, to - t),
                          [&](int j, const float* v) { out(m * TILE_ROWS, t + j, v, TILE_ROWS); });
    }
}

// All rows of W by all tokens: `out(row, token, values, count)`.
template <class Out>
static void tile_all(const bf16* w, size_t cols, int rows, const uint16_t* x, int tokens, Out out) {
    constexpr int BLOCK_TOKENS = 64;  // so many stay in the second-level cache while all rows pass
    for (int from = 0; from < tokens; from += BLOCK_TOKENS) {
        const int to = std::min(from + BLOCK_TOKENS, tokens);
        int r = 0;
        const auto place = [&](int i, int t, const float* v, int count) { out(r + i, t, v, std::min(count, rows - r - i)); };
        if (to - from <= TILE_TOKENS)
            for (; r + TALL * TILE_ROWS <= rows; r += TALL * TILE_ROWS)
                tile_tokens<TALL>(w + r * cols, cols, x, from, to, place);
        for (; r + 2 * TILE_ROWS <= rows; r += 2 * TILE_ROWS) tile_tokens<2>(w + r * cols, cols, x, from, to, place);
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS) tile_tokens<1>(w + r * cols, cols, x, from, to, place);
        if (r < rows) {
            std::vector<bf16> last(TILE_ROWS * cols, bf16{0});
            memcpy(last.data(), w + r * cols, (rows - r) * cols * sizeof(bf16));
            tile_tokens<1>(last.data(), cols, x, from, to, place);
        }
    }
}
#else
static bool tiles_allowed() { return false; }
struct Tiles {
    explicit Tiles(bool, bool = false) {}
};
template <class Out>
static void tile_all(const bf16*, size_t, int, const uint16_t*, int, Out) {}
#endif
