// Training: causal attention within documents, forward and backward, in tiles of 64 queries by 64 keys (Dao 2023,
// FlashAttention-2). HEAD_DIM is compiled in; heads of `dim` elements up to that are filled up with zeroes. Each result has
// one owner, so that nothing is added with atomics: gradients of q by queries, those of k and v by keys.
//
// qk: [tokens, q_heads + kv_heads, dim]; v: [tokens, kv_heads, dim]; rows lie strides apart. tiles: [count, 4] = first row,
// rows (at most 64), first row of the document, its end. lse, delta: [q_heads, tokens]; lse to base e.
// `whole`: heads are whole 16 bytes and begin at such.

#define TILE 64
#define STRIDE (HEAD_DIM + 8)
#define LOG2E 1.44269504f

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rows of one head to shared memory; what is not there is zero. Block: 128.
__device__ __forceinline__ void load_tile(bf16 *to, const bf16 *from, u32 rows, u32 dim, u64 stride, u32 whole) {
    for (u32 i = threadIdx.x; i < TILE * HEAD_DIM / 8; i += 128) {
        const u32 row = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < rows && d < dim) {
            const bf16 *at = from + row * stride + d;
            if (whole) {
                x = *(const uint4 *)at;
            } else {
                u32 words[4] = {0, 0, 0, 0};
#pragma unroll
                for (u32 j = 0; j < 8; j++)
                    if (d + j < dim) words[j / 2] |= (u32)at[j] << (j % 2 * 16);
                x = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        *(uint4 *)(to + row * STRIDE + d) = x;
    }
}

// A fragment of 16 rows by 16 elements, out of shared memory.
__device__ __forceinline__ void fragment(u32 *a, const bf16 *tile, u32 row, u32 d) {
    a[0] = *(const u32 *)(tile + row * STRIDE + d);
    a[1] = *(const u32 *)(tile + (row + 8) * STRIDE + d);
    a[2] = *(const u32 *)(tile + row * STRIDE + d + 8);
    a[3] = *(const u32 *)(tile + (row + 8) * STRIDE + d + 8);
}

// out[16 x 8 n] += a * tile[first.., d]ᵀ for n of COLUMNS / 8 columns: rows of the tile are columns of the product.
template <int COLUMNS>
__device__ __forceinline__ void times_rows(float (*out)[4], const u32 (*a)[4], const bf16 *tile, u32 first, u32 r, u32 c) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
        for (int s = 0; s < HEAD_DIM / 16; s++) {
            const bf16 *at = tile + (first + n * 8 + r) * STRIDE + s * 16 + c;
            mma(out[n], a[s], *(const u32 *)at, *(const u32 *)(at + 8));
        }
    }
}

// sum[16 x HEAD_DIM] += weights[16 x DEPTH] * tile[first.., d].
template <int DEPTH>
__device__ __forceinline__ void times_tile(float (*sum)[4], const u32 (*weights)[2], const bf16 *tile, u32 first, u32 lane) {
#pragma unroll
    for (int s = 0; s < DEPTH / 16; s++) {
        const u32 a[4] = {weights[2 * s][0], weights[2 * s][1], weights[2 * s + 1][0], weights[2 * s + 1][1]};
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            u32 b[2];
            load_transposed(b, tile + (first + s * 16 + lane % 16) * STRIDE + n * 8);
            mma(sum[n], a, b[0], b[1]);
        }
    }
}

// Two neighbouring elements of a row of a head.
__device__ __forceinline__ void put2(bf16 *to, u32 d, u32 dim, float x, float y, u32 whole) {
    if (whole) {
        if (d < dim) *(u32 *)(to + d) = narrow2(x, y);
        return;
    }
    if (d < dim) to[d] = narrow(x);
    if (d + 1 < dim) to[d + 1] = narrow(y);
}

// Grid: q_heads, tiles. Block: 128, 16 queries a warp.
extern "C" __global__ void __launch_bounds__(128) attention(
    bf16 *out, float *lse, const bf16 *qk, const bf16 *v, const uint4 *tiles, u32 tokens, u32 q_heads, u32 kv_heads, u32 dim,
    u32 out_stride, u32 qk_stride, u32 v_stride, float scale, u32 whole) {
    __shared__ __align__(16) bf16 keys[TILE * STRIDE];
    __shared__ __align__(16) bf16 values[TILE * STRIDE];
    const uint4 tile = tiles[blockIdx.y];
    const u32 head = blockIdx.x, kv = head / (q_heads / kv_heads);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const float log_scale = scale * LOG2E;

    load_tile(keys, qk + (u64)tile.x * qk_stride + head * dim, tile.y, dim, qk_stride, whole);
    __syncthreads();
    u32 query[HEAD_DIM / 16][4];
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++) fragment(query[s], keys, low, s * 16 + c);
    float sum[HEAD_DIM / 8][4] = {};
    float top[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f};

    for (u32 start = tile.z; start <= tile.x; start += TILE) {
        const u32 count = min((u32)TILE, tile.w - start);
        __syncthreads();
        load_tile(keys, qk + (u64)start * qk_stride + (q_heads + kv) * dim, count, dim, qk_stride, whole);
        load_tile(values, v + (u64)start * v_stride + kv * dim, count, dim, v_stride, whole);
        __syncthreads();
        float score[TILE / 8][4] = {};
        times_rows<TILE>(score, query, keys, 0, r, c);
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 key = start + n * 8 + c + (i & 1), own = tile.x + (i < 2 ? low : high);
                score[n][i] = key <= own ? score[n][i] * log_scale : -INFINITE;
                higher[i >> 1] = fmaxf(higher[i >> 1], score[n][i]);
            }
        float shrink[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(FULL, higher[h], 1));
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(FULL, higher[h], 2));
            // The first tile holds a key that each of its queries sees, so `higher` is a number.
            shrink[h] = exp2_fast(top[h] - higher[h]);
            top[h] = higher[h];
        }
        u32 weight[TILE / 8][2];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = exp2_fast(score[n][i] - top[i >> 1]);
                added[i >> 1] += score[n][i];
            }
            weight[n][0] = narrow2(score[n][0], score[n][1]);
            weight[n][1] = narrow2(score[n][2], score[n][3]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            added[h] += __shfl_xor_sync(FULL, added[h], 1);
            added[h] += __shfl_xor_sync(FULL, added[h], 2);
            total[h] = total[h] * shrink[h] + added[h];
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[n][i] *= shrink[i >> 1];
        times_tile<TILE>(sum, weight, values, 0, lane);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = h ? high : low;
        if (row >= tile.y) continue;
        const float inverse = 1.0f / total[h];
        bf16 *to = out + (u64)(tile.x + row) * out_stride + head * dim;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) put2(to, n * 8 + c, dim, sum[n][2 * h] * inverse, sum[n][2 * h + 1] * inverse, whole);
        if (c == 0) lse[(u64)head * tokens + tile.x + row] = top[h] / LOG2E + __logf(total[h]);
    }
}

// delta = out · d_out of each head of each token. One warp a head, 4 a block.
extern "C" __global__ void attention_delta(float *delta, const bf16 *out, const bf16 *d_out, u32 tokens, u32 q_heads, u32 dim, u32 out_stride, u32 d_out_stride) {
    const u32 lane = threadIdx.x & 31, item = blockIdx.x * 4 + (threadIdx.x >> 5);
    const u32 token = item / q_heads, head = item % q_heads;
    if (token >= tokens) return;
    float sum = 0.0f;
    for (u32 i = lane; i < dim; i += 32)
        sum += wide(out[(u64)token * out_stride + head * dim + i]) * wide(d_out[(u64)token * d_out_stride + head * dim + i]);
    sum = warp_sum(sum);
    if (lane == 0) delta[(u64)head * tokens + token] = sum;
}

#define HALF 32

// d_qkv's first q_heads. Grid: q_heads, tiles. Block: 128, 16 queries a warp.
extern "C" __global__ void __launch_bounds__(128) attention_d_q(
    bf16 *d_qkv, const bf16 *qk, const bf16 *v, const bf16 *d_out, const float *lse, const float *delta, const uint4 *tiles,
    u32 tokens, u32 q_heads, u32 kv_heads, u32 dim, u32 d_stride, u32 qk_stride, u32 v_stride, u32 d_out_stride, float scale, u32 whole) {
    __shared__ __align__(16) bf16 keys[TILE * STRIDE];
    __shared__ __align__(16) bf16 values[TILE * STRIDE];
    const uint4 tile = tiles[blockIdx.y];
    const u32 head = blockIdx.x, kv = head / (q_heads / kv_heads);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const float log_scale = scale * LOG2E;

    load_tile(keys, qk + (u64)tile.x * qk_stride + head * dim, tile.y, dim, qk_stride, whole);
    load_tile(values, d_out + (u64)tile.x * d_out_stride + head * dim, tile.y, dim, d_out_stride, whole);
    __syncthreads();
    u32 query[HEAD_DIM / 16][4], d_mix[HEAD_DIM / 16][4];
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++) {
        fragment(query[s], keys, low, s * 16 + c);
        fragment(d_mix[s], values, low, s * 16 + c);
    }
    float log_sum[2], own_delta[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = h ? high : low;
        const u64 at = (u64)head * tokens + tile.x + row;
        log_sum[h] = row < tile.y ? lse[at] * LOG2E : INFINITE;
        own_delta[h] = row < tile.y ? delta[at] : 0.0f;
    }
    float sum[HEAD_DIM / 8][4] = {};

    for (u32 start = tile.z; start <= tile.x; start += TILE) {
        const u32 count = min((u32)TILE, tile.w - start);
        __syncthreads();
        load_tile(keys, qk + (u64)start * qk_stride + (q_heads + kv) * dim, count, dim, qk_stride, whole);
        load_tile(values, v + (u64)start * v_stride + kv * dim, count, dim, v_stride, whole);
        __syncthreads();
#pragma unroll
        for (u32 half = 0; half < TILE; half += HALF) {
            float score[HALF / 8][4] = {}, d_weight[HALF / 8][4] = {};
            times_rows<HALF>(score, query, keys, half, r, c);
            times_rows<HALF>(d_weight, d_mix, values, half, r, c);
            u32 d_score[HALF / 8][2];
#pragma unroll
            for (int n = 0; n < HALF / 8; n++) {
                float d[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 key = start + half + n * 8 + c + (i & 1), own = tile.x + (i < 2 ? low : high);
                    const float weight = key <= own ? exp2_fast(score[n][i] * log_scale - log_sum[i >> 1]) : 0.0f;
                    d[i] = weight * (d_weight[n][i] - own_delta[i >> 1]) * scale;
                }
                d_score[n][0] = narrow2(d[0], d[1]);
                d_score[n][1] = narrow2(d[2], d[3]);
            }
            times_tile<HALF>(sum, d_score, keys, half, lane);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = h ? high : low;
        if (row >= tile.y) continue;
        bf16 *to = d_qkv + (u64)(tile.x + row) * d_stride + head * dim;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) put2(to, n * 8 + c, dim, sum[n][2 * h], sum[n][2 * h + 1], whole);
    }
}

// d_qkv's heads of k, then of v: each over all query heads that read it, ascending. Products are transposed: a warp has 16
// keys, queries are columns. Grid: kv_heads, tiles (of keys). Block: 128. Shared: 4 tiles and 2 · 64 floats.
extern "C" __global__ void __launch_bounds__(128) attention_d_kv(
    bf16 *d_qkv, const bf16 *qk, const bf16 *v, const bf16 *d_out, const float *lse, const float *delta, const uint4 *tiles,
    u32 tokens, u32 q_heads, u32 kv_heads, u32 dim, u32 d_stride, u32 qk_stride, u32 v_stride, u32 d_out_stride, float scale, u32 whole) {
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *keys = shared, *values = keys + TILE * STRIDE, *queries = values + TILE * STRIDE, *d_mix = queries + TILE * STRIDE;
    float *log_sums = (float *)(d_mix + TILE * STRIDE), *deltas = log_sums + TILE;
    const uint4 tile = tiles[blockIdx.y];
    const u32 kv = blockIdx.x, group = q_heads / kv_heads;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const float log_scale = scale * LOG2E;

    load_tile(keys, qk + (u64)tile.x * qk_stride + (q_heads + kv) * dim, tile.y, dim, qk_stride, whole);
    load_tile(values, v + (u64)tile.x * v_stride + kv * dim, tile.y, dim, v_stride, whole);
    float d_k[HEAD_DIM / 8][4] = {}, d_v[HEAD_DIM / 8][4] = {};

    for (u32 head = kv * group; head < (kv + 1) * group; head++) {
        for (u32 start = tile.x; start < tile.w; start += TILE) {
            const u32 count = min((u32)TILE, tile.w - start);
            __syncthreads();
            load_tile(queries, qk + (u64)start * qk_stride + head * dim, count, dim, qk_stride, whole);
            load_tile(d_mix, d_out + (u64)start * d_out_stride + head * dim, count, dim, d_out_stride, whole);
            if (threadIdx.x < TILE) {
                const u64 at = (u64)head * tokens + start + threadIdx.x;
                log_sums[threadIdx.x] = threadIdx.x < count ? lse[at] * LOG2E : INFINITE;
                deltas[threadIdx.x] = threadIdx.x < count ? delta[at] : 0.0f;
            }
            __syncthreads();
#pragma unroll 1
            for (u32 half = 0; half < TILE; half += HALF) {
                float score[HALF / 8][4] = {}, d_weight[HALF / 8][4] = {};
#pragma unroll
                for (int s = 0; s < HEAD_DIM / 16; s++) {
                    u32 key[4], value[4];
                    fragment(key, keys, low, s * 16 + c);
                    fragment(value, values, low, s * 16 + c);
#pragma unroll
                    for (int n = 0; n < HALF / 8; n++) {
                        const u32 at = (half + n * 8 + r) * STRIDE + s * 16 + c;
                        mma(score[n], key, *(const u32 *)(queries + at), *(const u32 *)(queries + at + 8));
                        mma(d_weight[n], value, *(const u32 *)(d_mix + at), *(const u32 *)(d_mix + at + 8));
                    }
                }
                u32 weight[HALF / 8][2], d_score[HALF / 8][2];
#pragma unroll
                for (int n = 0; n < HALF / 8; n++) {
                    float w[4], d[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const u32 column = half + n * 8 + c + (i & 1), key = tile.x + (i < 2 ? low : high);
                        w[i] = key <= start + column ? exp2_fast(score[n][i] * log_scale - log_sums[column]) : 0.0f;
                        d[i] = w[i] * (d_weight[n][i] - deltas[column]) * scale;
                    }
                    weight[n][0] = narrow2(w[0], w[1]);
                    weight[n][1] = narrow2(w[2], w[3]);
                    d_score[n][0] = narrow2(d[0], d[1]);
                    d_score[n][1] = narrow2(d[2], d[3]);
                }
                times_tile<HALF>(d_v, weight, d_mix, half, lane);
                times_tile<HALF>(d_k, d_score, queries, half, lane);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = h ? high : low;
        if (row >= tile.y) continue;
        bf16 *to = d_qkv + (u64)(tile.x + row) * d_stride + (q_heads + kv) * dim;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            put2(to, n * 8 + c, dim, d_k[n][2 * h], d_k[n][2 * h + 1], whole);
            put2(to + kv_heads * dim, n * 8 + c, dim, d_v[n][2 * h], d_v[n][2 * h + 1], whole);
        }
    }
}
