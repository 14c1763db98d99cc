// The decoder of Qwen-7B on CPUs: one call runs all layers over B rows of T new tokens each.
//
// Plain C interface (qwen/cpu.py binds it with ctypes), no headers but the standard library's, so that it compiles in
// seconds. Vectors are GCC's own vector types: one source for AVX2, AVX-512 and NEON. Activations are float32
// throughout; weights are float32, bfloat16, or 4-bit integers as in GPTQ files.
//
// Shapes as in modeling_qwen.py: B rows, T new tokens, S all tokens, H heads, D size of a head, C hidden size.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <thread>
#include <utility>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;  // float32 lanes of a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
typedef float quad __attribute__((vector_size(16)));

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

static inline void store(bf16* p, vec v) {  // rounded to nearest, ties to even
    uvec u = (uvec)v;
    u += 0x7fff + ((u >> 16) & 1);
    hvec h = __builtin_convertvector(u >> 16, hvec);
    memcpy(p, &h, sizeof h);
}

static inline float sum(vec v) {
    quad parts[W / 4];
    memcpy(parts, &v, sizeof v);
    for (int i = 1; i < W / 4; i++) parts[0] += parts[i];
    const quad pairs = parts[0] + __builtin_shufflevector(parts[0], parts[0], 2, 3, 0, 1);
    return pairs[0] + pairs[1];
}

// 2 W weights at once. A register of bfloat16 pairs widens cheapest into its even and its odd elements, so what they are
// multiplied with lies in that order too (see `split_pairs`).
static inline void load_two(const float* p, vec& a, vec& b) { a = load(p), b = load(p + W); }

static inline void load_two(const bf16* p, vec& even, vec& odd) {
    uvec u;
    memcpy(&u, p, sizeof u);
    even = (vec)(u << 16), odd = (vec)(u & 0xffff0000u);
}

static inline void split_pairs(const float* x, int size, float* out) {
    for (int i = 0; i < size; i += 2 * W)
        for (int j = 0; j < W; j++) out[i + j] = x[i + 2 * j], out[i + W + j] = x[i + 2 * j + 1];
}

template <int from, int... I>
static inline vec zip(vec a, vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (from + I / 2 + I % 2 * W)...);
}

// W rows of W become columns: each pass shuffles them like two halves of a pack of cards.
static inline void transpose(vec (&rows)[W]) {
    constexpr std::make_integer_sequence<int, W> lanes;
    for (int pass = 1; pass < W; pass *= 2) {
        vec next[W];
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = zip<0>(rows[i], rows[i + W / 2], lanes);
            next[2 * i + 1] = zip<W / 2>(rows[i], rows[i + W / 2], lanes);
        }
        memcpy(rows, next, sizeof next);
    }
}

static inline vec exp(vec x) {  // e^x to about 1e-7: x = n ln 2 + r, a polynomial in r, n into the exponent bits
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = vec{} + 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

// ---- threads ----

// The threads of a parallel region. OpenMP starts them; a token passes some 200 barriers, and OpenMP's own cost more than
// the work between them.
struct Team {
    int threads = 1;  // as many as OpenMP really gave, which may be fewer than asked for
    std::atomic<int> next{0}, arrived{0}, generation{0};

    // Called first in the parallel region, by all threads.
    void assemble() {
#pragma omp single
        threads = omp_get_num_threads();
    }

    // Calls f(from, to) for shares of [0, count) in all threads together; ends when all of them are done.
    template <class F>
    void each(int count, int share, F f) {
        for (int from; (from = next.fetch_add(share)) < count;) f(from, std::min(from + share, count));
        const int now = generation.load();
        if (arrived.fetch_add(1) + 1 == threads) {
            arrived = 0, next = 0;
            generation.fetch_add(1);
            return;
        }
        for (int spins = 0; generation.load(std::memory_order_acquire) == now; spins++) {
            if (spins < 4000)
                pause();
            else
                std::this_thread::yield();  // more threads than processors: let the late one run
        }
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

// ---- products: y = x W^T + bias ----

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT4 = 2 };

struct Matrix {
    const void* weight;   // (rows, cols), or for INT4 words of 8 values: (rows / 8, cols / 8, 8)
    const float* scales;  // INT4: (rows / 8, cols / group, 8)
    const float* bias;    // (rows) or null
    int32_t kind, rows, cols, group;
};

constexpr int BLOCK = 32;        // activations that share a scale when a product runs in integers
constexpr int PANEL = 2 * W;     // rows of W worked on at once where there are many tokens
constexpr int DEPTH = 256;       // columns of such a panel: 16 KiB in float32 on AVX2, half of a first-level cache
constexpr int TILE = 6;          // tokens by PANEL rows: 12 accumulators
constexpr int MANY = 32;         // from so many tokens on, W is turned into panels
constexpr int TOKENS = 64;       // tokens worked on at once in integers

// Activations (T, cols) of a product, and what INT4 reads in their place.
struct Activations {
    std::vector<float> values;
    std::vector<float> split;    // the same for few tokens and bfloat16 weights, see `split_pairs`
    std::vector<float> blocks;   // the same for many tokens: DEPTH columns of all tokens, then the next ones
    std::vector<int8_t> q;       // (cols / BLOCK, T, BLOCK), in the order in which a word of weights is unpacked
    std::vector<float> scale;    // (cols / BLOCK, T)
    std::vector<float> sums;     // (cols / BLOCK, T): 8 * scale * sum of q, what the weights' zero point adds
    int T = 0, cols = 0;

    void resize(int tokens, int columns, Kind kind) {
        T = tokens, cols = columns;
        values.resize((size_t)T * cols);
        if (kind != INT4 && T >= MANY) blocks.resize(values.size());
        if (kind == BFLOAT16 && T < MANY) split.resize(values.size());
        if (kind != INT4) return;
        q.resize((size_t)T * cols);
        scale.resize((size_t)T * cols / BLOCK);
        sums.resize((size_t)T * cols / BLOCK);
    }

    // Called when row t of `values` is there, before products with weights of this kind.
    void convert(int t, Kind kind) {
        const float* x = &values[(size_t)t * cols];
        if (kind == INT4)
            quantize(t);
        else if (T >= MANY)
            for (int k = 0; k < cols; k += DEPTH) {
                const int depth = std::min(DEPTH, cols - k);
                memcpy(&blocks[(size_t)k * T + (size_t)t * depth], x + k, depth * sizeof(float));
            }
        else if (kind == BFLOAT16)
            split_pairs(x, cols, &split[(size_t)t * cols]);
    }

    void quantize(int t) {
        const float* x = &values[(size_t)t * cols];
        for (int b = 0; b < cols / BLOCK; b++, x += BLOCK) {
            vec most = {};
            for (int i = 0; i < BLOCK; i += W) {
                vec v = load(x + i);
                v = v < 0 ? -v : v;
                most = most > v ? most : v;
            }
            float top = 0;
            for (int i = 0; i < W; i++) top = std::max(top, most[i]);
            const float inverse = top > 0 ? 127.0f / top : 0.0f;
            int8_t* to = &q[((size_t)b * T + t) * BLOCK];
            int total = 0;
            for (int i = 0; i < BLOCK; i++) {
                // A byte of a GPTQ word holds columns 2j (low nibble) and 2j + 1 (high nibble).
                int value = (int)lrintf(x[i] * inverse);
                to[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = (int8_t)value;
                total += value;
            }
            scale[(size_t)b * T + t] = top / 127.0f;
            sums[(size_t)b * T + t] = 8.0f * total * top / 127.0f;
        }
    }
};

// RM rows of W by RN tokens, both with the columns side by side: `out(row, token, value)` takes the dot products.
template <int RM, int RN, class T, class Out>
static inline void dot_tile(const T* w, size_t w_stride, const float* x, size_t x_stride, int cols, Out out) {
    vec acc[RM][RN] = {};
    for (int k = 0; k < cols; k += 2 * W) {
        vec a[RM], b[RM];
        for (int i = 0; i < RM; i++) {
            // The rows after these: short rows end before the processor has seen where they lead.
            __builtin_prefetch(w + (i + RM) * w_stride + k);
            load_two(w + i * w_stride + k, a[i], b[i]);
        }
        for (int j = 0; j < RN; j++) {
            const vec xa = load(x + j * x_stride + k), xb = load(x + j * x_stride + k + W);
            for (int i = 0; i < RM; i++) acc[i][j] += a[i] * xa;
            for (int i = 0; i < RM; i++) acc[i][j] += b[i] * xb;
        }
    }
    for (int i = 0; i < RM; i++)
        for (int j = 0; j < RN; j++) out(i, j, sum(acc[i][j]));
}

// RM rows of W by all tokens, RN at a time, and what is left over at once.
template <int RM, int RN, class T, class Out>
static inline void dot_rows(const T* w, size_t w_stride, const float* x, size_t x_stride, int tokens, int cols, Out out,
                            int t = 0) {
    for (; t + RN <= tokens; t += RN)
        dot_tile<RM, RN>(w, w_stride, x + t * x_stride, x_stride, cols,
                         [&](int i, int j, float v) { out(i, t + j, v); });
    if constexpr (RN > 1) dot_rows<RM, RN - 1>(w, w_stride, x, x_stride, tokens, cols, out, t);
}

// All dot products of `rows` rows of W with `tokens` rows of x. Tiles are as large as 16 vector registers hold.
template <class T, class Out>
static inline void dot_all(const T* w, size_t w_stride, int rows, const float* x, size_t x_stride, int tokens,
                           int cols, Out out) {
    int r = 0;
    const auto from = [&](int i, int t, float v) { out(r + i, t, v); };
    if (tokens == 1)
        for (; r + 4 <= rows; r += 4) dot_tile<4, 1>(w + r * w_stride, w_stride, x, x_stride, cols, from);
    for (; r + 2 <= rows; r += 2) dot_rows<2, 4>(w + r * w_stride, w_stride, x, x_stride, tokens, cols, from);
    for (; r < rows; r++) dot_rows<1, 4>(w + r * w_stride, w_stride, x, x_stride, tokens, cols, from);
}

// A panel (depth, PANEL) of `count` rows of W; what is missing of PANEL rows is zero.
template <class T>
static void fill_panel(const T* w, size_t stride, int count, int depth, float* panel) {
    for (int r = 0; r < PANEL; r += W)
        for (int k = 0; k < depth; k += W) {
            vec rows[W];
            for (int i = 0; i < W; i++) rows[i] = r + i < count ? load(w + (r + i) * stride + k) : vec{};
            transpose(rows);
            for (int i = 0; i < W; i++) store(panel + (k + i) * PANEL + r, rows[i]);
        }
}

// N tokens x (N, depth) by one panel (depth, PANEL) of W are added to y (N, PANEL).
template <int N>
static inline void panel_tile(const float* panel, int depth, const float* x, float* y) {
    vec acc[N][2] = {};
    for (int k = 0; k < depth; k++) {
        __builtin_prefetch(x + N * (depth + k));  // the next tokens
        const vec a = load(panel + k * PANEL), b = load(panel + k * PANEL + W);
        for (int t = 0; t < N; t++) {
            const float value = x[t * depth + k];
            acc[t][0] += a * value, acc[t][1] += b * value;
        }
    }
    for (int t = 0; t < N; t++, y += PANEL) store(y, load(y) + acc[t][0]), store(y + W, load(y + W) + acc[t][1]);
}

// All tokens by one panel, TILE at a time, and what is left over at once.
template <int N = TILE>
static void panel_tokens(const float* panel, int depth, const float* x, int tokens, float* y) {
    for (; tokens >= N; tokens -= N, x += N * depth, y += N * PANEL) panel_tile<N>(panel, depth, x, y);
    if constexpr (N > 1) panel_tokens<N - 1>(panel, depth, x, tokens, y);
}

// y[t][r] += W[r] . x[t] for rows [from, to) of a dense W and many tokens.
template <class T>
static void panel_rows(const Matrix& m, int from, int to, const Activations& x, float* y) {
    const T* w = (const T*)m.weight;
    alignas(64) static thread_local float panel[PANEL * DEPTH];
    static thread_local std::vector<float> sums;  // (panels, T, PANEL), side by side: the rows of y are far apart
    const size_t size = (size_t)x.T * PANEL;
    sums.assign((to - from + PANEL - 1) / PANEL * size, 0.0f);
    for (int k = 0; k < m.cols; k += DEPTH) {
        const int depth = std::min(DEPTH, m.cols - k);
        float* sum = sums.data();
        for (int r = from; r < to; r += PANEL, sum += size) {
            fill_panel(w + (size_t)r * m.cols + k, m.cols, std::min(PANEL, to - r), depth, panel);
            panel_tokens(panel, depth, &x.blocks[(size_t)k * x.T], x.T, sum);
        }
    }
    const float* sum = sums.data();
    for (int r = from; r < to; r += PANEL)
        for (int t = 0; t < x.T; t++, sum += PANEL)
            for (int i = 0; i < std::min(PANEL, to - r); i++) y[(size_t)t * m.rows + r + i] += sum[i];
}

// y[t][r] (+)= W[r] . x[t] for rows [from, to) of a dense W.
template <class T>
static void dense_rows(const Matrix& m, int from, int to, const Activations& x, float* y, bool add) {
    const T* w = (const T*)m.weight;
    const size_t cols = m.cols, rows = m.rows;
    for (int t = 0; t < x.T; t++)
        for (int r = from; r < to; r++) {
            float start = add ? y[t * rows + r] : 0.0f;
            y[t * rows + r] = start + (m.bias ? m.bias[r] : 0.0f);
        }
    if (x.T < MANY) {
        const float* values = m.kind == BFLOAT16 ? x.split.data() : x.values.data();
        dot_all(w + from * cols, cols, to - from, values, cols, x.T, m.cols,
                [&](int r, int t, float v) { y[t * rows + from + r] += v; });
    } else {
        panel_rows<T>(m, from, to, x, y);
    }
}

// Dot products of 8 rows with 32 columns: 4 words of weights a row against 32 activations in 8-bit integers.
struct Words {
#ifdef __AVX2__
    __m256i low[4], high[4];
    explicit Words(const uint32_t* w) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int u = 0; u < 4; u++) {
            const __m256i word = _mm256_loadu_si256((const __m256i*)(w + 8 * u));
            low[u] = _mm256_and_si256(word, mask);
            high[u] = _mm256_and_si256(_mm256_srli_epi16(word, 4), mask);
        }
    }
    inline void dot(const int8_t* x, float* out, float scale) const {
        __m256i acc = _mm256_setzero_si256();  // of 16-bit sums: 8 * 2 * 15 * 127 < 32768
        for (int u = 0; u < 4; u++) {
            int32_t a, b;
            memcpy(&a, x + 8 * u, 4);
            memcpy(&b, x + 8 * u + 4, 4);
            acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(low[u], _mm256_set1_epi32(a)));
            acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(high[u], _mm256_set1_epi32(b)));
        }
        const __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)));
        _mm256_storeu_ps(out, _mm256_fmadd_ps(total, _mm256_set1_ps(scale), _mm256_loadu_ps(out)));
    }
#else
    int8_t values[8][BLOCK];
    explicit Words(const uint32_t* w) {
        for (int r = 0; r < 8; r++)
            for (int i = 0; i < BLOCK; i++) values[r][i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = w[i / 8 * 8 + r] >> i % 8 * 4 & 15;
    }
    inline void dot(const int8_t* x, float* out, float scale) const {
        for (int r = 0; r < 8; r++) {
            int32_t total = 0;
            for (int i = 0; i < BLOCK; i++) total += values[r][i] * x[i];
            out[r] += scale * total;
        }
    }
#endif
};

// y[t][r] (+)= W[r] . x[t] for rows [from, to), multiples of 8, of a 4-bit W: value = (nibble - 8) * scale.
static void int4_rows(const Matrix& m, int from, int to, const Activations& x, float* y, bool add) {
    const int groups = m.cols / m.group, blocks = m.group / BLOCK;
    alignas(64) float group_sum[TOKENS][8], total[TOKENS][8];
    for (int r0 = from; r0 < to; r0 += 8) {
        const uint32_t* words = (const uint32_t*)m.weight + (size_t)r0 * (m.cols / 8);
        const float* scales = m.scales + (size_t)r0 * groups;
        for (int t0 = 0; t0 < x.T; t0 += TOKENS) {
            const int tokens = std::min(TOKENS, x.T - t0);
            for (int t = 0; t < tokens; t++)
                for (int r = 0; r < 8; r++) total[t][r] = m.bias ? m.bias[r0 + r] : 0.0f;
            for (int g = 0; g < groups; g++) {
                for (int t = 0; t < tokens; t++) {
                    float zero = 0;
                    for (int b = 0; b < blocks; b++) zero += x.sums[(size_t)(g * blocks + b) * x.T + t0 + t];
                    for (int r = 0; r < 8; r++) group_sum[t][r] = -zero;
                }
                for (int b = 0; b < blocks; b++) {
                    const size_t column = (size_t)(g * blocks + b);
                    const Words w(words + column * BLOCK);
                    const int8_t* q = &x.q[(column * x.T + t0) * BLOCK];
                    const float* scale = &x.scale[column * x.T + t0];
                    for (int t = 0; t < tokens; t++) w.dot(q + t * BLOCK, group_sum[t], scale[t]);
                }
                for (int t = 0; t < tokens; t++)
                    for (int r = 0; r < 8; r++) total[t][r] += group_sum[t][r] * scales[g * 8 + r];
            }
            for (int t = 0; t < tokens; t++) {
                float* to_row = y + (size_t)(t0 + t) * m.rows + r0;
                for (int r = 0; r < 8; r++) to_row[r] = (add ? to_row[r] : 0.0f) + total[t][r];
            }
        }
    }
}

static void matmul_rows(const Matrix& m, int from, int to, const Activations& x, float* y, bool add) {
    if (m.kind == INT4) return int4_rows(m, from, to, x, y, add);
    if (m.kind == BFLOAT16) return dense_rows<bf16>(m, from, to, x, y, add);
    dense_rows<float>(m, from, to, x, y, add);
}

// Rows of W that a thread takes at a time: several shares for each, so that none waits long for a slower one; not more
// than leave room in its second-level cache, beside their sums, for a block of the activations.
static int share(int rows, const Team& team) { return std::clamp(rows / (8 * team.threads) / 16 * 16, 16, 128); }

// Called by all threads.
static void matmul(Team& team, const Matrix& m, const Activations& x, float* y, bool add) {
    team.each(m.rows, share(m.rows, team), [&](int from, int to) { matmul_rows(m, from, to, x, y, add); });
}

// ---- the decoder ----

struct Layer {
    const float *ln_1, *ln_2;
    Matrix c_attn, attn_c_proj, w1, w2, mlp_c_proj;
    int32_t window;  // tokens a query looks back on, itself included; 0 is all of them
};

struct KeyValues {  // a row's cache in a layer: (H, capacity, D) each
    void *keys, *values;
    int64_t capacity;
};

struct Rotary {  // cosines and sines (B or 1, T, D) for queries and keys
    const float *query_cos, *query_sin, *key_cos, *key_sin;
    int64_t batch_stride;  // 0 where all rows share them
};

struct Decoder {
    const Layer* layers;
    const float* ln_f;
    int32_t num_layers, hidden, heads, head_dim, mlp_width, cache_kind;
    float eps, scaling;
};

struct Step {
    const KeyValues* cache;  // (layers, B)
    const int32_t* first;    // (B): where each row's tokens begin, after the padding on its left
    const int32_t* past;     // (B): tokens that each row's cache holds, padding included
    Rotary rotary;
    int32_t B, T, threads;
};

static void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
    vec squares = {};
    for (int i = 0; i < size; i += W) squares += load(x + i) * load(x + i);
    const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
    for (int i = 0; i < size; i += W) store(out + i, load(x + i) * factor * load(weight + i));
}

// Dimension i turns with dimension i + D/2.
template <class T>
static void rotate(const float* x, const float* cos, const float* sin, int D, float scale, T* out) {
    const int half = D / 2;
    for (int i = 0; i < half; i += W) {
        const vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(out + i, (a * c - b * s) * scale);
        store(out + half + i, (b * c + a * s) * scale);
    }
}

// In place: scores [0, size) become probabilities in [lo, hi) and 0 elsewhere.
static void softmax(float* scores, int size, int lo, int hi) {
    float top = -INFINITY, total = 0;
    for (int s = lo; s < hi; s++) top = std::max(top, scores[s]);
    std::fill(scores, scores + lo, 0.0f);
    int s = lo;
    vec sums = {};
    for (; s + W <= hi; s += W) {
        const vec e = exp(load(scores + s) - top);
        store(scores + s, e);
        sums += e;
    }
    total = sum(sums);
    for (; s < hi; s++) total += scores[s] = std::exp(scores[s] - top);
    std::fill(scores + hi, scores + size, 0.0f);
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
    for (s = lo; s < hi; s++) scores[s] *= inverse;
}

constexpr int QUERIES = 12;  // queries that share a pass over keys and values

// out[j][0..D) = sum over s of p[j][s] * values[s]; N queries at once.
template <int N, class T>
static void mix_values(const float* p, size_t p_stride, const T* values, int size, int D, float* out,
                       size_t out_stride) {
    constexpr int COLS = 2;
    for (int d = 0; d < D; d += COLS * W) {
        vec acc[N][COLS] = {};
        for (int s = 0; s < size; s++) {
            vec v[COLS];
            for (int c = 0; c < COLS; c++) v[c] = load(values + (size_t)s * D + d + c * W);
            for (int j = 0; j < N; j++)
                for (int c = 0; c < COLS; c++) acc[j][c] += v[c] * p[j * p_stride + s];
        }
        for (int j = 0; j < N; j++)
            for (int c = 0; c < COLS; c++) store(out + j * out_stride + d + c * W, acc[j][c]);
    }
}

// One head of one row: rotates, appends to the cache, attends. `qkv` (T, 3 H D) holds the row's tokens.
template <class T>
static void attend(const Decoder& m, const Step& step, int window, const KeyValues& cache, int b, int h,
                   const float* qkv, float* out) {
    const int D = m.head_dim, width = m.heads * D, past = step.past[b];
    const int64_t head = (int64_t)h * cache.capacity * D;
    T *keys = (T*)cache.keys + head, *values = (T*)cache.values + head;
    const Rotary& rotary = step.rotary;
    for (int t = 0; t < step.T; t++) {
        const float* token = qkv + (size_t)t * 3 * width + h * D;
        const int64_t angle = b * rotary.batch_stride + (int64_t)t * D, place = (int64_t)(past + t) * D;
        rotate(token + width, rotary.key_cos + angle, rotary.key_sin + angle, D, 1.0f, keys + place);
        for (int i = 0; i < D; i += W) store(values + place + i, load(token + 2 * width + i));
    }
    std::vector<float> query(QUERIES * D), scratch(D), scores;
    for (int t0 = 0; t0 < step.T; t0 += QUERIES) {
        const int count = std::min(QUERIES, step.T - t0), end = past + t0 + count;
        int begin = step.first[b];
        if (window) begin = std::max(begin, past + t0 + 1 - window);
        begin = std::min(begin, end);
        const int size = end - begin;
        for (int j = 0; j < count; j++) {
            const int64_t angle = b * rotary.batch_stride + (int64_t)(t0 + j) * D;
            rotate(qkv + (size_t)(t0 + j) * 3 * width + h * D, rotary.query_cos + angle, rotary.query_sin + angle, D,
                   m.scaling, &query[j * D]);
            if (sizeof(T) == sizeof(bf16)) {
                split_pairs(&query[j * D], D, scratch.data());
                memcpy(&query[j * D], scratch.data(), D * sizeof(float));
            }
        }
        scores.resize((size_t)QUERIES * size);
        dot_all(keys + (int64_t)begin * D, D, size, query.data(), D, count, D,
                [&](int s, int j, float v) { scores[(size_t)j * size + s] = v; });
        for (int j = 0; j < count; j++) {
            const int position = past + t0 + j;
            const int lo = window ? std::max(0, position + 1 - window - begin) : 0;
            softmax(&scores[(size_t)j * size], size, lo, std::max(lo, position + 1 - begin));
        }
        int j = 0;
        const T* first = values + (int64_t)begin * D;
        for (; j + 4 <= count; j += 4)
            mix_values<4>(&scores[(size_t)j * size], size, first, size, D, out + (size_t)(t0 + j) * width + h * D, width);
        for (; j < count; j++)
            mix_values<1>(&scores[(size_t)j * size], size, first, size, D, out + (size_t)(t0 + j) * width + h * D, width);
    }
}

// Called by all threads: `make(t)` fills row t of x; then x is ready for products with weights of this kind.
template <class Make>
static void prepare(Team& team, Activations& x, int32_t kind, Make make) {
    team.each(x.T, 1, [&](int t, int) {
        make(t);
        x.convert(t, (Kind)kind);
    });
}

struct Buffers {
    std::vector<float> qkv, gate;
    Activations normed, heads, wide;
};

// Called by all threads.
static void run_attention(Team& team, const Decoder& m, const Step& step, const Layer& layer, const KeyValues* cache,
                          float* x, Buffers& to) {
    const int C = m.hidden, width = m.heads * m.head_dim, T = step.T;
    prepare(team, to.normed, layer.c_attn.kind,
            [&](int t) { rms_norm(x + (size_t)t * C, layer.ln_1, m.eps, C, &to.normed.values[(size_t)t * C]); });
    matmul(team, layer.c_attn, to.normed, to.qkv.data(), false);
    team.each(step.B * m.heads, 1, [&](int job, int) {
        const int b = job / m.heads, h = job % m.heads;
        const float* row = &to.qkv[(size_t)b * T * 3 * width];
        float* out = &to.heads.values[(size_t)b * T * width];
        if (m.cache_kind == BFLOAT16)
            attend<bf16>(m, step, layer.window, cache[b], b, h, row, out);
        else
            attend<float>(m, step, layer.window, cache[b], b, h, row, out);
    });
    prepare(team, to.heads, layer.attn_c_proj.kind, [](int) {});
    matmul(team, layer.attn_c_proj, to.heads, x, true);
}

// Called by all threads.
static void run_mlp(Team& team, const Decoder& m, const Layer& layer, float* x, Buffers& to) {
    const int C = m.hidden;
    prepare(team, to.normed, layer.w1.kind,
            [&](int t) { rms_norm(x + (size_t)t * C, layer.ln_2, m.eps, C, &to.normed.values[(size_t)t * C]); });
    team.each(m.mlp_width, share(m.mlp_width, team), [&](int from, int end) {
        matmul_rows(layer.w1, from, end, to.normed, to.wide.values.data(), false);
        matmul_rows(layer.w2, from, end, to.normed, to.gate.data(), false);
        for (int t = 0; t < to.normed.T; t++)
            for (int i = from; i < end; i += W) {
                const size_t place = (size_t)t * m.mlp_width + i;
                const vec gate = load(&to.gate[place]);
                store(&to.wide.values[place], load(&to.wide.values[place]) * gate / (1.0f + exp(-gate)));
            }
    });
    prepare(team, to.wide, layer.mlp_c_proj.kind, [](int) {});
    matmul(team, layer.mlp_c_proj, to.wide, x, true);
}

// hidden (B, T, C) float32: embeddings in, the decoder's output after ln_f out. The cache gets T tokens more.
extern "C" void qwen_decode(const Decoder* m, const Step* step, float* x) {
    const int rows = step->B * step->T, C = m->hidden, width = m->heads * m->head_dim;
    const Kind kind = m->num_layers > 0 ? (Kind)m->layers[0].w1.kind : FLOAT32;
    Buffers buffers;
    buffers.qkv.resize((size_t)rows * 3 * width);
    buffers.gate.resize((size_t)rows * m->mlp_width);
    buffers.normed.resize(rows, C, kind);
    buffers.heads.resize(rows, width, kind);
    buffers.wide.resize(rows, m->mlp_width, kind);
    Team team;
#pragma omp parallel num_threads(step->threads)
    {
        team.assemble();
        for (int i = 0; i < m->num_layers; i++) {
            run_attention(team, *m, *step, m->layers[i], step->cache + (size_t)i * step->B, x, buffers);
            run_mlp(team, *m, m->layers[i], x, buffers);
        }
        team.each(rows, 1, [&](int t, int) { rms_norm(x + (size_t)t * C, m->ln_f, m->eps, C, x + (size_t)t * C); });
    }
}

// y (T, rows) = x (T, cols) W^T + bias, all float32 but W.
extern "C" void qwen_linear(const Matrix* m, const float* x, int32_t T, float* y, int32_t threads) {
    Activations input;
    input.resize(T, m->cols, (Kind)m->kind);
    memcpy(input.values.data(), x, input.values.size() * sizeof(float));
    Team team;
#pragma omp parallel num_threads(threads)
    {
        team.assemble();
        prepare(team, input, m->kind, [](int) {});
        matmul(team, *m, input, y, false);
    }
}

// float32 lanes of a vector: sizes must be multiples of two vectors.
extern "C" int32_t qwen_lanes() { return W; }
