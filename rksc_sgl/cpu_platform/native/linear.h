/* Linear layers on weights in panels: float32 numbers, bfloat16 and float16 ones as they are in a checkpoint.
 *
 * All arithmetic is float32, and what a row gives does not depend on the type that its numbers are stored in, on the
 * rows beside it, or on the way that is taken: the sum of an output runs over the inputs in order, one multiplication
 * and addition after another.
 */
#define PANEL 16    /* outputs of a linear layer that are computed together */
#define BLOCK 96    /* inputs after which the next of few rows are taken: their weights stay in the nearest cache */
#define AHEAD 3072  /* bytes for which a panel's weights are fetched in advance */
#define MANY 33     /* rows from which on they are copied into the order in which they are read */
#define SPAN 240    /* rows that are copied at once: with DEPTH they fill a good part of the second cache */
#define DEPTH 384   /* inputs after which the next of many rows are taken */
#define GROUP 8     /* panels that many rows go through one after another */
#define BESIDE 4    /* most panels that few rows go through side by side */

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* types of weights */

#ifdef __AVX512F__
#define PART_LANES 16
#define TILE 12 /* most rows that are computed together: their sums and what feeds them stay in registers */
/* Panels beside each other: few sums would wait for themselves. */
#define SIDE(rows) ((rows) == 1 ? 4 : (rows) <= 4 ? 2 : 1)
typedef float part __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(64), aligned(4), may_alias));
INLINE part every(float x) { return (part){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
#else
#define PART_LANES 8
#define TILE 6
#define SIDE(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)
typedef vec part;
typedef ivec words;
INLINE part every(float x) { return all(x); }
#endif
#define PARTS (PANEL / PART_LANES)

/* A weight [outs, in] in panels [outs / PANEL rounded up, in, PANEL], the last one filled up with zeros. bfloat16 numbers
 * of a panel come in pairs, those of two inputs for one output: a word, whose halves are two float32 numbers cut short. */
typedef struct {
    const void *panels;
    const float *bias; /* [outs] or null */
    int64_t in, outs, type;
} Linear;

INLINE int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

/* Where a panel of `in` inputs has the number of input `k` and output `i`. The last of an odd number has no partner. */
INLINE int64_t place_of(int64_t k, int64_t i, int64_t in, int64_t type) {
    return type == BFLOAT16 && (k | 1) < in ? k / 2 * 2 * PANEL + 2 * i + k % 2 : k * PANEL + i;
}

INLINE float of_bfloat16(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float of_float16(uint16_t number) {
    uint32_t sign = (uint32_t)(number & 0x8000) << 16, rest = number & 0x7fff, bits;
    float value;
    if (rest >= 0x7c00) /* infinite, or no number */
        bits = sign | 0x7f800000 | rest << 13;
    else if (rest >= 0x0400)
        bits = sign | ((rest << 13) + (112u << 23));
    else { /* less than the least normal one: that many of 2^-24 */
        value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The weights of a panel's outputs for one input, as float32; of bfloat16 numbers the last input without a partner. */
INLINE void weights_of(part found[PARTS], const void *panel, int64_t k, int type) {
    if (type == FLOAT32) {
        const float *line = (const float *)panel + k * PANEL;
        for (int p = 0; p < PARTS; p++) found[p] = *(const part *)(line + p * PART_LANES);
        return;
    }
    const uint16_t *line = (const uint16_t *)panel + k * PANEL;
    for (int p = 0; p < PARTS; p++) {
#if defined(__AVX512F__)
        if (type == FLOAT16) {
            found[p] = (part)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)line));
            continue;
        }
#elif defined(__F16C__)
        if (type == FLOAT16) {
            found[p] = (part)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(line + p * PART_LANES)));
            continue;
        }
#endif
        for (int i = 0; i < PART_LANES; i++) {
            uint16_t number = line[p * PART_LANES + i];
            found[p][i] = type == BFLOAT16 ? of_bfloat16(number) : of_float16(number);
        }
    }
}

/* The same for inputs k and k + 1, of which k is even. */
INLINE void weights_of_two(part found[2][PARTS], const void *panel, int64_t k, int type) {
    if (type != BFLOAT16) {
        weights_of(found[0], panel, k, type);
        weights_of(found[1], panel, k + 1, type);
        return;
    }
    for (int p = 0; p < PARTS; p++) {
        words pairs = *(const words *)((const uint16_t *)panel + k * PANEL + 2 * p * PART_LANES);
        found[0][p] = (part)(pairs << 16);
        found[1][p] = (part)(pairs & (int32_t)0xffff0000);
    }
}

/* sums[r] += input k of row r * its weights. */
INLINE void multiply(part sums[TILE][PARTS], const float *x, int64_t row, int64_t step, part weights[PARTS], int64_t k,
                     int rows) {
    for (int r = 0; r < rows; r++) {
        part input = every(x[r * row + k * step]);
        for (int p = 0; p < PARTS; p++) sums[r][p] += input * weights[p];
    }
}

/* Inputs `begin` to `end` of `rows` rows through `panels` panels, `size` bytes from one to the next: input k of row r is
 * x[r * row + k * step]. found [panels, wide], of which the first [rows, PANEL] are set at the first input and added to
 * at others. `fetch`: the panels' next inputs are asked for. */
INLINE void tile(const float *x, int64_t row, int64_t step, const void *panel, int64_t size, float *found, int64_t wide,
                 int64_t begin, int64_t end, int rows, int panels, int type, int fetch) {
    part sums[BESIDE][TILE][PARTS];
    for (int n = 0; n < panels; n++)
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++)
                sums[n][r][p] =
                    begin ? *(const part *)(found + n * wide + r * PANEL + p * PART_LANES) : every(0.0f);
    const int64_t line = PANEL * bytes_of(type);
    int64_t k = begin; /* even */
    for (; k + 2 <= end; k += 2)
        for (int n = 0; n < panels; n++) {
            const char *one = (const char *)panel + n * size;
            if (fetch) {
                __builtin_prefetch(one + k * line + AHEAD);
                if (type == FLOAT32) __builtin_prefetch(one + (k + 1) * line + AHEAD);
            }
            part weights[2][PARTS];
            weights_of_two(weights, one, k, type);
            multiply(sums[n], x, row, step, weights[0], k, rows);
            multiply(sums[n], x, row, step, weights[1], k + 1, rows);
        }
    if (k < end)
        for (int n = 0; n < panels; n++) {
            part weights[PARTS];
            weights_of(weights, (const char *)panel + n * size, k, type);
            multiply(sums[n], x, row, step, weights, k, rows);
        }
    for (int n = 0; n < panels; n++)
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++)
                *(part *)(found + n * wide + r * PANEL + p * PART_LANES) = sums[n][r][p];
}

/* The same of rows of `in` inputs, or of rows that are ordered, and of any number of panels. */
INLINE void tile_of(const float *x, int64_t in, int ordered, const void *panel, float *found, int64_t wide,
                    int64_t begin, int64_t end, int rows, int panels, int type, int fetch) {
    const int64_t size = in * PANEL * bytes_of(type);
    int done = 0;
#define SOME(n, side)                                                                                            \
    for (; done + (side) <= panels; done += (side))                                                              \
    tile(x, ordered ? 1 : in, ordered ? n : 1, (const char *)panel + done * size, size, found + done * wide, wide, begin, \
         end, n, side, type, fetch)
#define OF(n)             \
    case n:               \
        SOME(n, SIDE(n)); \
        SOME(n, 1);       \
        break
    switch (rows) { /* each a loop of its own, with its sums in registers */
        OF(1); OF(2); OF(3); OF(4); OF(5); OF(6);
#if TILE > 6
        OF(7); OF(8); OF(9); OF(10); OF(11); OF(12);
#endif
    }
#undef OF
#undef SOME
}

/* What was found for `rows` rows of a panel goes where it belongs: out [rows, outs] is that, or that much more. */
INLINE void place(const Linear *linear, int64_t number, const float *found, float *out, int64_t rows, int add) {
    const int64_t outs = linear->outs, first = number * PANEL, width = outs - first < PANEL ? outs - first : PANEL;
    const float *bias = linear->bias ? linear->bias + first : 0;
    for (int64_t r = 0; r < rows; r++) {
        float *target = out + r * outs + first;
        const float *one = found + r * PANEL;
        for (int64_t i = 0; i < width; i++) {
            float value = one[i] + (bias ? bias[i] : 0.0f);
            target[i] = add ? target[i] + value : value;
        }
    }
}

INLINE const void *panel_of(const Linear *linear, int64_t number) {
    return (const char *)linear->panels + number * linear->in * PANEL * bytes_of(linear->type);
}

/* Less than MANY rows through at most BESIDE panels. */
INLINE void few_rows(const Linear *linear, int64_t number, int panels, const float *x, float *out, int rows, int add,
                     int type) {
    const int64_t in = linear->in, block = rows <= TILE ? in : BLOCK, wide = rows * PANEL;
    const void *panel = panel_of(linear, number);
    float found[BESIDE * MANY * PANEL] __attribute__((aligned(64)));
    for (int64_t begin = 0; begin < in; begin += block) {
        int64_t end = begin + block < in ? begin + block : in;
        int done = 0;
        for (int tiles = (rows + TILE - 1) / TILE; tiles > 0; tiles--) {
            int some = (rows - done + tiles - 1) / tiles;
            if (done == 0)
                tile_of(x, in, 0, panel, found, wide, begin, end, some, panels, type, 1);
            else
                tile_of(x + done * in, in, 0, panel, found + done * PANEL, wide, begin, end, some, panels, type, 0);
            done += some;
        }
    }
    for (int p = 0; p < panels; p++) place(linear, number + p, found + p * wide, out, rows, add);
}

/* Copies rows [rows, in] of x so that a tile finds the inputs that it reads next beside each other: by DEPTH inputs, by
 * tile, by input, by row. */
static void order(const float *x, float *ordered, int64_t rows, int64_t in) {
    const int64_t tiles = (rows + TILE - 1) / TILE, blocks = (in + DEPTH - 1) / DEPTH;
#pragma omp for
    for (int64_t work = 0; work < blocks * tiles; work++) {
        int64_t begin = work / tiles * DEPTH, depth = in - begin < DEPTH ? in - begin : DEPTH, number = work % tiles;
        int64_t first = number * rows / tiles, some = (number + 1) * rows / tiles - first;
        float *target = ordered + begin * rows + first * depth;
        for (int64_t r = 0; r < some; r++)
            for (int64_t k = 0; k < depth; k++) target[k * some + r] = x[(first + r) * in + begin + k];
    }
}

/* At most SPAN rows, in that order, through some panels. */
INLINE void many_rows(const Linear *linear, int64_t number, int panels, const float *ordered, float *out, int64_t rows,
                      int add, int type) {
    const int64_t in = linear->in, tiles = (rows + TILE - 1) / TILE;
    float found[GROUP * SPAN * PANEL] __attribute__((aligned(64)));
    for (int64_t begin = 0; begin < in; begin += DEPTH) {
        int64_t depth = in - begin < DEPTH ? in - begin : DEPTH;
        for (int p = 0; p < panels; p++) {
            const void *panel = panel_of(linear, number + p);
            for (int64_t t = 0; t < tiles; t++) {
                int64_t first = t * rows / tiles, some = (t + 1) * rows / tiles - first;
                /* the tile's input k is at k * some, counted from its block's first */
                tile_of(ordered + begin * rows + first * depth - begin * some, in, 1, panel,
                        found + (p * rows + first) * PANEL, 0, begin, begin + depth, (int)some, 1, type, 0);
            }
        }
    }
    for (int p = 0; p < panels; p++) place(linear, number + p, found + p * rows * PANEL, out, rows, add);
}

/* Floats of memory that `through` needs for `rows` rows of `in` inputs. */
INLINE int64_t ordered_floats(int64_t rows, int64_t in) { return rows < MANY ? 0 : (rows < SPAN ? rows : SPAN) * in; }

INLINE void through_type(const Linear *linear, const float *x, float *out, int64_t rows, int add, float *ordered,
                         int type) {
    const int64_t in = linear->in, panels = (linear->outs + PANEL - 1) / PANEL;
    int64_t group = panels / (4 * omp_get_num_threads()); /* all threads have work to the end */
    if (rows < MANY) {
        group = group < 2 ? 2 : group > BESIDE ? BESIDE : group;
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < panels; number += group)
            few_rows(linear, number, (int)(panels - number < group ? panels - number : group), x, out, (int)rows, add,
                     type);
        return;
    }
    int64_t spans = (rows + SPAN - 1) / SPAN;
    group = group < 1 ? 1 : group > GROUP ? GROUP : group;
    for (int64_t span = 0; span < spans; span++) {
        int64_t first = span * rows / spans, some = (span + 1) * rows / spans - first;
        order(x + first * in, ordered, some, in);
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < panels; number += group)
            many_rows(linear, number, (int)(panels - number < group ? panels - number : group), ordered,
                      out + first * linear->outs, some, add, type);
    }
}

static void through_float32(const Linear *linear, const float *x, float *out, int64_t rows, int add, float *ordered) {
    through_type(linear, x, out, rows, add, ordered, FLOAT32);
}

static void through_bfloat16(const Linear *linear, const float *x, float *out, int64_t rows, int add, float *ordered) {
    through_type(linear, x, out, rows, add, ordered, BFLOAT16);
}

static void through_float16(const Linear *linear, const float *x, float *out, int64_t rows, int add, float *ordered) {
    through_type(linear, x, out, rows, add, ordered, FLOAT16);
}

/* out [rows, outs] = x [rows, in] through the layer, or that much more; `ordered`: see ordered_floats. Within a parallel
 * region, as all functions that share out their work. */
static void through(const Linear *linear, const float *x, float *out, int64_t rows, int add, float *ordered) {
    if (linear->type == BFLOAT16)
        through_bfloat16(linear, x, out, rows, add, ordered);
    else if (linear->type == FLOAT16)
        through_float16(linear, x, out, rows, add, ordered);
    else
        through_float32(linear, x, out, rows, add, ordered);
}

void rksc_linear(const Linear *linear, const float *x, float *out, int64_t rows, float *ordered) {
#pragma omp parallel
    through(linear, x, out, rows, 0, ordered);
}

/* Outputs of a panel: how a weight must be laid out. */
int64_t rksc_panel(void) { return PANEL; }

int64_t rksc_ordered_floats(int64_t rows, int64_t in) { return ordered_floats(rows, in); }

/* Rows [outs, in] of a weight into panels of zeros; `back`: out of panels. */
#define MOVE(number, width)                                                                                     \
    for (int64_t k = 0; k < in; k++)                                                                            \
        for (int64_t i = 0; i < (width); i++) {                                                                 \
            number *there = (number *)panels + panel * in * PANEL + place_of(k, i, in, type);                   \
            number *here = (number *)rows + (panel * PANEL + i) * in + k;                                       \
            if (back)                                                                                           \
                *here = *there;                                                                                 \
            else                                                                                                \
                *there = *here;                                                                                 \
        }

INLINE void move_panel(void *rows, void *panels, int64_t panel, int64_t outs, int64_t in, int type, int back) {
    const int64_t width = outs - panel * PANEL;
    if (type == FLOAT32) {
        if (width >= PANEL)
            MOVE(uint32_t, PANEL)
        else
            MOVE(uint32_t, width)
    } else if (width >= PANEL)
        MOVE(uint16_t, PANEL)
    else
        MOVE(uint16_t, width)
}

INLINE void move_type(void *rows, void *panels, int64_t panel, int64_t outs, int64_t in, int64_t type, int back) {
    if (type == BFLOAT16)
        move_panel(rows, panels, panel, outs, in, BFLOAT16, back);
    else if (type == FLOAT16)
        move_panel(rows, panels, panel, outs, in, FLOAT16, back);
    else
        move_panel(rows, panels, panel, outs, in, FLOAT32, back);
}

static void move(void *rows, void *panels, int64_t outs, int64_t in, int64_t type, int back) {
#pragma omp parallel for
    for (int64_t panel = 0; panel < (outs + PANEL - 1) / PANEL; panel++)
        if (back)
            move_type(rows, panels, panel, outs, in, type, 1);
        else
            move_type(rows, panels, panel, outs, in, type, 0);
}

void rksc_pack(const void *rows, void *panels, int64_t outs, int64_t in, int64_t type) {
    move((void *)rows, panels, outs, in, type, 0);
}

void rksc_unpack(const void *panels, void *rows, int64_t outs, int64_t in, int64_t type) {
    move(rows, (void *)panels, outs, in, type, 1);
}

/* found [count, in] = the rows `numbers` of the weight, as float32. */
void rksc_rows(const Linear *linear, const int64_t *numbers, float *found, int64_t count) {
#pragma omp parallel for
    for (int64_t one = 0; one < count; one++) {
        const int64_t in = linear->in, output = numbers[one] % PANEL, type = linear->type;
        const void *panel = panel_of(linear, numbers[one] / PANEL);
        float *row = found + one * in;
        for (int64_t k = 0; k < in; k++) {
            int64_t at = place_of(k, output, in, type);
            if (type == FLOAT32)
                row[k] = ((const float *)panel)[at];
            else {
                uint16_t number = ((const uint16_t *)panel)[at];
                row[k] = type == BFLOAT16 ? of_bfloat16(number) : of_float16(number);
            }
        }
    }
}
