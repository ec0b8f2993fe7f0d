/* Decoder layers for passes of few rows (linear layers, norms, rotation, KV, attention, SiLU), linear layers alone, and
 * KV that is taken over.
 *
 * Plain C with GCC's vector extensions; no header of PyTorch or Python. All numbers but weights are float32, all sizes in
 * elements. The eager references are in the tests. Threads are OpenMP's, shared with PyTorch (see build.py).
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define LANES 8
#define KEYS 128 /* of a unit of work */
#define NEVER (-1e30f)

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(32), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return (vec){x, x, x, x, x, x, x, x}; }

#include "linear.h"
#include "take_over.h"

INLINE float sum(vec a) {
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += a[i];
    return total;
}

INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* e^x, relative error below 3e-7 (Cephes' polynomial after range reduction by powers of two). */
INLINE vec exponential(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = pick(x < all(-87.0f), all(-87.0f), pick(x > all(88.0f), all(88.0f), x));
    vec shifted = x * all(1.44269504088896341f) + magic;
    vec power = shifted - magic;
    vec rest = x - power * all(0.693359375f) + power * all(2.12194440e-4f);
    vec value = all(1.9875691500e-4f);
    value = value * rest + all(1.3981999507e-3f);
    value = value * rest + all(8.3334519073e-3f);
    value = value * rest + all(4.1665795894e-2f);
    value = value * rest + all(1.6666665459e-1f);
    value = value * rest + all(5.0000001201e-1f);
    value = value * rest * rest + rest + all(1.0f);
    ivec exponent = ((ivec)shifted - (ivec)magic + 127) << 23;
    return value * (vec)exponent;
}

/* ------------------------------------------------------------------------------------------------ norms, SiLU */

/* out = norm(hidden) * weight, of n elements. */
INLINE void norm_row(const float *hidden, const float *weight, float *out, int n, float eps) {
    vec squares = all(0.0f);
    int i = 0;
    for (; i + LANES <= n; i += LANES) squares += *(const vec *)(hidden + i) * *(const vec *)(hidden + i);
    float total = sum(squares);
    for (; i < n; i++) total += hidden[i] * hidden[i];
    float factor = 1.0f / sqrtf(total / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES)
        *(vec *)(out + i) = *(const vec *)(hidden + i) * all(factor) * *(const vec *)(weight + i);
    for (; i < n; i++) out[i] = hidden[i] * factor * weight[i];
}

/* out [rows, n] = norms of hidden [rows, n]. */
static void norms(const float *hidden, const float *weight, float eps, float *out, int64_t rows, int64_t n) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) norm_row(hidden + row * n, weight, out + row * n, (int)n, eps);
}

/* out [rows, half] = silu(first half) * second half of gate_up [rows, 2 * half]. */
static void silu_mul(const float *gate_up, float *out, int64_t rows, int64_t half) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * half, *up = gate + half;
        float *target = out + row * half;
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            vec x = *(const vec *)(gate + i);
            *(vec *)(target + i) = x / (all(1.0f) + exponential(-x)) * *(const vec *)(up + i);
        }
        for (; i < half; i++) target[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* ---------------------------------------------------------------------------------------------------- attention */

/* The reads of one pass, the same for all layers. A segment is a stretch of keys that several rows see; its entries
 * are those rows. A unit is a part of a segment's keys. What a unit finds for an entry is a partial result. */
typedef struct {
    int64_t rows, query_heads, kv_heads, dim, units;
    const int64_t *slots;         /* of all segments, one after another */
    const int64_t *unit_slot;     /* [units] its first key in slots */
    const int64_t *unit_keys;     /* [units] */
    const int64_t *unit_offset;   /* [units] of its first key in its segment */
    const int64_t *unit_segment;  /* [units] */
    const int64_t *unit_partial;  /* [units] its first partial result */
    const int64_t *segment_entry; /* [segments + 1] first entry */
    const int64_t *entry_row;     /* [entries] */
    const int64_t *entry_seen;    /* [entries] keys of the segment that the row sees */
    const int64_t *row_part;      /* [rows + 1] first of the row's in parts */
    const int64_t *parts;         /* partial results of each row, one row after another */
    float *partial;               /* [partials, query_heads, dim + 2]: weighted values, largest score, sum of weights */
    const float *cosines, *sines; /* [rows, dim / 2] */
    const int64_t *new_slots;     /* [rows] where the rows' own keys and values go */
    float *qkv;                   /* [rows, query_heads + 2 * kv_heads, dim] of one layer; queries are turned here */
    float *attended;              /* [rows, query_heads, dim] of one layer */
} Pass;

/* One layer. */
typedef struct {
    Linear qkv, output, gate_up, down;
    float *keys, *values;                        /* the pool's, [slots, kv_heads, dim] */
    const float *before_attention, *before_mlp;  /* [hidden size] of norms */
    const float *query_weight, *key_weight;      /* [dim] of norms, or null */
    float attention_eps, mlp_eps, query_eps, key_eps, scale;
} Layer;

INLINE void turn(const float *x, float *out, const float *cosine, const float *sine, int half) {
    for (int i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        out[i] = first * cosine[i] - second * sine[i];
        out[i + half] = second * cosine[i] + first * sine[i];
    }
}

/* Turns a row's queries in place, and writes its keys, turned, and values to the pool. */
static void place_row(const Pass *pass, const Layer *layer, int64_t row) {
    int dim = (int)pass->dim;
    const float *cosine = pass->cosines + row * (dim / 2), *sine = pass->sines + row * (dim / 2);
    float *head = pass->qkv + row * (pass->query_heads + 2 * pass->kv_heads) * dim;
    int64_t slot = pass->new_slots[row] * pass->kv_heads * dim;
    for (int64_t h = 0; h < pass->query_heads; h++, head += dim) {
        if (layer->query_weight) norm_row(head, layer->query_weight, head, dim, layer->query_eps);
        turn(head, head, cosine, sine, dim / 2);
    }
    for (int64_t h = 0; h < pass->kv_heads; h++, head += dim) {
        if (layer->key_weight) norm_row(head, layer->key_weight, head, dim, layer->key_eps);
        turn(head, layer->keys + slot + h * dim, cosine, sine, dim / 2);
    }
    memcpy(layer->values + slot, head, sizeof(float) * pass->kv_heads * dim);
}

/* scores[q][t] of `count` queries and four keys. */
INLINE void score4(const float *const *queries, int count, const float *const *keys, float *scores, float scale,
                   int dim) {
    vec found[3][4];
    for (int q = 0; q < count; q++)
        for (int t = 0; t < 4; t++) found[q][t] = all(0.0f);
    for (int d = 0; d < dim; d += LANES)
        for (int t = 0; t < 4; t++) {
            vec key = *(const vec *)(keys[t] + d);
            for (int q = 0; q < count; q++) found[q][t] += *(const vec *)(queries[q] + d) * key;
        }
    for (int q = 0; q < count; q++) {
#ifdef __AVX__
        __m256 low = _mm256_hadd_ps(_mm256_hadd_ps((__m256)found[q][0], (__m256)found[q][1]),
                                    _mm256_hadd_ps((__m256)found[q][2], (__m256)found[q][3]));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
        _mm_storeu_ps(scores + q * KEYS, _mm_mul_ps(four, _mm_set1_ps(scale)));
#else
        for (int t = 0; t < 4; t++) scores[q * KEYS + t] = sum(found[q][t]) * scale;
#endif
    }
}

/* out[q] = sum over keys of weights[q][t] * values[t], for `count` queries and `width` elements from `first` on. */
INLINE void weigh(const float *weights, int count, const float *const *values, int keys, float *const *out, int first,
                  int width) {
    vec total[3][4];
    for (int q = 0; q < count; q++)
        for (int d = 0; d < width; d++) total[q][d] = all(0.0f);
    for (int t = 0; t < keys; t++)
        for (int d = 0; d < width; d++) {
            vec value = *(const vec *)(values[t] + first + d * LANES);
            for (int q = 0; q < count; q++) total[q][d] += all(weights[q * KEYS + t]) * value;
        }
    for (int q = 0; q < count; q++)
        for (int d = 0; d < width; d++) *(vec *)(out[q] + first + d * LANES) = total[q][d];
}

INLINE void fetch(const float *row, int dim) {
    for (int d = 0; d < dim; d += 16) __builtin_prefetch(row + d);
}

/* A unit's partial results for `count` queries; `first`: its keys and values were not read yet. */
INLINE void block(const float *const *queries, int count, const int64_t *seen, const float *const *keys,
                  const float *const *values, int size, float *const *out, float scale, int first, int dim) {
    float scores[3 * KEYS];
    int padded = (size + 3) & ~3; /* pointers beyond the last key repeat it */
    for (int t = 0; t < padded; t += 4) {
        if (first)
            for (int ahead = 0; ahead < 4; ahead++) {
                fetch(keys[t + ahead + 8 < size ? t + ahead + 8 : t], dim);
                fetch(values[t + ahead], dim);
            }
        score4(queries, count, keys + t, scores + t, scale, dim);
    }
    for (int q = 0; q < count; q++) {
        float *line = scores + q * KEYS, top = NEVER;
        int limit = seen[q] < size ? (int)(seen[q] < 0 ? 0 : seen[q]) : size;
        for (int t = limit; t < ((size + 7) & ~7); t++) line[t] = NEVER;
        for (int t = 0; t < limit; t++) top = line[t] > top ? line[t] : top;
        vec total = all(0.0f);
        for (int t = 0; t < size; t += LANES) {
            vec one = *(vec *)(line + t);
            one = pick(one > all(0.5f * NEVER), exponential(one - all(top)), all(0.0f));
            *(vec *)(line + t) = one;
            total += one;
        }
        out[q][dim] = top;
        out[q][dim + 1] = sum(total);
    }
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) weigh(scores, count, values, size, out, d, 4);
    for (; d < dim; d += LANES) weigh(scores, count, values, size, out, d, 1);
}

INLINE void unit_of(const Pass *pass, const Layer *layer, int64_t unit, int64_t head, int dim) {
    const float *keys[KEYS + 3], *values[KEYS + 3];
    int size = (int)pass->unit_keys[unit];
    const int64_t *slots = pass->slots + pass->unit_slot[unit];
    for (int t = 0; t < size + 3; t++) {
        int64_t at = (slots[t < size ? t : size - 1] * pass->kv_heads + head) * dim;
        keys[t] = layer->keys + at;
        values[t] = layer->values + at;
    }
    int64_t segment = pass->unit_segment[unit], group = pass->query_heads / pass->kv_heads;
    int64_t first = pass->segment_entry[segment], entries = pass->segment_entry[segment + 1] - first;
    int64_t width = pass->query_heads + 2 * pass->kv_heads;
    for (int64_t done = 0; done < entries * group; done += 3) {
        const float *queries[3];
        float *out[3];
        int64_t seen[3];
        int count = entries * group - done < 3 ? (int)(entries * group - done) : 3;
        for (int q = 0; q < count; q++) {
            int64_t entry = (done + q) / group, query = head * group + (done + q) % group;
            queries[q] = pass->qkv + (pass->entry_row[first + entry] * width + query) * dim;
            out[q] = pass->partial + ((pass->unit_partial[unit] + entry) * pass->query_heads + query) * (dim + 2);
            seen[q] = pass->entry_seen[first + entry] - pass->unit_offset[unit];
        }
        if (count == 3)
            block(queries, 3, seen, keys, values, size, out, layer->scale, done == 0, dim);
        else if (count == 2)
            block(queries, 2, seen, keys, values, size, out, layer->scale, done == 0, dim);
        else
            block(queries, 1, seen, keys, values, size, out, layer->scale, done == 0, dim);
    }
}

/* One softmax over all keys of a row's head, from its partial results. */
INLINE void merge(const Pass *pass, int64_t row, int64_t head, int dim) {
    const int64_t *part = pass->parts + pass->row_part[row], *end = pass->parts + pass->row_part[row + 1];
    float *out = pass->attended + (row * pass->query_heads + head) * dim, top = NEVER, total = 0.0f;
    for (const int64_t *p = part; p < end; p++) {
        float one = pass->partial[(*p * pass->query_heads + head) * (dim + 2) + dim];
        top = one > top ? one : top;
    }
    for (int d = 0; d < dim; d += LANES) *(vec *)(out + d) = all(0.0f);
    for (const int64_t *p = part; p < end; p++) {
        const float *found = pass->partial + (*p * pass->query_heads + head) * (dim + 2);
        if (found[dim + 1] <= 0.0f) continue;
        float weight = expf(found[dim] - top);
        total += weight * found[dim + 1];
        for (int d = 0; d < dim; d += LANES) *(vec *)(out + d) += all(weight) * *(const vec *)(found + d);
    }
    for (int d = 0; d < dim; d += LANES) *(vec *)(out + d) /= all(total);
}

/* Norms and rotation of queries and keys, keys and values into the pool, attention; dim is a multiple of 16. */
INLINE void attend(const Pass *pass, const Layer *layer, int dim) {
#pragma omp for
    for (int64_t row = 0; row < pass->rows; row++) place_row(pass, layer, row);
#pragma omp for schedule(dynamic)
    for (int64_t work = 0; work < pass->units * pass->kv_heads; work++)
        unit_of(pass, layer, work / pass->kv_heads, work % pass->kv_heads, dim);
#pragma omp for
    for (int64_t work = 0; work < pass->rows * pass->query_heads; work++)
        merge(pass, work / pass->query_heads, work % pass->query_heads, dim);
}

/* Adds to hidden [rows, hidden size] what `count` layers give. Memory for results on the way: normed
 * [rows, hidden size], gate_up [rows, 2 * half], gated [rows, half], ordered (see ordered_floats, of the layer's widest
 * input). */
void rksc_layers(const Pass *pass, const Layer *layers, int64_t count, float *hidden, float *normed, float *gate_up,
                 float *gated, float *ordered) {
#pragma omp parallel
    for (const Layer *layer = layers; layer < layers + count; layer++) {
        int64_t rows = pass->rows, width = layer->qkv.in;
        norms(hidden, layer->before_attention, layer->attention_eps, normed, rows, width);
        through(&layer->qkv, normed, pass->qkv, rows, 0, ordered);
        if (pass->dim == 64)
            attend(pass, layer, 64);
        else if (pass->dim == 128)
            attend(pass, layer, 128);
        else
            attend(pass, layer, (int)pass->dim);
        through(&layer->output, pass->attended, hidden, rows, 1, ordered);
        norms(hidden, layer->before_mlp, layer->mlp_eps, normed, rows, width);
        through(&layer->gate_up, normed, gate_up, rows, 0, ordered);
        silu_mul(gate_up, gated, rows, layer->down.in);
        through(&layer->down, gated, hidden, rows, 1, ordered);
    }
}

/* Keys of a unit of work: what a plan must be made for. */
int64_t rksc_unit_keys(void) { return KEYS; }
