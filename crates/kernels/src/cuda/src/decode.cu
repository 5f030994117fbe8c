// Attention of one new token a row over its paged KV. HEAD_DIM and GROUP (query heads of a KV head) are compiled in.
// The blocks of a row are dealt to `splits` thread blocks, which leave unnormalised sums and log-sum-exps; `decode_merge`
// joins them. How a row is split follows from its length on the device, so that one graph serves all lengths.

#define LANES (HEAD_DIM / 8)
#define TOGETHER (32 / LANES)
#define WARPS 4

// q: [rows, kv_heads * GROUP, D]; part: [rows, heads, splits, D]; lse: [rows, heads, splits].
// Grid: rows, kv_heads, splits. Block: 32 * WARPS.
extern "C" __global__ void __launch_bounds__(32 * WARPS) decode_split(
    float *part, float *lse, const bf16 *q, const bf16 *k_cache, const bf16 *v_cache, const u32 *lengths, const u32 *tables,
    u32 table_blocks, u32 kv_heads, u32 splits, float scale) {
    __shared__ float sums[WARPS][GROUP][HEAD_DIM];
    __shared__ float tops[WARPS][GROUP], totals[WARPS][GROUP];
    const u32 row = blockIdx.x, kv = blockIdx.y, split = blockIdx.z;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 place = lane % LANES, stream = lane / LANES;
    const u32 length = lengths[row];
    const u32 blocks = (length + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const u32 each = (blocks + splits - 1) / splits;
    const u32 first = split * each, last = min(first + each, blocks);
    const u32 heads = kv_heads * GROUP;

    float query[GROUP][8], sum[GROUP][8], top[GROUP], total[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        wide8(*(const uint4 *)(q + ((u64)row * heads + kv * GROUP + g) * HEAD_DIM + place * 8), query[g]);
        top[g] = -INFINITE;
        total[g] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            query[g][j] *= scale;
            sum[g][j] = 0.0f;
        }
    }

    for (u32 b = first + warp; b < last; b += WARPS) {
        const u32 block = tables[(u64)row * table_blocks + b];
        const u64 base = ((u64)block * kv_heads + kv) * BLOCK_TOKENS * HEAD_DIM;
#pragma unroll 4
        for (u32 t = 0; t < BLOCK_TOKENS; t += TOGETHER) {
            const u32 token = t + stream;
            // A block holds all 16 tokens, written or not: what is past the length has no weight.
            const bool here = b * BLOCK_TOKENS + token < length;
            float key[8], value[8];
            wide8(*(const uint4 *)(k_cache + base + token * HEAD_DIM + place * 8), key);
            wide8(here ? *(const uint4 *)(v_cache + base + token * HEAD_DIM + place * 8) : make_uint4(0, 0, 0, 0), value);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float score = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; j++) score += query[g][j] * key[j];
#pragma unroll
                for (int step = LANES / 2; step > 0; step >>= 1) score += __shfl_xor_sync(FULL, score, step);
                if (here) {
                    const float higher = fmaxf(top[g], score);
                    const float shrink = __expf(top[g] - higher), weight = __expf(score - higher);
                    top[g] = higher;
                    total[g] = total[g] * shrink + weight;
#pragma unroll
                    for (int j = 0; j < 8; j++) sum[g][j] = sum[g][j] * shrink + weight * value[j];
                }
            }
        }
    }

    // The streams of a warp, then the warps, in a fixed order.
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
#pragma unroll
        for (int step = LANES; step < 32; step <<= 1) {
            const float other = __shfl_xor_sync(FULL, top[g], step);
            const float higher = fmaxf(top[g], other);
            const float mine = top[g] == -INFINITE ? 0.0f : __expf(top[g] - higher);
            total[g] *= mine;
            total[g] += __shfl_xor_sync(FULL, total[g], step);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sum[g][j] *= mine;
                sum[g][j] += __shfl_xor_sync(FULL, sum[g][j], step);
            }
            top[g] = higher;
        }
        if (stream == 0) {
#pragma unroll
            for (int j = 0; j < 8; j++) sums[warp][g][place * 8 + j] = sum[g][j];
            if (place == 0) {
                tops[warp][g] = top[g];
                totals[warp][g] = total[g];
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < GROUP * HEAD_DIM; i += 32 * WARPS) {
        const u32 g = i / HEAD_DIM, d = i % HEAD_DIM;
        float higher = -INFINITE;
        for (int w = 0; w < WARPS; w++) higher = fmaxf(higher, tops[w][g]);
        float all = 0.0f, value = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            if (tops[w][g] == -INFINITE) continue;
            const float weight = __expf(tops[w][g] - higher);
            all += weight * totals[w][g];
            value += weight * sums[w][g][d];
        }
        const u64 at = ((u64)row * heads + kv * GROUP + g) * splits + split;
        part[at * HEAD_DIM + d] = all > 0.0f ? value / all : 0.0f;
        if (d == 0) lse[at] = all > 0.0f ? higher + __logf(all) : -INFINITE;
    }
}

// out: [rows, heads, D]. One block of HEAD_DIM threads a head of a row. A row without a token gets zeros.
extern "C" __global__ void decode_merge(bf16 *out, const float *part, const float *lse, u32 splits) {
    const u64 at = (u64)blockIdx.x * splits;
    float higher = -INFINITE;
    for (u32 s = 0; s < splits; s++) higher = fmaxf(higher, lse[at + s]);
    float all = 0.0f, value = 0.0f;
    for (u32 s = 0; s < splits; s++) {
        if (lse[at + s] == -INFINITE) continue;
        const float weight = __expf(lse[at + s] - higher);
        all += weight;
        value += weight * part[(at + s) * HEAD_DIM + threadIdx.x];
    }
    out[(u64)blockIdx.x * HEAD_DIM + threadIdx.x] = narrow(all > 0.0f ? value / all : 0.0f);
}
