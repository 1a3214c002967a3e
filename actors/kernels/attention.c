/* Attention of many queries over dense keys and values, with 512-bit bfloat16 instructions.
 *
 * Keys and values are repacked once per call, so that sixteen results lie in the lanes of a register and no sum crosses
 * lanes: keys as [d / 2][key][2], values as [key / 2][d][2]. A task takes some queries of one head past chunks of keys
 * and keeps the running maximum, sum and output of each query (online softmax).
 */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#define QUERIES 24    /* of a task */
#define TILE_ROWS 6   /* queries of a register tile */
#define KEYS 512      /* of a chunk */
#define MAX_WIDTH 256 /* of a head */
#define KEY_STEP 64

struct attention {
    struct tasks tasks;
    const bf16 *q, *k, *v;
    bf16 *out;
    uint32_t *packed_k, *packed_v;
    size_t q_stride, k_stride, v_stride;
    size_t queries, keys, padded, heads, kv_heads, width;
    size_t causal; /* query i sees keys 0 .. keys - queries + i */
};

static void pack_body(void *data) {
    struct attention *job = data;
    size_t task, pairs = job->width / 2, steps = job->padded / KEY_STEP;
    while (take(&job->tasks, &task)) {
        size_t head = task / steps, first = task % steps * KEY_STEP;
        const bf16 *k = job->k + head * job->width, *v = job->v + head * job->width;
        uint32_t *to = job->packed_k + head * pairs * job->padded;
        for (size_t key = first; key < first + KEY_STEP; key++)
            for (size_t i = 0; i < pairs; i++) {
                uint32_t pair = 0;
                if (key < job->keys) memcpy(&pair, k + key * job->k_stride + 2 * i, sizeof pair);
                to[i * job->padded + key] = pair;
            }
        to = job->packed_v + head * job->padded / 2 * job->width;
        for (size_t key = first; key < first + KEY_STEP; key += 2)
            for (size_t c = 0; c < job->width; c++) {
                uint32_t low = key < job->keys ? v[key * job->v_stride + c] : 0;
                uint32_t high = key + 1 < job->keys ? v[(key + 1) * job->v_stride + c] : 0;
                to[key / 2 * job->width + c] = low | high << 16;
            }
    }
}

/* sums[r][16 c ..] (+)= rows of pairs a[r] times packed b, which has ``stride`` pairs between its rows. */
INLINE void pair_tile(const int rows, const int columns, const bf16 *a, size_t a_stride, const uint32_t *b,
                      size_t stride, size_t pairs, float *sums, size_t sums_stride, const int add) {
    __m512 sum[TILE_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            sum[r][c] = add ? _mm512_loadu_ps(sums + (size_t)r * sums_stride + 16 * c) : _mm512_setzero_ps();
    for (size_t p = 0; p < pairs; p++) {
        __m512bh right[4];
        for (int c = 0; c < columns; c++) right[c] = (__m512bh)_mm512_loadu_si512(b + p * stride + 16 * c);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, a + (size_t)r * a_stride + 2 * p, sizeof pair);
            __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < columns; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], left, right[c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) _mm512_storeu_ps(sums + (size_t)r * sums_stride + 16 * c, sum[r][c]);
}

#define PAIR_TILES(rows, columns)                                                             \
    case 10 * rows + columns:                                                                 \
        pair_tile(rows, columns, a, a_stride, b, stride, pairs, sums, sums_stride, add);      \
        break;
#define PAIR_ROWS(rows) PAIR_TILES(rows, 1) PAIR_TILES(rows, 2) PAIR_TILES(rows, 3) PAIR_TILES(rows, 4)

INLINE void pair_product(int rows, int columns, const bf16 *a, size_t a_stride, const uint32_t *b, size_t stride,
                         size_t pairs, float *sums, size_t sums_stride, const int add) {
    switch (10 * rows + columns) {
        PAIR_ROWS(1) PAIR_ROWS(2) PAIR_ROWS(3) PAIR_ROWS(4) PAIR_ROWS(5) PAIR_ROWS(6)
    }
}

static void scores_of(int rows, const bf16 *q, size_t q_stride, const uint32_t *k, size_t stride, size_t pairs,
                      float *sums) {
    pair_product(rows, 4, q, q_stride, k, stride, pairs, sums, KEYS, 0);
}

static void add_values(int rows, int columns, const bf16 *p, const uint32_t *v, size_t stride, size_t pairs,
                       float *sums) {
    pair_product(rows, columns, p, KEYS, v, stride, pairs, sums, MAX_WIDTH, 1);
}

/* e^x for x <= 0, by 2^n times a polynomial for the rest. */
INLINE __m512 exp_lanes(__m512 x) {
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f));
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(0.693147180559945f));
    __m512 p = _mm512_set1_ps(1.0f / 120);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Turns ``seen`` scores into weights e^(scale s - max), zeros up to ``padded``; rescales what the query has so far. */
INLINE void soften(const float *scores, bf16 *weights, size_t seen, size_t padded, float scale, float *highest,
                   float *total, float *out, size_t width) {
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    for (size_t i = 0; i < seen; i += 16) {
        __mmask16 mask = seen - i >= 16 ? 0xffff : (__mmask16)((1u << (seen - i)) - 1);
        top = _mm512_mask_max_ps(top, mask, top, _mm512_loadu_ps(scores + i));
    }
    float now = _mm512_reduce_max_ps(top) * scale;
    if (now < *highest) now = *highest;
    __m512 sum = _mm512_setzero_ps();
    for (size_t i = 0; i < padded; i += 16) {
        __mmask16 mask = seen >= i + 16 ? 0xffff : seen <= i ? 0 : (__mmask16)((1u << (seen - i)) - 1);
        __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(scale), _mm512_set1_ps(now));
        __m512 value = _mm512_maskz_mov_ps(mask, exp_lanes(x));
        sum = _mm512_add_ps(sum, value);
        _mm256_storeu_si256((__m256i *)(weights + i), (__m256i)_mm512_cvtneps_pbh(value));
    }
    if (now > *highest) {
        float old = exponential(*highest - now);
        *total *= old;
        for (size_t c = 0; c < width; c++) out[c] *= old;
        *highest = now;
    }
    *total += _mm512_reduce_add_ps(sum);
}

static void attention_body(void *data) {
    struct attention *job = data;
    size_t task, width = job->width, blocks = (job->queries + QUERIES - 1) / QUERIES;
    float scale = 1.0f / __builtin_sqrtf((float)width);
    float scores[QUERIES][KEYS], out[QUERIES][MAX_WIDTH], highest[QUERIES], total[QUERIES];
    bf16 weights[QUERIES][KEYS];
    while (take(&job->tasks, &task)) {
        /* The last queries of a causal call see most: they go first. */
        size_t head = task % job->heads, first = (blocks - 1 - task / job->heads) * QUERIES;
        size_t count = least(QUERIES, job->queries - first), group = head / (job->heads / job->kv_heads);
        const bf16 *q = job->q + first * job->q_stride + head * width;
        const uint32_t *k = job->packed_k + group * width / 2 * job->padded;
        const uint32_t *v = job->packed_v + group * job->padded / 2 * width;
        size_t hidden = job->keys - job->queries; /* keys before the first query's own, if causal */
        size_t end = job->causal ? hidden + first + count : job->keys;
        memset(out, 0, sizeof out);
        for (size_t r = 0; r < count; r++) {
            highest[r] = -__builtin_inff();
            total[r] = 0;
        }
        for (size_t from = 0; from < end; from += KEYS) {
            size_t here = least(KEYS, end - from), padded = (here + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
            for (size_t i = 0; i < padded; i += KEY_STEP)
                for (size_t r = 0; r < count; r += TILE_ROWS)
                    scores_of((int)least(TILE_ROWS, count - r), q + r * job->q_stride, job->q_stride, k + from + i,
                              job->padded, width / 2, &scores[r][i]);
            for (size_t r = 0; r < count; r++) {
                size_t limit = job->causal ? hidden + first + r + 1 : job->keys;
                size_t seen = limit > from ? least(here, limit - from) : 0;
                if (seen)
                    soften(scores[r], weights[r], seen, padded, scale, &highest[r], &total[r], out[r], width);
                else
                    memset(weights[r], 0, padded * sizeof(bf16));
            }
            for (size_t c = 0, columns; c < width; c += columns) {
                size_t left = (width - c) / 16, parts = (left + 3) / 4;
                columns = (left + parts - 1) / parts * 16;
                for (size_t r = 0; r < count; r += TILE_ROWS)
                    add_values((int)least(TILE_ROWS, count - r), (int)columns / 16, weights[r],
                               v + from / 2 * width + c, width, padded / 2, &out[r][c]);
            }
        }
        for (size_t r = 0; r < count; r++)
            for (size_t c = 0; c < width; c++)
                job->out[((first + r) * job->heads + head) * width + c] = narrow(out[r][c] / total[r]);
    }
}

/* softmax(q k^T / sqrt(width)) v. Returns 0, or 1 having done nothing for a width it does not take.
 *
 * q: [queries, heads, width], tokens q_stride apart; k, v: [keys, kv_heads, width] likewise; out: [queries, heads,
 * width]. scratch: 2 * kv_heads * padded * width values, padded = keys rounded up to 64. causal: query i sees the first
 * keys - queries + i + 1 keys. */
int attention(team_fn team, int threads, const bf16 *q, int64_t q_stride, const bf16 *k, int64_t k_stride,
              const bf16 *v, int64_t v_stride, bf16 *scratch, bf16 *out, int64_t queries, int64_t keys, int64_t heads,
              int64_t kv_heads, int64_t width, int causal) {
    if (width % 16 || width > MAX_WIDTH || heads % kv_heads || keys < queries) return 1;
    if (!queries) return 0;
    struct attention job = {.q = q, .k = k, .v = v, .out = out, .causal = (size_t)causal};
    job.q_stride = (size_t)q_stride;
    job.k_stride = (size_t)k_stride;
    job.v_stride = (size_t)v_stride;
    job.queries = (size_t)queries;
    job.keys = (size_t)keys;
    job.heads = (size_t)heads;
    job.kv_heads = (size_t)kv_heads;
    job.width = (size_t)width;
    job.padded = (job.keys + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
    job.packed_k = (uint32_t *)scratch;
    job.packed_v = job.packed_k + job.kv_heads * job.padded * job.width / 2;
    run(team, threads, pack_body, &job.tasks, job.kv_heads * job.padded / KEY_STEP);
    run(team, threads, attention_body, &job.tasks, job.heads * ((job.queries + QUERIES - 1) / QUERIES));
    return 0;
}

int has_attention(void) { return 1; }

#else

int has_attention(void) { return 0; }

#endif
