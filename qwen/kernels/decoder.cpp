// The decoder of Qwen-7B on CPUs: one call runs all layers over the new tokens of any number of sequences.
//
// Plain C interface (qwen/cpu.py binds it with ctypes), no headers but the standard library's and the processor's, so
// that it compiles in seconds: one source for AVX2, AVX-512 and NEON. Activations are float32 throughout; weights are
// float32, bfloat16, or 4-bit integers as in GPTQ files. What a token gives does not depend on the rows and tokens
// beside it, nor on the number of threads, to the last bit.
//
// Shapes: N new tokens of all sequences, one sequence after the other, H heads, D size of a head, C hidden size.

#include "attention.h"
#include "products.h"

struct Layer {
    const float *ln_1, *ln_2;
    Matrix c_attn, attn_c_proj, w1, w2, mlp_c_proj;
    int32_t window;  // tokens a query looks back on, itself included; 0 is all of them
};

struct Rotary {  // cosines and sines (N, D) for queries and keys
    const float *query_cos, *query_sin, *key_cos, *key_sin;
};

struct Decoder {
    const Layer* layers;
    const float* ln_f;
    int32_t num_layers, hidden, heads, head_dim, mlp_width, cache_kind;
    float eps, scaling;
};

struct Sequence {
    int32_t start, count;  // its new tokens among the step's
    int32_t past;          // the position of the first of them; below 0 where the sequence begins with padding
};

struct Step {
    const KeyValues* cache;  // (layers, num_sequences)
    const Sequence* sequences;
    Rotary rotary;
    int32_t num_sequences, N, threads;
};

constexpr int MAX_HEAD_DIM = 1024;

struct Queries {  // up to QUERIES neighbours of a sequence
    int32_t sequence, token, position, count;
};

struct Buffers {
    std::vector<int32_t> owner;  // (N): each token's sequence
    std::vector<Queries> queries;
    Buffer<float> qkv, gate;
    Activations normed, heads, wide;
};

static void rms_norm(const float* x, const float* weight, float eps, int size, float* out) {
    vec squares = {};
    for (int i = 0; i < size; i += W) squares = fma(load(x + i), load(x + i), squares);
    const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
    for (int i = 0; i < size; i += W) store(out + i, load(x + i) * factor * load(weight + i));
}

// Which queries share a pass. The last see most: they come first, so that none waits for them at the end.
static void share_out(const Step& step, Buffers& to) {
    to.owner.resize(step.N);
    for (int s = 0; s < step.num_sequences; s++) {
        const Sequence& one = step.sequences[s];
        for (int t = 0; t < one.count; t++) to.owner[one.start + t] = s;
        for (int t = 0; t < one.count; t += QUERIES)
            to.queries.push_back({s, one.start + t, one.past + t, std::min(QUERIES, one.count - t)});
    }
    std::stable_sort(to.queries.begin(), to.queries.end(),
                     [](const Queries& a, const Queries& b) { return a.position > b.position; });
}

// Token i: its keys and values go to the cache, its query stays in `qkv` (3, H, D), rotated.
template <class T>
static void append(const Decoder& m, const Rotary& at, const KeyValues& cache, int position, int i, float* qkv) {
    const int D = m.head_dim, width = m.heads * D;
    const int64_t angle = (int64_t)i * D;
    float query[MAX_HEAD_DIM];
    for (int h = 0; h < m.heads; h++) {
        const int64_t place = cache.place(position, D) + h * cache.head_stride;
        float *q = qkv + h * D, *k = q + width, *v = k + width;
        rotate(k, at.key_cos + angle, at.key_sin + angle, D, 1.0f, (T*)cache.keys + place);
        for (int d = 0; d < D; d++) put((T*)cache.values + place + d, v[d]);
        rotate(q, at.query_cos + angle, at.query_sin + angle, D, m.scaling, query);
        memcpy(q, query, D * sizeof(float));
    }
}

// Called by all threads: the new tokens get into the cache, and `to.heads` gets what each head sees.
template <class T>
static void attend_all(Team& team, const Decoder& m, const Step& step, int window, const KeyValues* cache, Buffers& to) {
    const int D = m.head_dim, width = m.heads * D;
    team.each(step.N, 1, [&](int i, int) {
        const Sequence& owner = step.sequences[to.owner[i]];
        append<T>(m, step.rotary, cache[to.owner[i]], owner.past + i - owner.start, i,
                  to.qkv.data() + (size_t)i * 3 * width);
    });
    team.each((int)to.queries.size() * m.heads, 1, [&](int job, int) {
        const Queries& of = to.queries[job / m.heads];
        const int h = job % m.heads;
        attend<T>(to.qkv.data() + (size_t)of.token * 3 * width + h * D, 3 * width, cache[of.sequence], h, of.position,
                  of.count, window, D, to.heads.values.data() + (size_t)of.token * width + h * D, width);
    });
}

// Called by all threads.
static void run_attention(Team& team, const Decoder& m, const Step& step, const Layer& layer, const KeyValues* cache,
                          float* x, Buffers& to) {
    const int C = m.hidden;
    prepare(team, to.normed, layer.c_attn.kind, [&](int t) {
        rms_norm(x + (size_t)t * C, layer.ln_1, m.eps, C, to.normed.values.data() + (size_t)t * C);
    });
    multiply(team, layer.c_attn, to.normed, to.qkv.data(), false);
    if (m.cache_kind == BFLOAT16)
        attend_all<bf16>(team, m, step, layer.window, cache, to);
    else
        attend_all<float>(team, m, step, layer.window, cache, to);
    prepare(team, to.heads, layer.attn_c_proj.kind, [](int) {});
    multiply(team, layer.attn_c_proj, to.heads, x, true);
}

// Called by all threads.
static void run_mlp(Team& team, const Decoder& m, const Layer& layer, float* x, Buffers& to) {
    const int C = m.hidden;
    prepare(team, to.normed, layer.w1.kind, [&](int t) {
        rms_norm(x + (size_t)t * C, layer.ln_2, m.eps, C, to.normed.values.data() + (size_t)t * C);
    });
    float *up = to.wide.values.data(), *gates = to.gate.data();
    team.each(m.mlp_width, share(layer.w1, team), [&](int from, int end) {
        multiply_rows(layer.w1, from, end, to.normed, up, false);
        multiply_rows(layer.w2, from, end, to.normed, gates, false);
        for (int t = 0; t < to.normed.T; t++)
            for (int i = from; i < end; i += W) {
                const size_t place = (size_t)t * m.mlp_width + i;
                const vec gate = load(gates + place);
                store(up + place, load(up + place) * gate / (1.0f + exp(-gate)));
            }
    });
    prepare(team, to.wide, layer.mlp_c_proj.kind, [](int) {});
    multiply(team, layer.mlp_c_proj, to.wide, x, true);
}

// hidden (N, C) float32: embeddings in, the decoder's output after ln_f out. The caches get the new tokens.
extern "C" void qwen_decode(const Decoder* m, const Step* step, float* x) {
    const int rows = step->N, C = m->hidden, width = m->heads * m->head_dim;
    const int32_t kind = m->num_layers > 0 ? m->layers[0].w1.kind : FLOAT32;
    Buffers buffers;
    share_out(*step, buffers);
    buffers.qkv.resize((size_t)rows * 3 * width);
    buffers.gate.resize((size_t)rows * m->mlp_width);
    buffers.normed.resize(rows, C, kind);
    buffers.heads.resize(rows, width, kind);
    buffers.wide.resize(rows, m->mlp_width, kind);
    Team team;
#pragma omp parallel num_threads(step->threads)
    {
        [[maybe_unused]] const Tiles tiles = tiles_for(kind);
        team.assemble();
        for (int i = 0; i < m->num_layers; i++) {
            run_attention(team, *m, *step, m->layers[i], step->cache + (size_t)i * step->num_sequences, x, buffers);
            run_mlp(team, *m, m->layers[i], x, buffers);
        }
        team.each(rows, 1, [&](int t, int) { rms_norm(x + (size_t)t * C, m->ln_f, m->eps, C, x + (size_t)t * C); });
    }
}

// y (T, rows) = x (T, cols) W^T + bias, all float32 but W.
extern "C" void qwen_linear(const Matrix* m, const float* x, int32_t T, float* y, int32_t threads) {
    Activations input;
    input.resize(T, m->cols, m->kind);
    Team team;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] const Tiles tiles = tiles_for(m->kind);
        team.assemble();
        prepare(team, input, m->kind, [&](int t) {
            memcpy(input.values.data() + (size_t)t * m->cols, x + (size_t)t * m->cols, m->cols * sizeof(float));
        });
        multiply(team, *m, input, y, false);
    }
}
