// Attention of many new tokens a row over its paged KV, causal: a token sees positions up to its own. HEAD_DIM is
// compiled in. Q_TILE tokens of one row and one head a thread block, 16 tokens a warp, keys in tiles of KEYS.
// bf16 products with fp32 sums; the weights of the softmax are rounded to bf16 for the product with v.

#define Q_TILE 64
#define KEYS 32
#define STRIDE (HEAD_DIM + 8)

// q, out: [tokens, heads, D]. tiles: [count, 4] = row (NONE: leave out), first token in q, tokens (at most Q_TILE),
// position of the first token. Grid: tiles, heads. Block: 128.
extern "C" __global__ void __launch_bounds__(128) prefill(
    bf16 *out, const bf16 *q, const bf16 *k_cache, const bf16 *v_cache, const uint4 *tiles, const u32 *tables, u32 table_blocks,
    u32 heads, u32 kv_heads, float scale) {
    __shared__ __align__(16) bf16 keys[KEYS * STRIDE];
    __shared__ __align__(16) bf16 values[KEYS * STRIDE];
    const uint4 tile = tiles[blockIdx.x];
    if (tile.x == NONE) return;
    const u32 head = blockIdx.y, kv = head / (heads / kv_heads);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 r = lane / 4, c = (lane % 4) * 2;
    const u32 low = warp * 16 + r, high = low + 8;
    const bool has_low = low < tile.z, has_high = high < tile.z;
    const u64 q_low = ((u64)(tile.y + low) * heads + head) * HEAD_DIM;
    const u64 q_high = ((u64)(tile.y + high) * heads + head) * HEAD_DIM;

    u32 query[HEAD_DIM / 16][4];
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++) {
        const u32 d = s * 16 + c;
        query[s][0] = has_low ? *(const u32 *)(q + q_low + d) : 0;
        query[s][1] = has_high ? *(const u32 *)(q + q_high + d) : 0;
        query[s][2] = has_low ? *(const u32 *)(q + q_low + d + 8) : 0;
        query[s][3] = has_high ? *(const u32 *)(q + q_high + d + 8) : 0;
    }
    float sum[HEAD_DIM / 8][4];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n][i] = 0.0f;
    float top[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f};
    const u32 length = tile.w + tile.z;

    for (u32 start = 0; start < length; start += KEYS) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < KEYS * HEAD_DIM / 8; i += 128) {
            const u32 key = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
            const u32 position = start + key;
            uint4 k = make_uint4(0, 0, 0, 0), v = k;
            if (position < length) {
                const u32 block = tables[(u64)tile.x * table_blocks + position / BLOCK_TOKENS];
                const u64 at = (((u64)block * kv_heads + kv) * BLOCK_TOKENS + position % BLOCK_TOKENS) * HEAD_DIM + d;
                k = *(const uint4 *)(k_cache + at);
                v = *(const uint4 *)(v_cache + at);
            }
            *(uint4 *)(keys + key * STRIDE + d) = k;
            *(uint4 *)(values + key * STRIDE + d) = v;
        }
        __syncthreads();

        float score[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
            for (int s = 0; s < HEAD_DIM / 16; s++) {
                const bf16 *key = keys + (n * 8 + r) * STRIDE + s * 16 + c;
                mma(score[n], query[s], *(const u32 *)key, *(const u32 *)(key + 8));
            }
        }
        float higher[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 position = start + n * 8 + c + (i & 1);
                const u32 own = tile.w + (i < 2 ? low : high);
                score[n][i] = position <= own && position < length ? score[n][i] * scale : -INFINITE;
                higher[i >> 1] = fmaxf(higher[i >> 1], score[n][i]);
            }
        }
        float shrink[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(FULL, higher[h], 1));
            higher[h] = fmaxf(higher[h], __shfl_xor_sync(FULL, higher[h], 2));
            shrink[h] = top[h] == -INFINITE ? 0.0f : __expf(top[h] - higher[h]);
            top[h] = higher[h];
        }
        u32 weight[KEYS / 8][2];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = score[n][i] == -INFINITE ? 0.0f : __expf(score[n][i] - top[i >> 1]);
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
        for (int n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sum[n][i] *= shrink[i >> 1];
#pragma unroll
            for (int s = 0; s < KEYS / 16; s++) {
                const u32 a[4] = {weight[2 * s][0], weight[2 * s][1], weight[2 * s + 1][0], weight[2 * s + 1][1]};
                u32 b[2];
                load_transposed(b, values + (s * 16 + lane % 16) * STRIDE + n * 8);
                mma(sum[n], a, b[0], b[1]);
            }
        }
    }
    const float inverse[2] = {total[0] > 0.0f ? 1.0f / total[0] : 0.0f, total[1] > 0.0f ? 1.0f / total[1] : 0.0f};
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        const u32 d = n * 8 + c;
        if (has_low) *(u32 *)(out + q_low + d) = narrow2(sum[n][0] * inverse[0], sum[n][1] * inverse[0]);
        if (has_high) *(u32 *)(out + q_high + d) = narrow2(sum[n][2] * inverse[1], sum[n][3] * inverse[1]);
    }
}
