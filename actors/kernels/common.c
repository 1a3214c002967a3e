/* What the kernels share: bfloat16, and tasks for the threads of the OpenMP runtime that the process has already (its
 * GOMP_parallel is passed in), so that no second pool competes for the cores. The sources of this folder are compiled as
 * one file, this one first. Matrices are row-major and dense unless a stride says otherwise.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef void (*team_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

#define INLINE static inline __attribute__((always_inline))

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Tasks of a job, taken atomically, so that a thread that was held up takes fewer. Embedded first in every job. */
struct tasks {
    size_t next;
    size_t count;
};

INLINE int take(struct tasks *tasks, size_t *task) {
    *task = __atomic_fetch_add(&tasks->next, 1, __ATOMIC_RELAXED);
    return *task < tasks->count;
}

static void run(team_fn team, int threads, void (*body)(void *), struct tasks *tasks, size_t count) {
    tasks->next = 0;
    tasks->count = count;
    size_t used = least((size_t)threads, count);
    if (!team || used <= 1)
        body(tasks);
    else
        team(body, tasks, (unsigned)used, 0);
}

INLINE float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* To nearest, ties to even; NaN stays NaN. */
INLINE bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/* e^x to 2e-7, without branches so that loops over it become vector code: 2^n times a polynomial for the rest of x, which
 * is within ln 2 / 2 of 0. Clamped to -87 .. 88, beyond which no caller can tell the result from 0 or infinity. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504088896f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f + f * (1.0f + f * (0.5f + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120 + f * (1.0f / 720))))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }
