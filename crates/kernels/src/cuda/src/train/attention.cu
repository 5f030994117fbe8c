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

// Begins to bring rows of one head to shared memory; what is not there is zero. They are there behind `await_tiles` and a
// barrier. Block: 128.
__device__ __forceinline__ void bring_tile(bf16 *to, const bf16 *from, u32 rows, u32 dim, u64 stride, u32 whole) {
#pragma unroll
    for (u32 i = threadIdx.x; i < TILE * HEAD_DIM / 8; i += 128) {
        const u32 row = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
        const bool is_there = row < rows && d < dim;
        const bf16 *at = is_there ? from + row * stride + d : from;
        bf16 *place = to + row * STRIDE + d;
        if (whole) {
            const u32 bytes = is_there ? 16 : 0;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(place)), "l"(at), "r"(bytes) : "memory");
            continue;
        }
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 j = 0; j < 8; j++)
            if (is_there && d + j < dim) words[j / 2] |= (u32)at[j] << (j % 2 * 16);
        *(uint4 *)place = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Ends a group of tiles that are being brought.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `GROUPS` groups are on their way.
template <int GROUPS>
__device__ __forceinline__ void await_tiles() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }

template <class T>
__device__ __forceinline__ void exchange(T *&a, T *&b) {
    T *const other = a;
    a = b;
    b = other;
}

// A fragment of 16 rows from `row` on by 16 elements from `d` on, out of shared memory.
__device__ __forceinline__ void fragment(u32 *a, const bf16 *tile, u32 row, u32 d, u32 lane) {
    load4(a, tile + (row + lane % 16) * STRIDE + d + lane / 16 * 8);
}

// Columns of a product: 8 rows of the tile from `row` on by 32 elements from `d` on, for two steps of 16.
__device__ __forceinline__ void columns(u32 *b, const bf16 *tile, u32 row, u32 d, u32 lane) {
    load4(b, tile + (row + lane % 8) * STRIDE + d + lane / 8 * 8);
}

// out[16 x 8 n] += a * tile[first.., d]ᵀ for n of COLUMNS / 8 columns: rows of the tile are columns of the product.
template <int COLUMNS>
__device__ __forceinline__ void times_rows(float (*out)[4], const u32 (*a)[4], const bf16 *tile, u32 first, u32 lane) {
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s += 2) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            u32 b[4];
            columns(b, tile, first + n * 8, s * 16, lane);
            mma(out[n], a[s], b[0], b[1]);
            mma(out[n], a[s + 1], b[2], b[3]);
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
        for (int n = 0; n < HEAD_DIM / 8; n += 2) {
            u32 b[4];
            load_transposed4(b, tile + (first + s * 16 + lane % 16) * STRIDE + n * 8 + lane / 16 * 8);
            mma(sum[n], a, b[0], b[1]);
            mma(sum[n + 1], a, b[2], b[3]);
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

// Grid: q_heads, tiles. Block: 128, 16 queries a warp. Shared: 4 tiles; the next keys and values are brought meanwhile.
extern "C" __global__ void __launch_bounds__(128) attention(
    bf16 *out, float *lse, const bf16 *qk, const bf16 *v, const uint4 *tiles, u32 tokens, u32 q_heads, u32 kv_heads, u32 dim,
    u32 out_stride, u32 qk_stride, u32 v_stride, float scale, u32 whole) {
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *keys = shared, *values = keys + TILE * STRIDE;
    bf16 *next_keys = values + TILE * STRIDE, *next_values = next_keys + TILE * STRIDE;
    const uint4 tile = tiles[blockIdx.y];
    const u32 head = blockIdx.x, kv = head / (q_heads / kv_heads);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const float log_scale = scale * LOG2E;
    const bf16 *all_keys = qk + (q_heads + kv) * dim, *all_values = v + kv * dim;

    bring_tile(next_keys, qk + (u64)tile.x * qk_stride + head * dim, tile.y, dim, qk_stride, whole);
    end_group();
    const u32 first = min((u32)TILE, tile.w - tile.z);
    bring_tile(keys, all_keys + (u64)tile.z * qk_stride, first, dim, qk_stride, whole);
    bring_tile(values, all_values + (u64)tile.z * v_stride, first, dim, v_stride, whole);
    end_group();
    await_tiles<1>();
    __syncthreads();
    u32 query[HEAD_DIM / 16][4];
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++) fragment(query[s], next_keys, warp * 16, s * 16, lane);
    float sum[HEAD_DIM / 8][4] = {};
    float top[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f};

    // The last tile of keys is that of the queries: there alone some are behind them.
    for (u32 start = tile.z; start <= tile.x; start += TILE) {
        __syncthreads();
        const u32 next = start + TILE;
        if (next <= tile.x) {
            const u32 count = min((u32)TILE, tile.w - next);
            bring_tile(next_keys, all_keys + (u64)next * qk_stride, count, dim, qk_stride, whole);
            bring_tile(next_values, all_values + (u64)next * v_stride, count, dim, v_stride, whole);
        }
        end_group();
        await_tiles<1>();
        __syncthreads();
        float score[TILE / 8][4] = {};
        times_rows<TILE>(score, query, keys, 0, lane);
        if (start == tile.x) {
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (n * 8 + c + (i & 1) > (i < 2 ? low : high)) score[n][i] = -INFINITE;
        }
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) higher[i >> 1] = fmaxf(higher[i >> 1], score[n][i]);
        float shrink[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(FULL, higher[h], 1));
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(FULL, higher[h], 2));
            // The first tile holds a key that each of its queries sees, so `higher` is a number.
            shrink[h] = exp2_fast((top[h] - higher[h]) * log_scale);
            top[h] = higher[h];
        }
        u32 weight[TILE / 8][2];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = exp2_fast((score[n][i] - top[i >> 1]) * log_scale);
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
        exchange(keys, next_keys);
        exchange(values, next_values);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = h ? high : low;
        if (row >= tile.y) continue;
        const float inverse = 1.0f / total[h];
        bf16 *to = out + (u64)(tile.x + row) * out_stride + head * dim;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) put2(to, n * 8 + c, dim, sum[n][2 * h] * inverse, sum[n][2 * h + 1] * inverse, whole);
        if (c == 0) lse[(u64)head * tokens + tile.x + row] = top[h] * scale + __logf(total[h]);
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

// d_qkv's first q_heads. Grid: q_heads, tiles. Block: 128, 16 queries a warp. Shared: 4 tiles.
extern "C" __global__ void __launch_bounds__(128) attention_d_q(
    bf16 *d_qkv, const bf16 *qk, const bf16 *v, const bf16 *d_out, const float *lse, const float *delta, const uint4 *tiles,
    u32 tokens, u32 q_heads, u32 kv_heads, u32 dim, u32 d_stride, u32 qk_stride, u32 v_stride, u32 d_out_stride, float scale, u32 whole) {
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *keys = shared, *values = keys + TILE * STRIDE;
    bf16 *next_keys = values + TILE * STRIDE, *next_values = next_keys + TILE * STRIDE;
    const uint4 tile = tiles[blockIdx.y];
    const u32 head = blockIdx.x, kv = head / (q_heads / kv_heads);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const float log_scale = scale * LOG2E;
    const bf16 *all_keys = qk + (q_heads + kv) * dim, *all_values = v + kv * dim;

    bring_tile(next_keys, qk + (u64)tile.x * qk_stride + head * dim, tile.y, dim, qk_stride, whole);
    bring_tile(next_values, d_out + (u64)tile.x * d_out_stride + head * dim, tile.y, dim, d_out_stride, whole);
    end_group();
    const u32 first = min((u32)TILE, tile.w - tile.z);
    bring_tile(keys, all_keys + (u64)tile.z * qk_stride, first, dim, qk_stride, whole);
    bring_tile(values, all_values + (u64)tile.z * v_stride, first, dim, v_stride, whole);
    end_group();
    await_tiles<1>();
    __syncthreads();
    u32 query[HEAD_DIM / 16][4], d_mix[HEAD_DIM / 16][4];
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++) {
        fragment(query[s], next_keys, warp * 16, s * 16, lane);
        fragment(d_mix[s], next_values, warp * 16, s * 16, lane);
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
        __syncthreads();
        const u32 next = start + TILE;
        if (next <= tile.x) {
            const u32 count = min((u32)TILE, tile.w - next);
            bring_tile(next_keys, all_keys + (u64)next * qk_stride, count, dim, qk_stride, whole);
            bring_tile(next_values, all_values + (u64)next * v_stride, count, dim, v_stride, whole);
        }
        end_group();
        await_tiles<1>();
        __syncthreads();
#pragma unroll
        for (u32 half = 0; half < TILE; half += HALF) {
            float score[HALF / 8][4] = {}, d_weight[HALF / 8][4] = {};
            times_rows<HALF>(score, query, keys, half, lane);
            times_rows<HALF>(d_weight, d_mix, values, half, lane);
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
        exchange(keys, next_keys);
        exchange(values, next_values);
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
// keys, queries are columns. Grid: kv_heads, tiles (of keys). Block: 128. Shared: 6 tiles and 4 · 64 floats; or 4 tiles if
// nothing is brought `ahead`, where a block has less.
extern "C" __global__ void __launch_bounds__(128) attention_d_kv(
    bf16 *d_qkv, const bf16 *qk, const bf16 *v, const bf16 *d_out, const float *lse, const float *delta, const uint4 *tiles,
    u32 tokens, u32 q_heads, u32 kv_heads, u32 dim, u32 d_stride, u32 qk_stride, u32 v_stride, u32 d_out_stride, float scale, u32 whole, u32 ahead) {
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *keys = shared, *values = keys + TILE * STRIDE;
    bf16 *queries = values + TILE * STRIDE, *d_mix = queries + TILE * STRIDE;
    bf16 *next_queries = ahead ? d_mix + TILE * STRIDE : queries, *next_d_mix = ahead ? next_queries + TILE * STRIDE : d_mix;
    float *sums = (float *)(next_d_mix + TILE * STRIDE), *next_sums = ahead ? sums + 2 * TILE : sums;
    const uint4 tile = tiles[blockIdx.y];
    const u32 kv = blockIdx.x, group = q_heads / kv_heads;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const float log_scale = scale * LOG2E;

    // Queries from `start` on of a head, with the sums of their softmax and their deltas.
    auto bring = [&](bf16 *to, bf16 *to_d, float *to_sums, u32 head, u32 start) {
        const u32 count = min((u32)TILE, tile.w - start);
        bring_tile(to, qk + (u64)start * qk_stride + head * dim, count, dim, qk_stride, whole);
        bring_tile(to_d, d_out + (u64)start * d_out_stride + head * dim, count, dim, d_out_stride, whole);
        if (threadIdx.x < TILE) {
            const u64 at = (u64)head * tokens + start + threadIdx.x;
            to_sums[threadIdx.x] = threadIdx.x < count ? lse[at] * LOG2E : INFINITE;
            to_sums[TILE + threadIdx.x] = threadIdx.x < count ? delta[at] : 0.0f;
        }
    };

    bring_tile(keys, qk + (u64)tile.x * qk_stride + (q_heads + kv) * dim, tile.y, dim, qk_stride, whole);
    bring_tile(values, v + (u64)tile.x * v_stride + kv * dim, tile.y, dim, v_stride, whole);
    bring(queries, d_mix, sums, kv * group, tile.x);
    end_group();
    float d_k[HEAD_DIM / 8][4] = {}, d_v[HEAD_DIM / 8][4] = {};

    for (u32 head = kv * group; head < (kv + 1) * group; head++) {
        for (u32 start = tile.x; start < tile.w; start += TILE) {
            __syncthreads();
            const bool is_last = start + TILE >= tile.w, is_first = head == kv * group && start == tile.x;
            const u32 next_head = is_last ? head + 1 : head;
            if (!ahead && !is_first) bring(queries, d_mix, sums, head, start);
            if (ahead && next_head < (kv + 1) * group) bring(next_queries, next_d_mix, next_sums, next_head, is_last ? tile.x : start + TILE);
            end_group();
            if (ahead) await_tiles<1>();
            else await_tiles<0>();
            __syncthreads();
            const float *log_sums = sums, *deltas = sums + TILE;
#pragma unroll 1
            for (u32 half = 0; half < TILE; half += HALF) {
                float score[HALF / 8][4] = {}, d_weight[HALF / 8][4] = {};
#pragma unroll
                for (int s = 0; s < HEAD_DIM / 16; s += 2) {
                    u32 key[2][4], value[2][4];
#pragma unroll
                    for (int t = 0; t < 2; t++) {
                        fragment(key[t], keys, warp * 16, (s + t) * 16, lane);
                        fragment(value[t], values, warp * 16, (s + t) * 16, lane);
                    }
#pragma unroll
                    for (int n = 0; n < HALF / 8; n++) {
                        u32 query[4], d_out[4];
                        columns(query, queries, half + n * 8, s * 16, lane);
                        columns(d_out, d_mix, half + n * 8, s * 16, lane);
                        mma(score[n], key[0], query[0], query[1]);
                        mma(score[n], key[1], query[2], query[3]);
                        mma(d_weight[n], value[0], d_out[0], d_out[1]);
                        mma(d_weight[n], value[1], d_out[2], d_out[3]);
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
            exchange(queries, next_queries);
            exchange(d_mix, next_d_mix);
            exchange(sums, next_sums);
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
