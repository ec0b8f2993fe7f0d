/* Keys and values of a donor's tokens into other slots, in many layers, keys turned to their new positions. The eager
 * reference is PlainTakeOver in rksc_sgl/blending/take_over.py. */

#define MOST_PAIRS 512 /* of a head */

typedef struct {
    int64_t layers, tokens, heads, key_size, value_width, pairs, is_neox;
    float *const *keys;   /* of each layer, [slots, heads, key_size] */
    float *const *values; /* of each layer, [slots, value_width] */
    const float *table;   /* [positions, 2 * pairs]: cosines, sines */
    const int64_t *own, *theirs, *old, *new_; /* of rows */
    const int64_t *taken;                     /* [tokens] rows */
} TakeOver;

static void take_one(const TakeOver *t, int64_t row) {
    const int64_t pairs = t->pairs, size = t->key_size, old = t->old[row], now = t->new_[row];
    const int turns = pairs && old != now;
    float cosines[MOST_PAIRS], sines[MOST_PAIRS];
    for (int64_t i = 0; turns && i < pairs; i++) {
        const float *from = t->table + old * 2 * pairs, *to = t->table + now * 2 * pairs;
        const float square = from[i] * from[i] + from[pairs + i] * from[pairs + i];
        cosines[i] = (to[i] * from[i] + to[pairs + i] * from[pairs + i]) / square;
        sines[i] = (to[pairs + i] * from[i] - to[i] * from[pairs + i]) / square;
    }
    const int64_t apart = t->is_neox ? pairs : 1, step = t->is_neox ? 1 : 2;
    for (int64_t layer = 0; layer < t->layers; layer++) {
        const float *from = t->keys[layer] + t->theirs[row] * t->heads * size;
        float *to = t->keys[layer] + t->own[row] * t->heads * size;
        memcpy(to, from, (size_t)(t->heads * size) * sizeof(float));
        for (int64_t head = 0; turns && head < t->heads; head++)
            for (int64_t i = 0; i < pairs; i++) {
                const float first = from[head * size + step * i], second = from[head * size + step * i + apart];
                to[head * size + step * i] = first * cosines[i] - second * sines[i];
                to[head * size + step * i + apart] = second * cosines[i] + first * sines[i];
            }
        memcpy(t->values[layer] + t->own[row] * t->value_width, t->values[layer] + t->theirs[row] * t->value_width,
               (size_t)t->value_width * sizeof(float));
    }
}

int64_t rksc_most_pairs(void) { return MOST_PAIRS; }

void rksc_take_over(const TakeOver *t) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < t->tokens; i++) take_one(t, t->taken[i]);
}
