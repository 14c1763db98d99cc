// The threads of a parallel region. OpenMP starts them; a token passes some 200 barriers, and OpenMP's own cost more than
// the work between them.
#pragma once

#include <algorithm>
#include <atomic>
#include <omp.h>
#include <thread>

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
