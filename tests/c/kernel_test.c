/* Checks what a kernel is made of against scalar loops: vector operations, dtype conversions, transpositions,
 * packing and products. Compiled once for each file of csrc/isa/, with its flags and with TEST_ISA and
 * TEST_ELEMENT, and TEST_CPU for what the CPU must have (csrc/flags.py). On a CPU without the instruction set
 * nothing is checked. */
#pragma GCC diagnostic ignored "-Wunused-function" /* headers of which only a part is called */

/* The instruction set's own file, up to forward.h, which this makes empty. */
#define FA_KERNEL_FORWARD_H
#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)
#define NAME_OF(a, b) a##b
#define NAME(a, b) NAME_OF(a, b)
/* Spaces would be part of the name. */
/* clang-format off */
#define KERNEL_FILE_OF(i, e) STRING(../../csrc/isa/i##_##e.c)
/* clang-format on */
#define KERNEL_FILE(i, e) KERNEL_FILE_OF(i, e)
#include KERNEL_FILE(TEST_ISA, TEST_ELEMENT)
#include "kernel/limits.h"
#include "kernel/score_mods.h"

#include "check.h"
#include "cpu.h"
#include "float_mode.h"

#define EPSILON (FA_REAL_BYTES == 4 ? 0x1p-23 : 0x1p-52)

static double random_unit(void)
{
    return (double)random_int(-(1 << 20), 1 << 20) * 0x1p-20;
}

static bool same(double a, double b)
{
    return a == b || (isnan(a) && isnan(b));
}

/* Numbers of every kind in the first lanes, and random ones. Not subnormal: kernels take those for 0. */
static vec random_vec(void)
{
    static const double special[] = {0, -0.0, 1, -1, INFINITY, -INFINITY, NAN, 0.5, -1.5, 2.5, 1e-30, 1e30};
    vec x;
    for (int i = 0; i < LANES; i++) {
        const int64_t pick = random_int(0, 23);
        x[i] = (real)(pick < 12 ? special[pick] : 100 * random_unit());
    }
    return x;
}

/* --- vector operations ------------------------------------------------------------------------------ */

static bool lane_of(vmask where, int i)
{
    vec chosen = vec_select(where, vec_splat(1), vec_splat(0));
    return chosen[i] == 1;
}

static void check_comparisons(void)
{
    const vec a = random_vec(), b = random_vec();
    bool any = false;
    for (int i = 0; i < LANES; i++) {
        REQUIRE(lane_of(vec_greater(a, b), i) == (a[i] > b[i]));
        REQUIRE(lane_of(vec_equal(a, b), i) == (a[i] == b[i]));
        REQUIRE(same(vec_select(vec_greater(a, b), a, b)[i], a[i] > b[i] ? a[i] : b[i]));
        REQUIRE(same(vec_max(a, b)[i], a[i] > b[i] ? a[i] : b[i]), "max(%g, %g)", (double)a[i], (double)b[i]);
        any |= a[i] > b[i];
    }
    REQUIRE(vmask_any(vec_greater(a, b)) == any);
    REQUIRE(!vmask_any(vec_greater(a, a)));
}

static void check_integers(void)
{
    ivec a, b;
    for (int i = 0; i < LANES; i++) {
        a[i] = (lane_int)(random_int(0, 3) == 0 ? 0 : random_bits());
        b[i] = (lane_int)((lane_uint)1 << random_int(0, LANE_BITS - 1));
    }
    for (int i = 0; i < LANES; i++) {
        REQUIRE(ivec_nonzero(a)[i] == (a[i] != 0 ? -1 : 0));
        REQUIRE(lane_of(ivec_test(a, b), i) == ((a[i] & b[i]) != 0));
        REQUIRE(ivec_splat(a[0])[i] == a[0]);
    }
}

static void check_arithmetic(void)
{
    const vec x = random_vec(), y = vec_abs(random_vec());
    vec powers = {0};
    for (int i = 0; i < LANES; i++)
        powers[i] = (real)random_int(LOWEST_EXPONENT - 3, -LOWEST_EXPONENT);
    const vec scaled = vec_scale_exponent(vec_splat((real)1.25), powers), rounded = vec_round(x);
    for (int i = 0; i < LANES; i++) {
        REQUIRE(same(vec_abs(x)[i], fabs((double)x[i])));
        REQUIRE(same(vec_copysign(y, x)[i], copysign((double)y[i], (double)x[i])));
        if (fabs((double)x[i]) < 0x1p21)
            REQUIRE(rounded[i] == nearbyint((double)x[i]));
        if (fabs((double)x[i]) >= 0x1p23)
            REQUIRE(fabs((double)rounded[i]) >= 0x1p22 && !signbit(rounded[i]) == !signbit(x[i]));
        const double power = powers[i] < LOWEST_EXPONENT ? 0 : ldexp(1.25, (int)powers[i]);
        REQUIRE(scaled[i] == power, "1.25 * 2^%g", (double)powers[i]);
    }
}

static void check_lane_moves(void)
{
    vec x[LANES], transposed[LANES], pair[2];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++)
            transposed[i][j] = x[i][j] = (real)random_unit();
    vec_transpose(transposed);
    const vec sums = vec_sums(x);
    for (int i = 0; i < LANES; i++) {
        double sum = 0;
        for (int j = 0; j < LANES; j++) {
            REQUIRE(transposed[i][j] == x[j][i]);
            sum += (double)x[i][j];
        }
        REQUIRE(fabs((double)sums[i] - sum) <= LANES * LANES * EPSILON);
    }
    for (int count = 0; count < LANES; count++)
        for (int i = 0; i < LANES; i++)
            REQUIRE(vec_rotate(x[0], count)[i] == x[0][(i + count) % LANES]);
    memcpy(pair, x, sizeof pair);
    deinterleave(pair);
    for (int i = 0; i < 2 * LANES; i++)
        REQUIRE(pair[i % 2][i / 2] == x[i / LANES][i % LANES]);
    interleave(pair);
    REQUIRE(memcmp(pair, x, sizeof pair) == 0);
}

/* `most` of the units in the last place, of results that are normal numbers. */
static void require_close(double got, double want, double most, const char *name, double x)
{
    REQUIRE(isnan(got) == isnan(want), "%s(%.17g)", name, x);
    if (!isnan(want))
        REQUIRE(fabs(got - want) <= most * EPSILON * fabs(want), "%s(%.17g) = %.17g, not %.17g", name, x, got,
                want);
}

static void check_functions(void)
{
    vec x;
    for (int i = 0; i < LANES; i++)
        x[i] = (real)(random_unit() * (random_int(0, 1) ? 1 : 120));
    const vec power = vec_exp2(x), tangent = vec_tanh(x);
    for (int i = 0; i < LANES; i++) {
        require_close((double)power[i], exp2((double)x[i]), 2, "exp2", (double)x[i]);
        require_close((double)tangent[i], tanh((double)x[i]), 4, "tanh", (double)x[i]);
    }
    REQUIRE(vec_exp2(vec_splat(-(real)INFINITY))[0] == 0);
    REQUIRE(vec_exp2(vec_splat(LOWEST_EXPONENT - 2))[0] == 0);
    REQUIRE(isnan(vec_exp2(vec_splat((real)NAN))[0]) && isnan(vec_tanh(vec_splat((real)NAN))[0]));
    REQUIRE(vec_tanh(vec_splat((real)INFINITY))[0] == 1 && vec_tanh(vec_splat(-(real)INFINITY))[0] == -1);
}

static void check_mask_bits(void)
{
    char mask[64 * 3];
    const ptrdiff_t steps[] = {0, 1, 3, -1, -2};
    const ptrdiff_t step = steps[random_int(0, 4)];
    const int count = (int)random_int(1, 64);
    for (size_t i = 0; i < sizeof mask; i++)
        mask[i] = (char)random_int(0, 1);
    const char *first = step < 0 ? mask + sizeof mask - 1 : mask;
    uint64_t bits = 0;
    for (int n = 0; n < count; n++)
        bits |= (uint64_t)(first[n * step] != 0) << n;
    REQUIRE(load_mask_bits(first, step, count) == bits, "%d, %d bytes apart", count, (int)step);
}

/* --- dtypes ----------------------------------------------------------------------------------------- */

static double value_of_float16(unsigned h)
{
    const int exponent = h >> 10 & 31;
    const double mantissa = h & 1023, sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31)
        return mantissa != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25));
}

static double value_of_bfloat16(unsigned b)
{
    const uint32_t bits = b << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The number of the half type that is nearest to x, the even one of two: found among all. `largest` is the
 * bit pattern of the largest finite one. */
static unsigned nearest_half(double x, double (*value)(unsigned), unsigned largest)
{
    const unsigned sign = signbit(x) ? 0x8000 : 0;
    const double magnitude = fabs(x);
    unsigned lo = 0, hi = largest + 1; /* patterns of positive numbers are in their order */
    while (hi - lo > 1) {
        const unsigned middle = (lo + hi) / 2;
        if (value(middle) <= magnitude)
            lo = middle;
        else
            hi = middle;
    }
    /* Beyond the largest one stands infinity, where the next number would be. */
    const double above = lo == largest ? 2 * value(largest) - value(largest - 1) : value(lo + 1);
    const double down = magnitude - value(lo), up = above - magnitude;
    return sign | (down < up || (down == up && lo % 2 == 0) ? lo : lo + 1);
}

static void check_scalar_conversions(void)
{
    for (unsigned h = 0; h < 0x10000; h++) {
        REQUIRE(same(float_from_float16((uint16_t)h), value_of_float16(h)), "float16 %#x", h);
        REQUIRE(same(float_from_bfloat16((uint16_t)h), value_of_bfloat16(h)), "bfloat16 %#x", h);
        if (!isnan(value_of_float16(h)))
            REQUIRE(float16_from_float(float_from_float16((uint16_t)h)) == h, "float16 %#x", h);
        if (!isnan(value_of_bfloat16(h)))
            REQUIRE(bfloat16_from_float(float_from_bfloat16((uint16_t)h)) == h, "bfloat16 %#x", h);
    }
    for (int i = 0; i < 100000; i++) {
        const float x = float_from_bits((uint32_t)random_bits());
        if (isnan(x)) {
            REQUIRE(isnan(float_from_float16(float16_from_float(x))));
            REQUIRE(isnan(float_from_bfloat16(bfloat16_from_float(x))));
        } else if (!isinf(x)) {
            REQUIRE(float16_from_float(x) == nearest_half(x, value_of_float16, 0x7bff), "%a", (double)x);
            REQUIRE(bfloat16_from_float(x) == nearest_half(x, value_of_bfloat16, 0x7f7f), "%a", (double)x);
        }
    }
}

static const fa_dtype stored[] = {FA_FLOAT32, FA_FLOAT64, FA_FLOAT16, FA_BFLOAT16, FA_INT8};
enum { NUM_STORED = sizeof stored / sizeof *stored, NUM_WRITTEN = 4 }; /* int8 is only read */

/* A number that the dtype holds exactly. */
static double random_stored(fa_dtype dtype, char *dst)
{
    const double x = dtype == FA_INT8 ? (double)random_int(-128, 127) : (double)random_int(-255, 255) / 64;
    if (dtype == FA_INT8)
        *(int8_t *)dst = (int8_t)x;
    else
        store_element(dst, dtype, (real)x);
    return x;
}

static double value_at(const char *src, fa_dtype dtype)
{
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
    case FA_FLOAT32:
        memcpy(&f, src, sizeof f);
        return f;
    case FA_FLOAT64:
        memcpy(&d, src, sizeof d);
        return d;
    case FA_FLOAT16:
        memcpy(&h, src, sizeof h);
        return value_of_float16(h);
    case FA_BFLOAT16:
        memcpy(&h, src, sizeof h);
        return value_of_bfloat16(h);
    case FA_INT8:
        return *(const int8_t *)src;
    }
    abort();
}

static double value_of_half(fa_dtype dtype, unsigned h)
{
    return dtype == FA_FLOAT16 ? value_of_float16(h) : value_of_bfloat16(h);
}

/* The kernel's own conversion of every half, to vectors and back. bfloat16 instructions take subnormal
 * numbers for 0, as the products do. */
FA_INLINE void check_every_half(fa_dtype dtype)
{
    uint16_t halves[LANES], back[LANES];
    for (unsigned h = 0; h < 0x10000; h += LANES) {
        for (int i = 0; i < LANES; i++)
            halves[i] = (uint16_t)(h + (unsigned)i);
        const vec x = load_contiguous((const char *)halves, dtype);
        store_contiguous((char *)back, dtype, x);
        for (int i = 0; i < LANES; i++) {
            const double want = value_of_half(dtype, halves[i]);
            REQUIRE(same((double)x[i], want), "%#x", halves[i]);
            if (isnan(want))
                REQUIRE(isnan(value_of_half(dtype, back[i])), "%#x", halves[i]);
            else
                REQUIRE(back[i] == halves[i] || (dtype == FA_BFLOAT16 && fabs(want) < 0x1p-126), "%#x",
                        halves[i]);
        }
    }
}

FA_INLINE void check_rounding(fa_dtype dtype)
{
    uint16_t halves[LANES];
    vec x;
    for (int i = 0; i < LANES; i++)
        x[i] = (real)ldexp(random_unit(), (int)random_int(-30, 18));
    store_contiguous((char *)halves, dtype, x);
    for (int i = 0; i < LANES; i++) {
        const unsigned want = dtype == FA_FLOAT16 ? nearest_half((double)x[i], value_of_float16, 0x7bff)
                                                  : nearest_half((double)x[i], value_of_bfloat16, 0x7f7f);
        REQUIRE(halves[i] == want, "%a: %#x", (double)x[i], halves[i]);
    }
}

#if FA_REAL_BYTES == 4
static void check_vector_conversions(void)
{
    check_every_half(FA_FLOAT16);
    check_every_half(FA_BFLOAT16);
    for (int i = 0; i < 2000; i++) {
        check_rounding(FA_FLOAT16);
        check_rounding(FA_BFLOAT16);
    }
}
#else
static void check_vector_conversions(void) {} /* float64 has those of single elements */
#endif

/* A step in elements, either way. */
static ptrdiff_t random_step(int size)
{
    static const int steps[] = {1, 1, -1, 2, -2, 3, 7, -5, 40};
    return steps[random_int(0, 8)] * size;
}

/* Elements any step apart; what is not asked for is neither taken nor touched. */
static void check_elements(void)
{
    char memory[2 * 40 * 8 * LANES + 64];
    const fa_dtype dtype = stored[random_int(0, NUM_STORED - 1)];
    const int size = element_size(dtype), count = (int)random_int(1, LANES);
    const ptrdiff_t step = random_step(size);
    char *first = memory + sizeof memory / 2;
    double want[LANES];
    memset(memory, 0x7f, sizeof memory);
    for (int i = 0; i < count; i++)
        want[i] = random_stored(dtype, first + i * step);
    const vec x = load_elements(first, step, count, dtype);
    for (int i = 0; i < LANES; i++)
        REQUIRE((double)x[i] == (i < count ? want[i] : 0), "dtype %d, %d bytes apart", (int)dtype, (int)step);
    if (dtype == FA_INT8)
        return;
    char before[sizeof memory];
    memset(memory, 0x7f, sizeof memory);
    memcpy(before, memory, sizeof before);
    store_elements(first, step, count, dtype, x);
    for (int i = 0; i < count; i++) {
        REQUIRE(value_at(first + i * step, dtype) == want[i]);
        memcpy(first + i * step, before + (first + i * step - memory), (size_t)size);
    }
    REQUIRE(memcmp(memory, before, sizeof memory) == 0);
}

/* --- transpositions --------------------------------------------------------------------------------- */

/* Rows of elements that start anywhere: side by side, in order, or scattered. */
typedef struct {
    char memory[LANES * 64 * 8 * 3];
    char *rows[LANES];
    ptrdiff_t step;
} matrix;

static void make_matrix(matrix *m, int size)
{
    memset(m->memory, 0x7f, sizeof m->memory);
    const bool adjacent = random_int(0, 2) == 0;
    m->step = adjacent ? LANES * size * random_int(1, 2) : random_int(1, 3) * size;
    for (int j = 0; j < LANES; j++)
        m->rows[j] = m->memory + (adjacent ? j * size : (LANES - 1 - j) * 64 * size);
}

static void check_transposed(void)
{
    static matrix from, to;
    const fa_dtype dtype = stored[random_int(0, NUM_STORED - 1)];
    const int size = element_size(dtype), count = (int)random_int(0, 1) ? LANES : (int)random_int(1, LANES);
    double want[LANES][LANES] = {{0}};
    make_matrix(&from, size);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < LANES; j++)
            want[i][j] = random_stored(dtype, from.rows[j] + i * from.step);
    vec x[LANES] = {{0}};
    load_transposed(from.rows, 0, from.step, count, dtype, x);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < LANES; j++)
            REQUIRE((double)x[i][j] == want[i][j], "dtype %d, %d of %d", (int)dtype, i, count);
    if (dtype == FA_INT8)
        return;
    const int num_rows = random_int(0, 1) ? LANES : (int)random_int(1, LANES);
    make_matrix(&to, size);
    const char untouched[8] = {0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f};
    store_transposed(to.rows, num_rows, 0, to.step, count, dtype, x);
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < count; i++) {
            const char *element = to.rows[j] + i * to.step;
            if (j < num_rows)
                REQUIRE(value_at(element, dtype) == want[i][j], "dtype %d, %d rows", (int)dtype, num_rows);
            else
                REQUIRE(memcmp(element, untouched, (size_t)size) == 0);
        }
}

/* --- packing and products --------------------------------------------------------------------------- */

enum { MAX_KEYS = FA_KEY_BLOCK, MAX_DIM = 150, MAX_ROWS = MAX_VECTORS * LANES };
enum { SPARE_KEYS = MAX_KEYS + MAX_SPARE_ROWS };

/* Dtypes of keys and values that a kernel packs for its products. */
static fa_dtype random_key_dtype(void)
{
    return PRODUCTS_IN_BFLOAT16 ? FA_BFLOAT16 : stored[random_int(0, NUM_STORED - 1)];
}

/* Keys, or values: [num_keys][columns] by any strides, with scales if they are int8. */
typedef struct {
    fa_array array;
    char memory[MAX_KEYS * MAX_DIM * 8 * 3];
    float scales[MAX_KEYS];
    double values[MAX_KEYS][MAX_DIM];
} key_matrix;

static source_rows rows_of(const key_matrix *m)
{
    source_rows rows = {.data = m->memory, .array = &m->array};
    if (m->array.dtype == FA_INT8) {
        rows.scale = (const char *)m->scales;
        rows.scale_step = sizeof(float);
    }
    return rows;
}

static void make_keys(key_matrix *m, int num_keys, int columns)
{
    const fa_dtype dtype = random_key_dtype();
    const int size = element_size(dtype);
    const bool transposed = random_int(0, 3) == 0;
    const int spread = random_int(0, 2) == 0 ? (int)random_int(1, 3) : 1;
    m->array = (fa_array){.data = m->memory, .dtype = dtype};
    m->array.col = (transposed ? MAX_KEYS : 1) * spread * size;
    m->array.row = (transposed ? 1 : MAX_DIM) * spread * size;
    for (int n = 0; n < num_keys; n++) {
        m->scales[n] = dtype == FA_INT8 ? (float)random_int(1, 8) / 4 : 1;
        for (int d = 0; d < columns; d++)
            m->values[n][d] =
                random_stored(dtype, m->memory + n * m->array.row + d * m->array.col) * (double)m->scales[n];
    }
}

static void require_sum(double got, double sum, double magnitude, int length, const char *name)
{
    REQUIRE(fabs(got - sum) <= (length + 8) * EPSILON * magnitude, "%s: %.17g, not %.17g", name, got, sum);
}

#if IS_PIPELINED

#define PRODUCT_ROWS(vectors) (2 * TMM_ROWS)

/* All parts: those that a dtype does not have are 0. */
static void multiply_all_parts(panel_product product)
{
    const part_products parts = list_part_products(MAX_PARTS, MAX_PARTS, false);
    product.parts = &parts;
    multiply_panel_alone(&product);
}

static void call_product_scores(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                                real scale, vec *panel, vec block_max[MAX_VECTORS])
{
    const int head_dim = length * TILE_K;
    multiply_all_parts((panel_product){.a = a->data + i * a->row,
                                       .a_row = a->row,
                                       .a_step = a->step,
                                       .b = b,
                                       .c = panel,
                                       .blocks = 2,
                                       .steps = length,
                                       .empty = true,
                                       .a_part = key_part_bytes(head_dim),
                                       .b_part = query_part_rows(head_dim) * vectors});
    for (int r = 0; r < PRODUCT_ROWS(vectors) * vectors; r++)
        panel[r] *= scale;
    for (int r = 0; r < PRODUCT_ROWS(vectors) && i + r < a->last; r++)
        for (int m = 0; m < vectors; m++)
            block_max[m] = vec_max(panel[r * vectors + m], block_max[m]);
}

static const packed_vec *pack_panel(vec *panel, int num_keys, int vectors)
{
    static _Alignas(64) packed_vec packed[MAX_PARTS * PROBABILITY_PART];
#if MAX_PARTS > 1
    for (int n = 0; n < num_keys; n += 2)
        for (int m = 0; m < vectors; m++)
            store_parts(panel[n * vectors + m], panel[(n + 1) * vectors + m], MAX_PARTS,
                        (char *)(packed + n / 2 * vectors + m), PROBABILITY_PART * FA_VECTOR_BYTES);
#else
    const size_t bytes = (size_t)(num_keys / 2 * vectors) * sizeof *packed;
    memcpy(packed, pack_probabilities(panel, num_keys, vectors), bytes);
#endif
    return packed;
}

static void call_product_add(const product_rows *a, int e, const packed_vec *b, int length, int vectors,
                             bool nan_safe, bool empty, vec *out)
{
    (void)vectors, (void)nan_safe;
    multiply_all_parts((panel_product){.a = a->data + e * a->row,
                                       .a_row = a->row,
                                       .a_step = a->step,
                                       .b = b,
                                       .c = out,
                                       .blocks = e + TMM_ROWS < a->last ? 2 : 1,
                                       .steps = length,
                                       .empty = empty,
                                       .a_part = value_part_bytes(a->last),
                                       .b_part = PROBABILITY_PART});
}

#else

static const product_prefetch nothing = {.every = INT32_MAX};

#define pack_panel pack_probabilities

/* Products are compiled for a number of vectors, which their callers know. */
static void call_product_scores(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                                real scale, vec *panel, vec block_max[MAX_VECTORS])
{
    if (vectors == 1)
        product_scores(a, i, b, length, 1, scale, &nothing, panel, block_max);
    else if (vectors == 2)
        product_scores(a, i, b, length, 2, scale, &nothing, panel, block_max);
    else
        product_scores(a, i, b, length, MAX_VECTORS, scale, &nothing, panel, block_max);
}

FA_INLINE void call_product_add_of(const product_rows *a, int e, const packed_vec *b, int length, int vectors,
                                   bool nan_safe, bool empty, vec *out)
{
    if (nan_safe)
        product_add(a, e, b, length, vectors, true, empty, &nothing, out);
    else
        product_add(a, e, b, length, vectors, false, empty, &nothing, out);
}

static void call_product_add(const product_rows *a, int e, const packed_vec *b, int length, int vectors,
                             bool nan_safe, bool empty, vec *out)
{
    if (vectors == 1)
        call_product_add_of(a, e, b, length, 1, nan_safe, empty, out);
    else if (vectors == 2)
        call_product_add_of(a, e, b, length, 2, nan_safe, empty, out);
    else
        call_product_add_of(a, e, b, length, MAX_VECTORS, nan_safe, empty, out);
}

_Static_assert(MAX_VECTORS <= 3, "as many as above");

#endif

/* product_scores of packed queries with packed keys, or with keys in place. */
static void check_scores(void)
{
    static key_matrix keys;
    static _Alignas(64) char packed[MAX_PARTS * SPARE_KEYS * (MAX_DIM + 64) * sizeof(real)];
    static _Alignas(64) packed_vec query[MAX_PARTS * (MAX_DIM + 64) * MAX_VECTORS];
    static _Alignas(64) vec panel[(SPARE_KEYS + 64) * MAX_VECTORS];
    static char memory[MAX_ROWS][MAX_DIM * 8];
    static double queries[MAX_ROWS][MAX_DIM];
    const int head_dim = (int)random_int(1, MAX_DIM), vectors = (int)random_int(MIN_VECTORS, MAX_VECTORS);
    const int lead = (int)random_int(0, KEY_STEP - 1), num_keys = (int)random_int(1, MAX_KEYS - lead);
    const fa_dtype dtype = PRODUCTS_IN_BFLOAT16 ? FA_BFLOAT16 : stored[random_int(0, 3)];
    const real sign = (real)(random_int(0, 1) ? 1 : -1), scale = (real)(random_int(0, 1) ? 1 : 0.25);
    char *rows[MAX_ROWS];
    for (int j = 0; j < MAX_ROWS; j++) {
        rows[j] = memory[j];
        for (int d = 0; d < head_dim; d++)
            queries[j][d] = random_stored(dtype, memory[j] + d * element_size(dtype));
    }
    make_keys(&keys, num_keys, head_dim);
    memset(query, 0, sizeof query);
    pack_query(rows, element_size(dtype), dtype, head_dim, vectors, sign, query);
    const source_rows src = rows_of(&keys);
    memset(packed, 0, sizeof packed);
    product_rows a = {packed, packed_key_row(head_dim), packed_key_step(), lead, lead + num_keys};
    if (lead == 0 && random_int(0, 1) && key_is_operand(&keys.array, head_dim) && !src.scale) {
        a.data = src.data;
        a.row = keys.array.row;
        a.step = operand_step(&keys.array);
    } else {
        pack_key(&src, lead, num_keys, head_dim, packed);
    }
    vec block_max[MAX_VECTORS];
    for (int m = 0; m < vectors; m++)
        block_max[m] = vec_splat(-(real)INFINITY);
    for (int r = 0; r < lead + num_keys; r += PRODUCT_ROWS(vectors))
        call_product_scores(&a, r, query, (head_dim + TILE_K - 1) / TILE_K, vectors, scale,
                            panel + r * vectors, block_max);
    for (int j = 0; j < vectors * LANES; j++) {
        real largest = -(real)INFINITY;
        for (int n = 0; n < num_keys; n++) {
            double sum = 0, magnitude = 0;
            for (int d = 0; d < head_dim; d++) {
                sum += queries[j][d] * keys.values[n][d];
                magnitude += fabs(queries[j][d] * keys.values[n][d]);
            }
            const real score = panel[(lead + n) * vectors + j / LANES][j % LANES];
            require_sum((double)score, (double)(sign * scale) * sum, (double)scale * magnitude, head_dim,
                        "score");
            largest = score > largest ? score : largest;
        }
        /* Rows of the packing's lead are zeros, and may be seen by it. */
        const real found = block_max[j / LANES][j % LANES];
        REQUIRE(found == largest || (lead > 0 && found >= largest && found <= 0),
                "the block's largest score");
    }
}

/* product_add of packed probabilities with packed values. nan_safe: NaN under a probability of -0 is masked.
 */
static void check_add(void)
{
    static key_matrix values;
    static _Alignas(64) char packed[MAX_PARTS * (MAX_KEYS + TILE_K) * (MAX_DIM + 64) * sizeof(real)];
    static _Alignas(64) vec panel[(MAX_KEYS + TILE_K) * MAX_VECTORS];
    static _Alignas(64) vec out[(MAX_DIM + 64) * MAX_VECTORS], before[(MAX_DIM + 64) * MAX_VECTORS];
    static double probabilities[MAX_KEYS][MAX_ROWS];
    const int columns = (int)random_int(1, MAX_DIM), vectors = (int)random_int(MIN_VECTORS, MAX_VECTORS);
    const int lead = (int)random_int(0, TILE_K - 1), num_keys = (int)random_int(1, MAX_KEYS - lead);
    const bool nan_safe = !IS_PIPELINED && random_int(0, 1), empty = random_int(0, 1);
    make_keys(&values, num_keys, columns);
    const int poisoned = nan_safe && values.array.dtype != FA_INT8 ? (int)random_int(0, num_keys - 1) : -1;
    const int length = (lead + num_keys + TILE_K - 1) / TILE_K;
    for (int i = 0; i < length * TILE_K * vectors; i++)
        panel[i] = vec_splat(nan_safe ? (real)-0.0 : 0);
    for (int n = 0; n < num_keys; n++)
        for (int j = 0; j < vectors * LANES; j++) {
            const bool masked = n == poisoned || random_int(0, 7) == 0;
            probabilities[n][j] = masked ? 0 : (double)random_int(0, 256) / 256;
            panel[(lead + n) * vectors + j / LANES][j % LANES] =
                masked && nan_safe ? (real)-0.0 : (real)probabilities[n][j];
        }
    for (int d = 0; poisoned >= 0 && d < columns; d++) {
        store_element(values.memory + poisoned * values.array.row + d * values.array.col, values.array.dtype,
                      (real)NAN);
        values.values[poisoned][d] = 0;
    }
    const source_rows src = rows_of(&values);
    memset(packed, 0, sizeof packed);
    product_rows a = {packed, PACKED_VALUE_COL, packed_value_bytes(columns), 0, columns};
    if (random_int(0, 1) && value_is_operand(&values.array) && !src.scale) {
        a.data = src.data;
        a.row = values.array.col;
        a.step = values.array.row;
    } else {
        pack_value(&src, lead, num_keys, columns, packed);
    }
    for (int i = 0; i < (columns + 64) * vectors; i++)
        for (int j = 0; j < LANES; j++)
            out[i][j] = before[i][j] = (real)random_unit();
    const packed_vec *b = pack_panel(panel, length * TILE_K, vectors);
    for (int e = 0; e < columns; e += PRODUCT_ROWS(vectors))
        call_product_add(&a, e, b, length, vectors, nan_safe, empty, out + e * vectors);
    for (int e = 0; e < columns; e++)
        for (int j = 0; j < vectors * LANES; j++) {
            double sum = empty ? 0 : (double)before[e * vectors + j / LANES][j % LANES];
            double magnitude = fabs(sum);
            for (int n = 0; n < num_keys; n++) {
                sum += probabilities[n][j] * values.values[n][e];
                magnitude += fabs(probabilities[n][j] * values.values[n][e]);
            }
            require_sum((double)out[e * vectors + j / LANES][j % LANES], sum, magnitude, num_keys, "out");
        }
}

/* A score of a decode tile: a row of queries and a row of keys in place, whose lanes are head dims. */
static void check_decode_score(void)
{
    static char key[MAX_DIM * 8], query[MAX_DIM * 8];
    static _Alignas(64) packed_vec packed[3 * MAX_DIM];
    const int head_dim = 2 * LANES * (int)random_int(1, MAX_DIM / (2 * LANES)), step = (int)random_int(1, 3);
    const fa_dtype dtype = random_key_dtype();
    const real sign = (real)(random_int(0, 1) ? 1 : -1);
    fa_problem p = {.head_dim = head_dim};
    p.key = (fa_array){.dtype = dtype, .col = element_size(dtype)};
    p.query.dtype = PRODUCTS_IN_BFLOAT16 ? FA_BFLOAT16 : FA_REAL_DTYPE;
    p.query.col = element_size(p.query.dtype);
    double sum = 0, magnitude = 0, got = 0;
    for (int d = 0; d < head_dim; d++) {
        const double product = random_stored(dtype, key + d * p.key.col) *
                               random_stored(p.query.dtype, query + d * p.query.col) * (double)sign;
        sum += product;
        magnitude += fabs(product);
    }
    pack_decode_query(query, &p, sign, step, packed);
    vec lanes = {0};
    for (int i = 0; i < key_vectors(head_dim); i++)
        lanes = multiply_lanes(load_key_vector(key, dtype, i), packed[i * step], lanes);
    for (int j = 0; j < LANES; j++)
        got += (double)lanes[j];
    require_sum(got, sum, magnitude, head_dim, "score of a decode tile");
}

/* Probabilities of a decode tile, key by key for all its rows, times values in place. NaN under a probability
 * of -0 is masked. */
static void check_decode_values(void)
{
    enum { MAX_WIDTH = 4, MAX_COLUMNS = MAX_WIDTH * LANES };
    static char values[MAX_KEYS][MAX_COLUMNS * 8];
    static _Alignas(64) vec panel[MAX_KEYS];
    double probabilities[MAX_KEYS], columns[MAX_KEYS][MAX_COLUMNS];
    const fa_dtype dtype = random_key_dtype();
    const int rows = 1 << random_int(0, __builtin_ctz(LANES / 2)), row = (int)random_int(0, rows - 1);
    const int num_keys = (int)random_int(1, MAX_KEYS), width = random_int(0, 1) ? 2 : MAX_WIDTH;
    const int panel_rows = (num_keys * rows + LANES - 1) / LANES;
    const int poisoned = dtype == FA_INT8 ? -1 : (int)random_int(0, num_keys - 1);
    real *flat = (real *)panel;
    for (int v = 0; v < MAX_KEYS; v++)
        panel[v] = vec_splat((real)-0.0); /* keys behind the last are masked, too */
    for (int n = 0; n < num_keys; n++) {
        probabilities[n] = n == poisoned ? 0 : (double)random_int(0, 256) / 256;
        for (int r = 0; r < rows; r++)
            flat[n * rows + r] = n == poisoned ? (real)-0.0 : (real)(r == row ? probabilities[n] : 1);
        for (int e = 0; e < width * LANES; e++) {
            char *element = values[n] + e * element_size(dtype);
            columns[n][e] = random_stored(dtype, element);
            if (n == poisoned)
                store_element(element, dtype, (real)NAN);
        }
    }
    const operand *p = pack_decode_probabilities(panel, panel_rows, rows);
    vec out[MAX_WIDTH] = {{0}};
    for (int n = 0; n < num_keys; n += VALUE_KEYS) {
        packed_vec v[8];
        const int second = n + VALUE_KEYS - 1 < num_keys ? n + VALUE_KEYS - 1 : n;
        const operand probability = p[n / VALUE_KEYS * rows + row];
        load_values(values[n], values[second], dtype, width, v);
        for (int i = 0; i < width; i++)
            out[i] = multiply_add(probability, mask_values(probability, v[i]), out[i]);
    }
    const fa_array array = {.dtype = dtype, .col = element_size(dtype)};
    for (int i = 0; i < width && !PRODUCTS_IN_BFLOAT16 && reads_deinterleaved(&array, width * LANES); i += 2)
        interleave(out + i);
    for (int e = 0; e < width * LANES; e++) {
        double sum = 0, magnitude = 0;
        for (int n = 0; n < num_keys; n++) {
            sum += n == poisoned ? 0 : probabilities[n] * columns[n][e];
            magnitude += n == poisoned ? 0 : fabs(probabilities[n] * columns[n][e]);
        }
        require_sum((double)out[e / LANES][e % LANES], sum, magnitude, num_keys, "out of a decode tile");
    }
}

#if DECODES_IN_TILES
/* Both products of a decode tile, of keys that begin and end anywhere; a value that is NaN is hidden. */
static void check_decode_tiles(void)
{
    enum { MAX_COLUMNS = 160, MAX_RANGE = 256 };
    static char rows_of[2][MAX_RANGE][MAX_COLUMNS * 2], queries[DECODE_ROWS][MAX_COLUMNS * 2];
    static _Alignas(64) packed_vec query[DECODE_ROWS * MAX_COLUMNS / LANES];
    static _Alignas(64) vec out[DECODE_ROWS * MAX_COLUMNS / LANES], panel[MAX_RANGE * DECODE_ROWS / LANES];
    static double keys[MAX_RANGE][MAX_COLUMNS], values[MAX_RANGE][MAX_COLUMNS], q[DECODE_ROWS][MAX_COLUMNS];
    static double probabilities[MAX_RANGE][DECODE_ROWS];
    static const row_stream none[STREAM_WINDOW];
    const next_streams next = {.streams = none};
    const int columns = TILE_K * (int)random_int(1, 4), columns_v = LANES * (int)random_int(1, 8);
    const int lo = (int)random_int(0, 31), hi = (int)random_int(lo + 1, MAX_RANGE);
    const int poisoned = (int)random_int(lo, hi - 1);
    tile t = {.rows_pow2 = 1 << random_int(0, 4), .query = query, .out = out, .empty = true};
    t.rows = t.rows_pow2;
    while (t.rows_pow2 << t.key_shift < LANES)
        t.key_shift++;
    const fa_array array = {.dtype = FA_BFLOAT16, .col = 2};
    const fa_problem p = {
        .head_dim = columns, .head_dim_v = columns_v, .query = array, .key = array, .value = array};
    char *query_rows[DECODE_ROWS];
    for (int r = 0; r < t.rows; r++) {
        query_rows[r] = queries[r];
        for (int d = 0; d < columns; d++)
            q[r][d] = random_stored(FA_BFLOAT16, queries[r] + 2 * d);
    }
    for (int n = lo; n < hi; n++) {
        for (int d = 0; d < columns; d++)
            keys[n][d] = random_stored(FA_BFLOAT16, rows_of[0][n] + 2 * d);
        for (int e = 0; e < columns_v; e++) {
            values[n][e] = random_stored(FA_BFLOAT16, rows_of[1][n] + 2 * e);
            if (n == poisoned)
                store_element(rows_of[1][n] + 2 * e, FA_BFLOAT16, (real)NAN);
        }
    }
    const key_range range = {0, (hi + TILE_K - 1) / TILE_K * TILE_K, lo, hi};
    operand_block block = {.data = rows_of[0][0], .row = MAX_COLUMNS * 2, .dtype = FA_BFLOAT16};
    pack_decode_queries(query_rows, t.rows_pow2, &p, 1, query);
    multiply_decode_query_key(&p, &t, &range, &block, &next, (real)0.5, panel);
    for (int n = lo; n < hi; n++)
        for (int r = 0; r < t.rows; r++) {
            double sum = 0, magnitude = 0;
            for (int d = 0; d < columns; d++) {
                sum += 0.5 * keys[n][d] * q[r][d];
                magnitude += fabs(0.5 * keys[n][d] * q[r][d]);
            }
            require_sum((double)((real *)panel)[n * t.rows + r], sum, magnitude, columns,
                        "score in the tile unit");
        }
    for (int n = 0; n < range.last; n++)
        for (int r = 0; r < t.rows; r++) {
            probabilities[n][r] = n < lo || n >= hi || n == poisoned ? 0 : (double)random_int(0, 256) / 256;
            ((real *)panel)[n * t.rows + r] = n == poisoned ? (real)-0.0 : (real)probabilities[n][r];
        }
    block.data = rows_of[1][0];
    multiply_decode_value(&p, &t, &range, &block, panel, none, true);
    order_decode_out(&p, &t);
    for (int r = 0; r < t.rows; r++)
        for (int e = 0; e < columns_v; e++) {
            double sum = 0, magnitude = 0;
            for (int n = lo; n < hi; n++) {
                sum += n == poisoned ? 0 : probabilities[n][r] * values[n][e];
                magnitude += n == poisoned ? 0 : fabs(probabilities[n][r] * values[n][e]);
            }
            require_sum((double)((real *)out)[r * columns_v + e], sum, magnitude, hi - lo,
                        "out in the tile unit");
        }
    begin_products(); /* those of wide tiles have other shapes */
}
#else
static void check_decode_tiles(void) {}
#endif

int main(void)
{
    if (!NAME(fa_cpu_has_, TEST_CPU)())
        return 0;
    check_scalar_conversions();
    if (FA_REAL_BYTES == 4)
        fa_flush_subnormals(); /* the mode that kernels compute in */
    for (int i = 0; i < 2000; i++) {
        check_comparisons();
        check_integers();
        check_arithmetic();
        check_lane_moves();
        check_functions();
        check_mask_bits();
        check_elements();
        check_transposed();
    }
    check_vector_conversions();
    begin_products();
    for (int i = 0; i < 300; i++) {
        check_scores();
        check_add();
        check_decode_score();
        check_decode_values();
        check_decode_tiles();
    }
    end_products();
    REQUIRE(measure_peak_rounds(10) > 0);
    REQUIRE(measure_decode_rounds(10) > 0);
    REQUIRE(measure_softmax_rounds(10) > 0);
    return 0;
}
