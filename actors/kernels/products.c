/* Matrix products of a few rows with bfloat16 weights, which are bound by how fast the weights come from memory.
 *
 * Weights are [outputs, inputs]: one output is one dot product along two rows, so nothing is repacked. Sums are float32.
 */

#define WEIGHTS 4     /* weight rows of a tile */
#define MAX_ROWS 6    /* rows of a tile: 6 x 4 sums and the operands of a step fit 32 registers */
#define STREAM_ROWS 3 /* rows of a tile that is bound by memory alone */
#define PARTS 4       /* sums of an output in such a tile */
#define PAGE 2048     /* values of 4 KiB */
#define BLOCK 16      /* most outputs of a block */
#define CHUNK 64      /* rows whose sums a block keeps at once */
#define TASKS_EACH 4  /* least of each thread, where there are so many blocks */
#define CACHED_BYTES 24576
#define TASK_BYTES 262144

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#include <immintrin.h>

#define STEP 32
#define KERNEL "avx512_bf16"
typedef __m512 sums_t;
typedef __m512bh values_t;

INLINE sums_t zero(void) { return _mm512_setzero_ps(); }
INLINE values_t load(const bf16 *from) { return (values_t)_mm512_loadu_si512(from); }
INLINE values_t load_some(const bf16 *from, int count) {
    return (values_t)_mm512_maskz_loadu_epi16((__mmask32)(((uint64_t)1 << count) - 1), from);
}
INLINE sums_t multiply_add(sums_t sum, values_t a, values_t b) { return _mm512_dpbf16_ps(sum, a, b); }

/* The totals of four accumulators. */
INLINE void total(const sums_t *a, float *out) {
    __m512 s01 = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    __m512 s23 = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(s01), _mm512_castps_pd(s23));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(s01), _mm512_castps_pd(s23));
    __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#else /* any other processor: widened to float32, in the compiler's own vectors */

#if defined(__AVX512F__)
#define STEP 16
#define KERNEL "avx512"
#elif defined(__AVX2__) && defined(__FMA__)
#define STEP 8
#define KERNEL "avx2"
#else
#define STEP 4
#define KERNEL "generic"
#endif
typedef float sums_t __attribute__((vector_size(4 * STEP)));
typedef uint32_t wide_t __attribute__((vector_size(4 * STEP)));
typedef bf16 narrow_t __attribute__((vector_size(2 * STEP)));
typedef sums_t values_t;

INLINE sums_t zero(void) { return (sums_t){0}; }
INLINE values_t load(const bf16 *from) {
    narrow_t narrow;
    memcpy(&narrow, from, sizeof narrow);
    wide_t wide = __builtin_convertvector(narrow, wide_t) << 16;
    return (values_t)wide;
}
INLINE values_t load_some(const bf16 *from, int count) {
    bf16 some[STEP] = {0};
    memcpy(some, from, sizeof(bf16) * (size_t)count);
    return load(some);
}
INLINE sums_t multiply_add(sums_t sum, values_t a, values_t b) { return sum + a * b; }
INLINE void total(const sums_t *a, float *out) {
    for (int i = 0; i < WEIGHTS; i++) {
        float sum = 0;
        for (int lane = 0; lane < STEP; lane++) sum += a[i][lane];
        out[i] = sum;
    }
}

#endif

const char *products_name(void) { return KERNEL; }

/* Dot products of ``rows`` consecutive rows of ``x`` with four weight rows, into sums[row * stride + 0 .. 3]. Prefetches
 * ``ahead`` elements ahead in each weight row unless that is 0. ``rows`` and whether ``ahead`` is 0 are constants in every
 * copy the compiler makes. */
INLINE void tile_of(const int rows, const bf16 *x, const bf16 *const *w, size_t width, size_t ahead, float *sums,
                    size_t stride) {
    sums_t sum[MAX_ROWS][WEIGHTS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < WEIGHTS; i++) sum[r][i] = zero();
    size_t k = 0;
    for (; k + STEP <= width; k += STEP) {
        values_t weight[WEIGHTS];
        for (int i = 0; i < WEIGHTS; i++) {
            if (ahead) __builtin_prefetch(w[i] + k + ahead);
            weight[i] = load(w[i] + k);
        }
        for (int r = 0; r < rows; r++) {
            values_t value = load(x + (size_t)r * width + k);
            for (int i = 0; i < WEIGHTS; i++) sum[r][i] = multiply_add(sum[r][i], value, weight[i]);
        }
    }
    if (k < width) {
        int rest = (int)(width - k);
        for (int r = 0; r < rows; r++) {
            values_t value = load_some(x + (size_t)r * width + k, rest);
            for (int i = 0; i < WEIGHTS; i++) sum[r][i] = multiply_add(sum[r][i], value, load_some(w[i] + k, rest));
        }
    }
    for (int r = 0; r < rows; r++) total(sum[r], sums + (size_t)r * stride);
}

/* The same for so few rows that only the weights' way from memory counts: one weight row after the other, as they lie
 * there. Several sums per row hide the latency of an addition. */
INLINE void stream_of(const int rows, const bf16 *x, const bf16 *const *w, size_t width, float *sums, size_t stride) {
    sums_t sum[STREAM_ROWS][WEIGHTS];
    for (int i = 0; i < WEIGHTS; i++) {
        sums_t part[STREAM_ROWS][PARTS];
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) part[r][p] = zero();
        size_t k = 0;
        for (; k + PARTS * STEP <= width; k += PARTS * STEP)
            for (int p = 0; p < PARTS; p++) {
                const bf16 *at = w[i] + k + p * STEP;
                __builtin_prefetch(at + PAGE);
                values_t weight = load(at);
                for (int r = 0; r < rows; r++)
                    part[r][p] = multiply_add(part[r][p], load(x + (size_t)r * width + k + p * STEP), weight);
            }
        for (; k < width; k += STEP) {
            int rest = width - k < STEP ? (int)(width - k) : STEP;
            for (int r = 0; r < rows; r++)
                part[r][0] = multiply_add(part[r][0], load_some(x + (size_t)r * width + k, rest),
                                          load_some(w[i] + k, rest));
        }
        for (int r = 0; r < rows; r++) {
            sum[r][i] = part[r][0];
            for (int p = 1; p < PARTS; p++) sum[r][i] += part[r][p];
        }
    }
    for (int r = 0; r < rows; r++) total(sum[r], sums + (size_t)r * stride);
}

/* One tile; ``ahead``: how far the weights are from those of the next one, 0 if they are in the cache already. */
static void tile(int rows, const bf16 *x, const bf16 *const *w, size_t width, size_t ahead, float *sums,
                 size_t stride) {
#define TILE(rows, memory)                                    \
    case rows:                                                \
        if (ahead)                                            \
            memory;                                           \
        else                                                  \
            tile_of(rows, x, w, width, 0, sums, stride);      \
        break;
#define STREAMED(rows) TILE(rows, stream_of(rows, x, w, width, sums, stride))
#define PREFETCHED(rows) TILE(rows, tile_of(rows, x, w, width, ahead, sums, stride))
    switch (rows) { STREAMED(1) STREAMED(2) STREAMED(3) PREFETCHED(4) PREFETCHED(5) PREFETCHED(6) }
}

/* Rows of the next tile when ``left`` are left: as even as possible. */
INLINE int next_rows(int left) {
    int tiles = (left + MAX_ROWS - 1) / MAX_ROWS;
    return (left + tiles - 1) / tiles;
}

/* One group of rows and its weights. */
struct group {
    int first; /* row */
    int count;
    int expert;
};

struct product {
    struct tasks tasks;
    size_t block; /* outputs computed at once, at most BLOCK */
    size_t span;  /* outputs of a task, some blocks */
    size_t spans; /* of a group */
    const struct group *groups;
    const bf16 *x;
    const bf16 *w;
    const bf16 *bias; /* or NULL */
    bf16 *out;
    size_t inputs;
    size_t outputs;
};

typedef void (*block_fn)(const struct product *job, const struct group *group, size_t from, size_t to);

INLINE void take_all(struct product *job, block_fn compute) {
    size_t task;
    while (take(&job->tasks, &task)) {
        const struct group *group = &job->groups[task / job->spans];
        size_t from = task % job->spans * job->span, end = least(from + job->span, job->outputs);
        for (; from < end; from += job->block) compute(job, group, from, least(from + job->block, end));
    }
}

/* ``rows`` rows of ``x`` against weight rows from..to into sums[row * stride + 0 ..]; ``first``: the weights come from
 * memory. */
INLINE void product_block(const bf16 *x, int rows, const bf16 *weights, size_t from, size_t to, size_t width, int first,
                          float *sums, size_t stride) {
    for (int row = 0, count; row < rows; row += count) {
        count = next_rows(rows - row);
        for (size_t j = from; j < to; j += WEIGHTS) {
            const bf16 *w[WEIGHTS];
            for (size_t i = 0; i < WEIGHTS; i++) w[i] = weights + least(j + i, to - 1) * width;
            tile(count, x + (size_t)row * width, w, width, first && !row ? WEIGHTS * width : 0,
                 sums + (size_t)row * stride + (j - from), stride);
        }
    }
}

/* out = x w^T + bias */
static void linear_block(const struct product *job, const struct group *group, size_t from, size_t to) {
    size_t width = job->inputs, outputs = job->outputs, count = to - from;
    float sums[CHUNK][BLOCK], bias[BLOCK] = {0};
    if (job->bias)
        for (size_t j = 0; j < count; j++) bias[j] = widen(job->bias[from + j]);
    const bf16 *weights = job->w + (size_t)group->expert * outputs * width;
    for (int done = 0; done < group->count; done += CHUNK) {
        int rows = (int)least(CHUNK, (size_t)(group->count - done));
        const bf16 *x = job->x + (size_t)(group->first + done) * width;
        bf16 *out = job->out + (size_t)(group->first + done) * outputs + from;
        product_block(x, rows, weights, from, to, width, !done, sums[0], BLOCK);
        for (int r = 0; r < rows; r++, out += outputs) {
            bf16 rounded[BLOCK];
            for (size_t j = 0; j < BLOCK; j++) rounded[j] = narrow(sums[r][j] + bias[j]);
            memcpy(out, rounded, count * sizeof(bf16));
        }
    }
}

/* out = silu(gate) * up, both of one weight matrix: gate rows, then up rows. Rounded once, after the product. */
static void gated_block(const struct product *job, const struct group *group, size_t from, size_t to) {
    size_t width = job->inputs, outputs = job->outputs, count = to - from;
    size_t stride = (count + WEIGHTS - 1) / WEIGHTS * WEIGHTS;
    float gates[CHUNK * BLOCK], ups[CHUNK * BLOCK];
    bf16 rounded[CHUNK * BLOCK];
    const bf16 *gate = job->w + (size_t)group->expert * 2 * outputs * width, *up = gate + outputs * width;
    for (int done = 0; done < group->count; done += CHUNK) {
        int rows = (int)least(CHUNK, (size_t)(group->count - done));
        const bf16 *x = job->x + (size_t)(group->first + done) * width;
        bf16 *out = job->out + (size_t)(group->first + done) * outputs + from;
        product_block(x, rows, gate, from, to, width, !done, gates, stride);
        product_block(x, rows, up, from, to, width, !done, ups, stride);
        size_t values = (size_t)rows * stride;
        for (size_t i = 0; i < values; i++) rounded[i] = narrow(silu(gates[i]) * ups[i]);
        for (int r = 0; r < rows; r++, out += outputs) memcpy(out, rounded + (size_t)r * stride, count * sizeof(bf16));
    }
}

static void linear_body(void *job) { take_all(job, linear_block); }
static void gated_body(void *job) { take_all(job, gated_block); }

/* ``weights``: weight rows of one output. Those of a block stay in the first-level cache beside a tile's rows; a task is
 * some blocks, because the processor's own prefetching wants long runs, but leaves each thread several tasks. */
static void run_product(team_fn team, int threads, void (*body)(void *), struct product *job, size_t groups,
                        size_t weights) {
    size_t row_bytes = sizeof(bf16) * job->inputs + 1;
    size_t rows = CACHED_BYTES / row_bytes / WEIGHTS * WEIGHTS;
    job->block = least(rows < WEIGHTS ? WEIGHTS : rows, BLOCK) / weights;
    size_t blocks = (job->outputs + job->block - 1) / job->block;
    size_t most = groups * blocks / (TASKS_EACH * (size_t)threads);
    size_t run_blocks = least(TASK_BYTES / (row_bytes * job->block * weights) + 1, most ? most : 1);
    job->span = run_blocks * job->block;
    job->spans = (job->outputs + job->span - 1) / job->span;
    run(team, threads, body, &job->tasks, groups * job->spans);
}

/* out[rows, outputs] = x[rows, inputs] w[outputs, inputs]^T + bias[outputs], the bias may be NULL. */
void linear(team_fn team, int threads, const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, int64_t rows,
            int64_t inputs, int64_t outputs) {
    struct group all = {0, (int)rows, 0};
    struct product job = {.groups = &all, .x = x, .w = w, .bias = bias, .out = out};
    job.inputs = (size_t)inputs;
    job.outputs = (size_t)outputs;
    if (rows) run_product(team, threads, linear_body, &job, 1, 1);
}

/* Each expert's down(silu(gate x) * up x) over its rows, which lie in the order of experts. Returns 0, or 1 having done
 * nothing when the counts do not sum to the rows.
 *
 * x, out: [rows, width]; hidden: [rows, inner], overwritten; gate_up: [experts, 2 inner, width]; down: [experts, width,
 * inner]; counts: rows of each expert, or NULL when there is one expert. */
int experts(team_fn team, int threads, const bf16 *x, int64_t rows, const int32_t *counts, int64_t expert_count,
            const bf16 *gate_up, const bf16 *down, bf16 *hidden, bf16 *out, int64_t width, int64_t inner) {
    struct group groups[expert_count + 1];
    size_t used = 0;
    int64_t first = 0;
    for (int64_t e = 0; e < expert_count; e++) {
        int64_t count = counts ? counts[e] : rows;
        if (count < 0 || count > rows - first) return 1;
        if (count) groups[used++] = (struct group){(int)first, (int)count, (int)e};
        first += count;
    }
    if (first != rows) return 1;
    if (!used) return 0;
    struct product gated = {.groups = groups, .x = x, .w = gate_up, .out = hidden};
    gated.inputs = (size_t)width;
    gated.outputs = (size_t)inner;
    run_product(team, threads, gated_body, &gated, used, 2);
    struct product back = {.groups = groups, .x = hidden, .w = down, .out = out};
    back.inputs = (size_t)inner;
    back.outputs = (size_t)width;
    run_product(team, threads, linear_body, &back, used, 1);
    return 0;
}
