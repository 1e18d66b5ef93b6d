/* Block-sparse attention of fp32 tables on one core: a few queries' kept blocks, online softmax, summaries last.

Everything is transposed so that lanes are queries: a key's logits are one line of 64, maxima and sums need no reduction
across lanes, and keys and values are only ever broadcast. Written for 32 registers of 16 floats (AVX-512). */

#include <float.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define PARTS 4 /* vectors of queries */
#define QUERIES (LANES * PARTS)
#define KEYS 64 /* keys of which logits are held */
#define STRIP 4 /* keys, or values' components, whose sums are in registers */
#define MAX_DIM 256

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* One head of one item. N blocks of `block` positions, R rows of as many queries, M summaries. */
struct head {
    const float *keys, *values; /* [N + 1 + ..][block][dim]: blocks, one that pads, summaries */
    const float *variance;      /* [M][dim], or null */
    const float *query;         /* [R][block][dim], scaled */
    const float *closed;        /* [N + 1][block], 0 or -inf; or null where every position is open */
    const float *tail_bias;     /* [R][M] */
    const int64_t *index;       /* [R][most], filled up with N */
    float *result;              /* [R][block][dim] */
    float *lse;                 /* [R][block], or null */
    int64_t rows, most, block, dim, padding, summaries;
};

struct scratch {
    vec query[MAX_DIM][PARTS], square[MAX_DIM][PARTS], out[MAX_DIM][PARTS];
    vec weight[KEYS][PARTS], top[PARTS], total[PARTS];
};

/* e^x for x <= 0, by 2^n and a polynomial of degree 6; 0 below -87. */
static inline vec exponential(vec x) {
    const ints small = x < (vec){0} - 87.0f;
    const vec magic = (vec){0} + 12582912.0f; /* 1.5 * 2^23 rounds to whole numbers */
    const vec n = (x * 1.44269504088896341f + magic) - magic;
    const vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vec y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * (f * f) + f + 1.0f;
    const ints power = __builtin_convertvector(n, ints) << 23;
    return (vec)(((ints)y + power) & ~small);
}

static inline vec larger(vec a, vec b) {
    const ints more = b > a;
    return (vec)(((ints)b & more) | ((ints)a & ~more));
}

/* `logits[key] (+)= bias[key] + key . query` for `count` keys, a whole number of strips or one key. */
static inline __attribute__((always_inline)) void product(vec (*logits)[PARTS], const float *keys, const float *bias,
                                                          vec (*query)[PARTS], int64_t dim, int add, const int strip) {
    vec sum[STRIP][PARTS];
#pragma GCC unroll 4
    for (int i = 0; i < strip; i++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) sum[i][p] = (add ? logits[i][p] : (vec){0}) + (bias ? bias[i] : 0.0f);
    for (int64_t d = 0; d < dim; d++)
#pragma GCC unroll 4
        for (int i = 0; i < strip; i++) {
            const float key = keys[i * dim + d];
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) sum[i][p] += key * query[d][p];
        }
#pragma GCC unroll 4
    for (int i = 0; i < strip; i++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) logits[i][p] = sum[i][p];
}

static void products(vec (*logits)[PARTS], const float *keys, const float *bias, vec (*query)[PARTS], int64_t dim,
                     int add, int64_t count) {
    const int64_t whole = count - count % STRIP;
    for (int64_t k = 0; k < whole; k += STRIP)
        product(logits + k, keys + k * dim, bias ? bias + k : 0, query, dim, add, STRIP);
    for (int64_t k = whole; k < count; k++) product(logits + k, keys + k * dim, bias ? bias + k : 0, query, dim, add, 1);
}

/* Weights from the logits of `count` keys, and their values added to what is there. */
static void absorb(struct scratch *s, const float *values, int64_t dim, int64_t count) {
    int grown = 0;
    vec top[PARTS];
    for (int p = 0; p < PARTS; p++) {
        top[p] = s->top[p];
        for (int64_t k = 0; k < count; k++) top[p] = larger(top[p], s->weight[k][p]);
        const ints more = top[p] > s->top[p];
        for (int i = 0; i < LANES; i++) grown |= more[i];
    }
    if (grown) {
        for (int p = 0; p < PARTS; p++) {
            const vec shrink = exponential(s->top[p] - top[p]);
            s->total[p] *= shrink;
            s->top[p] = top[p];
            for (int64_t d = 0; d < dim; d++) s->out[d][p] *= shrink;
        }
    }
    /* Sums of these keys first: one long chain of additions would lose a digit. */
    vec total[PARTS] = {{0}};
    for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            const vec weight = exponential(s->weight[k][p] - top[p]);
            s->weight[k][p] = weight;
            total[p] += weight;
        }
    for (int p = 0; p < PARTS; p++) s->total[p] += total[p];
    for (int64_t d = 0; d < dim; d += STRIP) {
        vec sum[STRIP][PARTS] = {{{0}}};
        for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 4
            for (int i = 0; i < STRIP; i++) {
                const float value = values[k * dim + d + i];
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) sum[i][p] += value * s->weight[k][p];
            }
        for (int i = 0; i < STRIP; i++)
            for (int p = 0; p < PARTS; p++) s->out[d + i][p] += sum[i][p];
    }
}

static void attend_queries(const struct head *h, int64_t row, int64_t first, struct scratch *s) {
    const int64_t dim = h->dim, block = h->block;
    const float *query = h->query + (row * block + first) * dim;
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t d = 0; d < dim; d++) ((float *)s->query[d])[q] = query[q * dim + d];
    for (int p = 0; p < PARTS; p++) {
        s->top[p] = (vec){0} - FLT_MAX;
        s->total[p] = (vec){0};
    }
    memset(s->out, 0, dim * sizeof *s->out);

    for (int64_t i = 0; i < h->most; i++) {
        const int64_t kept = h->index[row * h->most + i];
        if (kept == h->padding) break;
        for (int64_t k = 0; k < block; k += KEYS) {
            const int64_t at = kept * block + k;
            products(s->weight, h->keys + at * dim, h->closed ? h->closed + at : 0, s->query, dim, 0, KEYS);
            absorb(s, h->values + at * dim, dim, KEYS);
        }
    }
    if (h->variance)
        for (int64_t d = 0; d < dim; d++)
            for (int p = 0; p < PARTS; p++) s->square[d][p] = s->query[d][p] * s->query[d][p] * 0.5f;
    for (int64_t k = 0; k < h->summaries; k += KEYS) {
        const int64_t count = h->summaries - k < KEYS ? h->summaries - k : KEYS;
        const int64_t at = (h->padding + 1) * block + k;
        products(s->weight, h->keys + at * dim, h->tail_bias + row * h->summaries + k, s->query, dim, 0, count);
        if (h->variance) products(s->weight, h->variance + k * dim, 0, s->square, dim, 1, count);
        absorb(s, h->values + at * dim, dim, count);
    }

    float *result = h->result + (row * block + first) * dim;
    const float *total = (const float *)s->total, *top = (const float *)s->top;
    for (int64_t q = 0; q < QUERIES; q++) {
        /* Nothing attended (0) gives 0; NaN stays NaN. */
        const float scale = total[q] == 0.0f ? 0.0f : 1.0f / total[q];
        for (int64_t d = 0; d < dim; d++) result[q * dim + d] = ((const float *)s->out[d])[q] * scale;
        if (h->lse) h->lse[row * block + first + q] = top[q] + __builtin_logf(total[q]);
    }
}

/* Takes what is next of all heads' queries until nothing is left; any number of threads may run it at once. */
void diffsparse_attend(const struct head *heads, int64_t count, int64_t *next) {
    struct scratch scratch;
    for (;;) {
        int64_t at = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED), h = 0;
        while (h < count && at >= heads[h].rows * (heads[h].block / QUERIES)) {
            at -= heads[h].rows * (heads[h].block / QUERIES);
            h++;
        }
        if (h == count) return;
        const int64_t parts = heads[h].block / QUERIES;
        attend_queries(&heads[h], at / parts, at % parts * QUERIES, &scratch);
    }
}
