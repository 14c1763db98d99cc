// The CPU kernels without Python: two layers of small, made-up weights read a prompt and take three steps.
//
// Prints the decoder's outputs and a head's logits, a number a line, for float32, bfloat16 and 4-bit weights. Built for
// another processor and run in an emulator, it shows what the kernels compute there.

#include "decoder.cpp"

#include <cstdio>

constexpr int C = 64, HEADS = 2, D = 32, MLP = 96, LAYERS = 2, PROMPT = 70, STEPS = 3, VOCAB = 48, GROUP = 32;

static uint32_t state;

static float next() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return (int32_t)state / 2147483648.0f;
}

static std::vector<std::vector<float>> kept;  // what matrices and norms point to

static float* numbers(int count, float size, float middle = 0) {
    kept.emplace_back(count);
    for (float& x : kept.back()) x = middle + size * next();
    return kept.back().data();
}

static Matrix matrix(int32_t kind, int rows, int cols) {
    float* values = numbers(rows * cols, 0.3f);
    Matrix m{values, nullptr, numbers(rows, 0.1f), kind, rows, cols, 0};
    if (kind == BFLOAT16 || kind == NATIVE_BF16)
        for (int i = 0; i < rows * cols; i++) put((bf16*)values + i, values[i]);
    if (kind == INT4) {
        for (int i = 0; i < rows * cols / 8; i++) next(), ((uint32_t*)values)[i] = state;
        m.scales = numbers(rows * cols / GROUP, 0.01f, 0.03f), m.group = GROUP;
    }
    return m;
}

static void run(int32_t kind) {
    state = 1 + kind, kept.clear();
    const int32_t cache_kind = kind == BFLOAT16 || kind == NATIVE_BF16 ? BFLOAT16 : FLOAT32, width = HEADS * D;
    std::vector<Layer> layers;
    for (int i = 0; i < LAYERS; i++)
        layers.push_back({numbers(C, 0.2f, 1), numbers(C, 0.2f, 1), matrix(kind, 3 * width, C), matrix(kind, C, width),
                          matrix(kind, MLP, C), matrix(kind, MLP, C), matrix(kind, C, MLP), i * 40});
    const Matrix head = matrix(kind == INT4 ? FLOAT32 : kind, VOCAB, C);
    const Decoder decoder{layers.data(), numbers(C, 0.2f, 1), LAYERS, C, HEADS, D, MLP, cache_kind, 1e-6f, 0.18f};
    constexpr int PADDING = 3, ROOM = PROMPT + STEPS;
    std::vector<float> memory(LAYERS * 2 * HEADS * ROOM * D);
    std::vector<KeyValues> cache;
    for (int i = 0; i < LAYERS; i++) {
        float* keys = memory.data() + i * 2 * HEADS * ROOM * D + PADDING * D;
        cache.push_back({keys, keys + HEADS * ROOM * D, nullptr, KEYS * D, ROOM * D});
    }
    for (int32_t past = 0, T = PROMPT; past < PROMPT + STEPS; past += T, T = 1) {
        std::vector<float> x(T * C), angles(4 * T * D), logits(T * VOCAB);
        for (float& value : x) value = next();
        for (float& value : angles) value = next();
        const float* a = angles.data();
        const Sequence sequence{0, T, past - PADDING};
        const Step step{cache.data(), &sequence, {a, a + T * D, a + 2 * T * D, a + 3 * T * D}, 1, T, 2};
        qwen_decode(&decoder, &step, x.data());
        qwen_linear(&head, x.data(), T, logits.data(), 2);
        for (int i = T > PADDING ? PADDING * C : 0; i < T * C; i++) printf("%.9g\n", x[i]);
        for (int i = T > PADDING ? PADDING * VOCAB : 0; i < T * VOCAB; i++) printf("%.9g\n", logits[i]);
    }
}

int main(int, char** arguments) { run(arguments[1][0] - '0'); }
