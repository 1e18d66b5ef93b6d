/* Block-sparse attention on one core: a few queries' kept blocks, online softmax, summaries last.

Everything is transposed so that lanes are queries: a key's logits are one line of queries, maxima and sums need no
reduction across lanes, and keys and values are only ever broadcast. Sums are held in registers for STRIP keys (or
channels of values) times GROUP vectors of queries; how many fit is all that differs between instruction sets. Vectors
are those of GNU C, which GCC and Clang have. Inputs of 16 bits are widened 64 keys at a time. */

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined DIFFSPARSE_GENERIC
#define ISA "generic"
#define LANES 4
#define GROUP 2
#define STRIP 4
#elif defined __AVX512F__ /* 32 registers of 16 floats */
#define ISA "avx512"
#define LANES 16
#define GROUP 4
#define STRIP 4
#elif defined __AVX2__ && defined __FMA__ /* 16 of 8 */
#define ISA "avx2"
#define LANES 8
#define GROUP 2
#define STRIP 6
#elif defined __aarch64__ /* 32 of 4 */
#define ISA "neon"
#define LANES 4
#define GROUP 4
#define STRIP 4
#else /* 16 of 4, and a product needs one more */
#define ISA "generic"
#define LANES 4
#define GROUP 2
#define STRIP 4
#endif

#if LANES > 4
#include <immintrin.h>
#elif GROUP == 4
#include <arm_neon.h>
#endif

#define QUERIES 64 /* taken at once */
#define GROUPS (QUERIES / (LANES * GROUP))
#define KEYS 64 /* keys of which logits are held */
#define MAX_DIM 256

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

enum type { FP32, BF16, FP16 };

/* Loops over registers, unrolled before anything else, and over what is multiplied with them. */
#ifdef __clang__
#define EACH _Pragma("clang loop unroll(full)")
#define TWICE _Pragma("clang loop unroll_count(2)")
#else
#define EACH _Pragma("GCC unroll 8")
#define TWICE _Pragma("GCC unroll 2")
#endif

/* The inner loops keep the registers to themselves: inlined, their pointers would go to memory. */
#define APART static __attribute__((noinline))

/* One head of one item. N blocks of `block` positions, R rows of as many queries, M summaries. */
struct head {
    const void *keys, *values;            /* [N][block][dim], zero where there is no token */
    const float *mean_keys, *mean_values; /* [M][dim] */
    const float *variance;                /* [M][dim], or null */
    const float *closed;                  /* [N][block], 0 or -inf; or null where every position is open */
    const float *tail_bias;               /* [R][M] */
    const int64_t *index;                 /* [R][most], filled up with N */
    const int64_t *token, *length;        /* [R][block], each query's token; [R], how many queries a row has */
    const void *query;                    /* a token's channels, query_step elements after those of the one before */
    void *out;                            /* the same, with out_step */
    float *lse;                           /* one number a token, with lse_step; or null */
    int64_t type, rows, most, block, dim, padding, summaries, query_step, out_step, lse_step;
    double scale; /* of the logits */
};

struct scratch {
    vec query[GROUPS][MAX_DIM][GROUP], square[GROUPS][MAX_DIM][GROUP], out[GROUPS][MAX_DIM][GROUP];
    vec weight[GROUPS][KEYS][GROUP], top[GROUPS][GROUP], total[GROUPS][GROUP];
    float wide[KEYS * MAX_DIM], line[MAX_DIM];
};

const char *diffsparse_isa(void) { return ISA; }

static inline uint32_t bits(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

static inline float number(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

/* An fp16 number: its exponent is moved, infinities and NaN twice as far; what has none is a multiple of 2^-24. */
static inline float from_half(uint16_t half) {
    const uint32_t low = (uint32_t)(half & 0x7fff) << 13, exponent = half & 0x7c00, bias = 112u << 23;
    const float tiny = (float)(int32_t)(half & 0x7fff) * 0x1p-24f;
    const uint32_t size = exponent == 0 ? bits(tiny) : low + bias + (exponent == 0x7c00 ? bias : 0);
    return number(size | (uint32_t)(half & 0x8000) << 16);
}

/* Rounded to the nearest, ties to even. Below 2^-14 the sum with 1/2 rounds to a multiple of 2^-24. */
static inline uint16_t to_half(float x) {
    const uint32_t b = bits(x), size = b & 0x7fffffff;
    const uint32_t tiny = bits(number(size) + 0.5f) - bits(0.5f);
    const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)((size >= 0x47800000 ? large : size < 0x38800000 ? tiny : normal) | (b >> 16 & 0x8000));
}

static inline uint16_t to_bfloat(float x) {
    const uint32_t b = bits(x);
    return (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? (b >> 16 & 0x8000) | 0x7fc0
                                                     : (b + 0x7fff + (b >> 16 & 1)) >> 16);
}

/* `count` numbers of a type as fp32. */
void diffsparse_widen(float *to, const void *from, int64_t count, int64_t type) {
    const uint16_t *half = from;
    int64_t i = 0;
    if (type == FP32) {
        memcpy(to, from, 4 * count);
    } else if (type == BF16) {
        for (; i < count; i++) to[i] = number((uint32_t)half[i] << 16);
    } else {
#if LANES > 4 && defined __F16C__
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
#elif LANES == 4 && GROUP == 4
        for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + i))));
#endif
        for (; i < count; i++) to[i] = from_half(half[i]);
    }
}

void diffsparse_narrow(void *to, const float *from, int64_t count, int64_t type) {
    uint16_t *half = to;
    if (type == FP32) memcpy(to, from, 4 * count);
    if (type == BF16)
        for (int64_t i = 0; i < count; i++) half[i] = to_bfloat(from[i]);
    if (type == FP16)
        for (int64_t i = 0; i < count; i++) half[i] = to_half(from[i]);
}

static inline int64_t size_of(int64_t type) { return type == FP32 ? 4 : 2; }

/* KEYS lines of a table from `at` on, as fp32: where they lie, or widened, until the next call. */
static const float *lines(const struct head *h, const void *table, int64_t at, struct scratch *s) {
    const char *from = (const char *)table + at * h->dim * size_of(h->type);
    if (h->type == FP32) return (const float *)from;
    diffsparse_widen(s->wide, from, KEYS * h->dim, h->type);
    return s->wide;
}

/* e^x for x <= 0, by 2^n and a polynomial of degree 6; 0 below -87. */
static inline vec exponential(vec x) {
    const ints small = x < (vec){0} - 87.0f;
    const vec magic = (vec){0} + 12582912.0f; /* 1.5 * 2^23 rounds to whole numbers */
    const vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    const vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vec y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * (f * f) + f + 1.0f;
    const ints power = (ints)shifted << 23; /* its lowest bits are n */
    return (vec)(((ints)y + power) & ~small);
}

/* b where it is larger than a; a where either is NaN. */
static inline vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)b, (__m512)a);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)b, (__m256)a);
#else
    const ints more = b > a;
    return (vec)(((ints)b & more) | ((ints)a & ~more));
#endif
}

/* `logits[key] (+)= bias[key] + key . query` for `strip` keys. */
static inline __attribute__((always_inline)) void product(vec (*logits)[GROUP], const float *keys, const float *bias,
                                                          vec (*query)[GROUP], int64_t dim, int add, const int strip) {
    vec sum[STRIP][GROUP];
    EACH for (int i = 0; i < strip; i++)
        EACH for (int p = 0; p < GROUP; p++) sum[i][p] = (add ? logits[i][p] : (vec){0}) + (bias ? bias[i] : 0.0f);
    TWICE for (int64_t d = 0; d < dim; d++)
        EACH for (int i = 0; i < strip; i++) {
            const float key = keys[i * dim + d];
            EACH for (int p = 0; p < GROUP; p++) sum[i][p] += key * query[d][p];
        }
    EACH for (int i = 0; i < strip; i++)
        EACH for (int p = 0; p < GROUP; p++) logits[i][p] = sum[i][p];
}

APART void products(vec (*logits)[GROUP], const float *keys, const float *bias, vec (*query)[GROUP], int64_t dim,
                    int add, int64_t count) {
    int64_t k = 0;
#define STRIPS_OF(strip)                                                               \
    for (const int64_t end = k + (count - k) / strip * strip; k < end; k += strip) \
        product(logits + k, keys + k * dim, bias ? bias + k : 0, query, dim, add, strip);
    STRIPS_OF(STRIP)
#if STRIP > 4
    STRIPS_OF(4)
#endif
    STRIPS_OF(1)
#undef STRIPS_OF
}

/* `out[channel] += weight . value[channel]` for `strip` channels of `count` keys. */
static inline __attribute__((always_inline)) void mix(vec (*out)[GROUP], const float *values, vec (*weight)[GROUP],
                                                      int64_t dim, int64_t count, const int strip) {
    vec sum[STRIP][GROUP];
    EACH for (int i = 0; i < strip; i++)
        EACH for (int p = 0; p < GROUP; p++) sum[i][p] = (vec){0};
    TWICE for (int64_t k = 0; k < count; k++)
        EACH for (int i = 0; i < strip; i++) {
            const float value = values[k * dim + i];
            EACH for (int p = 0; p < GROUP; p++) sum[i][p] += value * weight[k][p];
        }
    EACH for (int i = 0; i < strip; i++)
        EACH for (int p = 0; p < GROUP; p++) out[i][p] += sum[i][p];
}

/* Weights from the logits of `count` keys; what was summed up before fits the new maxima afterwards. */
APART void weigh(struct scratch *s, int g, int64_t dim, int64_t count) {
    vec(*weight)[GROUP] = s->weight[g], *top = s->top[g], *total = s->total[g], most[GROUP], added[GROUP];
    ints more = {0};
    EACH for (int p = 0; p < GROUP; p++) {
        most[p] = top[p];
        for (int64_t k = 0; k < count; k++) most[p] = larger(most[p], weight[k][p]);
        more |= most[p] > top[p];
        added[p] = (vec){0};
    }
    int grown = 0;
    for (int i = 0; i < LANES; i++) grown |= more[i];
    if (grown)
        for (int p = 0; p < GROUP; p++) {
            const vec shrink = exponential(top[p] - most[p]);
            total[p] *= shrink;
            top[p] = most[p];
            for (int64_t d = 0; d < dim; d++) s->out[g][d][p] *= shrink;
        }
    /* Sums of these keys first: one long chain of additions would lose a digit. */
    for (int64_t k = 0; k < count; k++)
        EACH for (int p = 0; p < GROUP; p++) {
            const vec w = exponential(weight[k][p] - most[p]);
            weight[k][p] = w;
            added[p] += w;
        }
    EACH for (int p = 0; p < GROUP; p++) total[p] += added[p];
}

/* The values of `count` keys added to what is there; `dim` is a multiple of 4. */
APART void absorb(struct scratch *s, int g, const float *values, int64_t dim, int64_t count) {
    int64_t d = 0;
    for (; d + STRIP <= dim; d += STRIP) mix(s->out[g] + d, values + d, s->weight[g], dim, count, STRIP);
#if STRIP > 4
    for (; d + 4 <= dim; d += 4) mix(s->out[g] + d, values + d, s->weight[g], dim, count, 4);
    for (; d < dim; d += 2) mix(s->out[g] + d, values + d, s->weight[g], dim, count, 2);
#endif
}

/* Where query `q`'s lane is in one line of a group. */
static inline float *lane(vec (*of_group)[MAX_DIM][GROUP], int64_t q, int64_t d) {
    return (float *)of_group[q / (LANES * GROUP)][d] + q % (LANES * GROUP);
}

static void attend_queries(const struct head *h, int64_t row, int64_t first, struct scratch *s) {
    const int64_t dim = h->dim, block = h->block, size = size_of(h->type), *token = h->token + row * block + first;
    if (h->length[row] <= first) return;
    for (int64_t q = 0; q < QUERIES; q++) {
        diffsparse_widen(s->line, (const char *)h->query + token[q] * h->query_step * size, dim, h->type);
        for (int64_t d = 0; d < dim; d++) *lane(s->query, q, d) = s->line[d] * (float)h->scale;
    }
    for (int g = 0; g < GROUPS; g++) {
        for (int p = 0; p < GROUP; p++) {
            s->top[g][p] = (vec){0} - FLT_MAX;
            s->total[g][p] = (vec){0};
        }
        memset(s->out[g], 0, dim * sizeof *s->out[g]);
    }

    for (int64_t i = 0; i < h->most; i++) {
        const int64_t kept = h->index[row * h->most + i];
        if (kept == h->padding) break;
        for (int64_t k = 0; k < block; k += KEYS) {
            const int64_t at = kept * block + k;
            const float *keys = lines(h, h->keys, at, s), *closed = h->closed ? h->closed + at : 0;
            for (int g = 0; g < GROUPS; g++) {
                products(s->weight[g], keys, closed, s->query[g], dim, 0, KEYS);
                weigh(s, g, dim, KEYS);
            }
            const float *values = lines(h, h->values, at, s);
            for (int g = 0; g < GROUPS; g++) absorb(s, g, values, dim, KEYS);
        }
    }
    if (h->variance)
        for (int g = 0; g < GROUPS; g++)
            for (int64_t d = 0; d < dim; d++)
                for (int p = 0; p < GROUP; p++)
                    s->square[g][d][p] = s->query[g][d][p] * s->query[g][d][p] * 0.5f;
    for (int64_t k = 0; k < h->summaries; k += KEYS) {
        const int64_t count = h->summaries - k < KEYS ? h->summaries - k : KEYS;
        const float *bias = h->tail_bias + row * h->summaries + k;
        for (int g = 0; g < GROUPS; g++) {
            products(s->weight[g], h->mean_keys + k * dim, bias, s->query[g], dim, 0, count);
            if (h->variance) products(s->weight[g], h->variance + k * dim, 0, s->square[g], dim, 1, count);
            weigh(s, g, dim, count);
            absorb(s, g, h->mean_values + k * dim, dim, count);
        }
    }

    const float *totals = (const float *)s->total, *tops = (const float *)s->top;
    for (int64_t q = 0; q < QUERIES && first + q < h->length[row]; q++) {
        /* Nothing attended (0) gives 0; NaN stays NaN. */
        const float scale = totals[q] == 0.0f ? 0.0f : 1.0f / totals[q];
        for (int64_t d = 0; d < dim; d++) s->line[d] = *lane(s->out, q, d) * scale;
        diffsparse_narrow((char *)h->out + token[q] * h->out_step * size, s->line, dim, h->type);
        if (h->lse) h->lse[token[q] * h->lse_step] = tops[q] + __builtin_logf(totals[q]);
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
