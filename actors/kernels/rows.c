/* What a decode step does between its products, row by row: norm, rotation, routing, grouping by expert and back. */

typedef float lanes __attribute__((vector_size(64)));
#define LANES 16

INLINE lanes load_lanes(const float *from) {
    lanes out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE float sum_lanes(lanes v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

INLINE lanes widen_lanes(const bf16 *from) {
    bf16 bits __attribute__((vector_size(2 * LANES)));
    uint32_t wide __attribute__((vector_size(4 * LANES)));
    memcpy(&bits, from, sizeof bits);
    wide = __builtin_convertvector(bits, __typeof__(wide)) << 16;
    return (lanes)wide;
}

/* Rows of a task: less work than this is done sooner than a second thread is woken. */
#define NORM_ROWS 32
#define ROUTE_ROWS 8
#define COPY_ROWS 32
#define GELU_VALUES 65536

struct norm {
    struct tasks tasks;
    const bf16 *x, *weight;
    bf16 *out;
    size_t rows, width;
    float eps;
};

static void norm_body(void *data) {
    struct norm *job = data;
    const bf16 *restrict weight = job->weight;
    size_t task, width = job->width, whole = width / LANES * LANES;
    while (take(&job->tasks, &task))
        for (size_t row = task * NORM_ROWS; row < least((task + 1) * NORM_ROWS, job->rows); row++) {
            const bf16 *restrict x = job->x + row * width;
            bf16 *restrict out = job->out + row * width;
            lanes squares = {0};
            for (size_t i = 0; i < whole; i += LANES) {
                lanes value = widen_lanes(x + i);
                squares += value * value;
            }
            float sum = sum_lanes(squares);
            for (size_t i = whole; i < width; i++) sum += widen(x[i]) * widen(x[i]);
            float scale = 1.0f / __builtin_sqrtf(sum / (float)width + job->eps);
            for (size_t i = 0; i < width; i++)
                out[i] = narrow(widen(weight[i]) * widen(narrow(widen(x[i]) * scale)));
        }
}

/* out = weight * round(x / sqrt(mean(x^2) + eps)) */
void rms_norm(team_fn team, int threads, const bf16 *x, const bf16 *weight, bf16 *out, int64_t rows, int64_t width,
              float eps) {
    struct norm job = {.x = x, .weight = weight, .out = out, .eps = eps};
    job.rows = (size_t)rows;
    job.width = (size_t)width;
    run(team, threads, norm_body, &job.tasks, (job.rows + NORM_ROWS - 1) / NORM_ROWS);
}

struct rotation {
    struct tasks tasks;
    const bf16 *x;
    const float *cosines, *sines;
    bf16 *out;
    size_t rows, stride, heads, half;
};

static void pairs_body(void *data) {
    struct rotation *job = data;
    size_t task, half = job->half;
    while (take(&job->tasks, &task))
        for (size_t row = task * NORM_ROWS; row < least((task + 1) * NORM_ROWS, job->rows); row++) {
            const float *c = job->cosines + row * half, *s = job->sines + row * half;
            for (size_t head = 0; head < job->heads; head++) {
                const bf16 *restrict x = job->x + row * job->stride + head * 2 * half;
                bf16 *restrict out = job->out + (row * job->heads + head) * 2 * half;
                for (size_t i = 0; i < half; i++) {
                    float even = widen(x[2 * i]), odd = widen(x[2 * i + 1]);
                    out[2 * i] = narrow(even * c[i] - odd * s[i]);
                    out[2 * i + 1] = narrow(odd * c[i] + even * s[i]);
                }
            }
        }
}

static void halves_body(void *data) {
    struct rotation *job = data;
    size_t task, half = job->half;
    while (take(&job->tasks, &task))
        for (size_t row = task * NORM_ROWS; row < least((task + 1) * NORM_ROWS, job->rows); row++) {
            const float *c = job->cosines + row * half, *s = job->sines + row * half;
            for (size_t head = 0; head < job->heads; head++) {
                const bf16 *restrict x = job->x + row * job->stride + head * 2 * half;
                bf16 *restrict out = job->out + (row * job->heads + head) * 2 * half;
                for (size_t i = 0; i < half; i++) {
                    float first = widen(x[i]), second = widen(x[half + i]);
                    out[i] = narrow(first * c[i] - second * s[i]);
                    out[half + i] = narrow(second * c[i] + first * s[i]);
                }
            }
        }
}

/* Turns elements (2i, 2i + 1) of each head, or with ``halves`` elements (i, half + i), by the row's angle i.
 *
 * x: [rows, heads, 2 half], rows ``stride`` apart. */
void rotate(team_fn team, int threads, const bf16 *x, int64_t stride, const float *cosines, const float *sines,
            bf16 *out, int64_t rows, int64_t heads, int64_t half, int halves) {
    struct rotation job = {.x = x, .cosines = cosines, .sines = sines, .out = out};
    job.rows = (size_t)rows;
    job.stride = (size_t)stride;
    job.heads = (size_t)heads;
    job.half = (size_t)half;
    run(team, threads, halves ? halves_body : pairs_body, &job.tasks, (job.rows + NORM_ROWS - 1) / NORM_ROWS);
}

struct gelu {
    struct tasks tasks;
    const bf16 *x;
    bf16 *out;
    size_t count;
};

static void gelu_body(void *data) {
    struct gelu *job = data;
    size_t task;
    while (take(&job->tasks, &task))
    {
        const bf16 *restrict from = job->x + task * GELU_VALUES;
        bf16 *restrict to = job->out + task * GELU_VALUES;
        size_t count = least(GELU_VALUES, job->count - task * GELU_VALUES);
        for (size_t i = 0; i < count; i++) {
            float x = widen(from[i]);
            to[i] = narrow(x / (1.0f + exponential(-1.702f * x)));
        }
    }
}

/* out = x sigmoid(1.702 x) */
void quick_gelu(team_fn team, int threads, const bf16 *x, bf16 *out, int64_t count) {
    struct gelu job = {.x = x, .out = out, .count = (size_t)count};
    run(team, threads, gelu_body, &job.tasks, (job.count + GELU_VALUES - 1) / GELU_VALUES);
}

struct router {
    const float *weight;     /* [experts, width] */
    const float *correction; /* [experts] */
};

struct routing {
    struct tasks tasks;
    const bf16 *x;
    struct router banks[2]; /* text, vision */
    const uint8_t *vision;  /* per row, or NULL when all are text */
    int64_t *ids;
    bf16 *weights;
    size_t rows, width, experts, k;
    float norm_min;
};

INLINE float dot(const float *a, const float *b, size_t width) {
    lanes sums[4] = {{0}};
    size_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (size_t j = 0; j < 4; j++) sums[j] += load_lanes(a + i + j * LANES) * load_lanes(b + i + j * LANES);
    for (; i + LANES <= width; i += LANES) sums[0] += load_lanes(a + i) * load_lanes(b + i);
    float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < width; i++) sum += a[i] * b[i];
    return sum;
}

static void route_row(const struct routing *job, size_t row, float *wide, float *scores, float *chances) {
    int vision = job->vision && job->vision[row];
    const struct router *bank = &job->banks[vision];
    size_t experts = job->experts;
    for (size_t i = 0; i < job->width; i++) wide[i] = widen(job->x[row * job->width + i]);
    float highest = -__builtin_inff();
    for (size_t e = 0; e < experts; e++) {
        chances[e] = dot(wide, bank->weight + e * job->width, job->width);
        if (chances[e] > highest) highest = chances[e];
    }
    float sum = 0;
    for (size_t e = 0; e < experts; e++) chances[e] = exponential(chances[e] - highest);
    for (size_t e = 0; e < experts; e++) sum += chances[e];
    for (size_t e = 0; e < experts; e++) {
        chances[e] /= sum;
        scores[e] = chances[e] + bank->correction[e];
    }
    int64_t *ids = job->ids + row * job->k;
    float total = 0;
    for (size_t k = 0; k < job->k; k++) {
        size_t best = 0;
        for (size_t e = 1; e < experts; e++)
            if (scores[e] > scores[best]) best = e;
        scores[best] = -__builtin_inff();
        ids[k] = (int64_t)best;
        total += chances[best];
    }
    if (total < job->norm_min) total = job->norm_min;
    for (size_t k = 0; k < job->k; k++) {
        job->weights[row * job->k + k] = narrow(chances[ids[k]] / total);
        ids[k] += vision ? (int64_t)experts : 0;
    }
}

static void routing_body(void *data) {
    struct routing *job = data;
    size_t task;
    float wide[job->width], scores[job->experts], chances[job->experts];
    while (take(&job->tasks, &task))
        for (size_t row = task * ROUTE_ROWS; row < least((task + 1) * ROUTE_ROWS, job->rows); row++)
            route_row(job, row, wide, scores, chances);
}

/* The k experts of each row in its bank: softmax of float32 logits, chosen by probability + correction, weighed by
 * probability over max(their sum, norm_min). The vision bank's ids follow the text bank's. */
void route(team_fn team, int threads, const bf16 *x, const float *text, const float *text_correction,
           const float *vision, const float *vision_correction, const uint8_t *is_vision, int64_t *ids, bf16 *weights,
           int64_t rows, int64_t width, int64_t experts, int64_t k, float norm_min) {
    struct routing job = {.x = x, .vision = is_vision, .ids = ids, .weights = weights, .norm_min = norm_min};
    job.banks[0] = (struct router){text, text_correction};
    job.banks[1] = (struct router){vision, vision_correction};
    job.rows = (size_t)rows;
    job.width = (size_t)width;
    job.experts = (size_t)experts;
    job.k = (size_t)k;
    run(team, threads, routing_body, &job.tasks, (job.rows + ROUTE_ROWS - 1) / ROUTE_ROWS);
}

struct moves {
    struct tasks tasks;
    const bf16 *from;
    bf16 *to;
    const int64_t *row_of_choice;
    const bf16 *weights;
    size_t tokens, k, width;
};

static void group_body(void *data) {
    struct moves *job = data;
    size_t task, bytes = job->width * sizeof(bf16);
    while (take(&job->tasks, &task))
        for (size_t t = task * COPY_ROWS; t < least((task + 1) * COPY_ROWS, job->tokens); t++)
            for (size_t k = 0; k < job->k; k++)
                memcpy(job->to + (size_t)job->row_of_choice[t * job->k + k] * job->width, job->from + t * job->width,
                       bytes);
}

/* Copies each token's row once per chosen expert, in the order of experts and, inside one, of tokens. Returns 0, or 1
 * having moved nothing when an id is none of ``experts``. Fills counts[experts] and row_of_choice[tokens * k]. */
int group_rows(team_fn team, int threads, const bf16 *x, const int64_t *ids, bf16 *rows, int32_t *counts,
               int64_t *row_of_choice, int64_t tokens, int64_t k, int64_t width, int64_t experts) {
    int64_t next[experts + 1];
    memset(counts, 0, (size_t)experts * sizeof *counts);
    for (int64_t i = 0; i < tokens * k; i++) {
        if (ids[i] < 0 || ids[i] >= experts) return 1;
        counts[ids[i]]++;
    }
    next[0] = 0;
    for (int64_t e = 0; e < experts; e++) next[e + 1] = next[e] + counts[e];
    for (int64_t i = 0; i < tokens * k; i++) row_of_choice[i] = next[ids[i]]++;
    struct moves job = {.from = x, .to = rows, .row_of_choice = row_of_choice};
    job.tokens = (size_t)tokens;
    job.k = (size_t)k;
    job.width = (size_t)width;
    run(team, threads, group_body, &job.tasks, (job.tokens + COPY_ROWS - 1) / COPY_ROWS);
    return 0;
}

static void combine_body(void *data) {
    struct moves *job = data;
    size_t task, width = job->width;
    float sums[1024];
    while (take(&job->tasks, &task))
        for (size_t t = task * COPY_ROWS; t < least((task + 1) * COPY_ROWS, job->tokens); t++)
            for (size_t from = 0; from < width; from += 1024) {
                size_t count = least(1024, width - from);
                for (size_t i = 0; i < count; i++) sums[i] = 0;
                for (size_t k = 0; k < job->k; k++) {
                    const bf16 *restrict row = job->from + (size_t)job->row_of_choice[t * job->k + k] * width + from;
                    float weight = widen(job->weights[t * job->k + k]);
                    for (size_t i = 0; i < count; i++) sums[i] += weight * widen(row[i]);
                }
                bf16 *restrict out = job->to + t * width + from;
                for (size_t i = 0; i < count; i++) out[i] = narrow(sums[i]);
            }
}

/* Each token's weighted sum of the rows of its choices. */
void combine_rows(team_fn team, int threads, const bf16 *rows, const int64_t *row_of_choice, const bf16 *weights,
                  bf16 *out, int64_t tokens, int64_t k, int64_t width) {
    struct moves job = {.from = rows, .to = out, .row_of_choice = row_of_choice, .weights = weights};
    job.tokens = (size_t)tokens;
    job.k = (size_t)k;
    job.width = (size_t)width;
    run(team, threads, combine_body, &job.tasks, (job.tokens + COPY_ROWS - 1) / COPY_ROWS);
}
