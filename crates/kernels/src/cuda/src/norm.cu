// residual += x (where there is an x), rounded once; out = residual / rms(residual) * weight, in fp32, rounded once.
// One block a row.
extern "C" __global__ void add_rms_norm(bf16 *out, bf16 *residual, const bf16 *x, const bf16 *weight, u32 hidden, float eps) {
    __shared__ float room[33];
    const u64 row = (u64)blockIdx.x * hidden;
    float squares = 0.0f;
    for (u32 i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
        float r[8], a[8];
        wide8(*(const uint4 *)(residual + row + i), r);
        if (x) {
            wide8(*(const uint4 *)(x + row + i), a);
#pragma unroll
            for (int j = 0; j < 8; j++) r[j] += a[j];
            const uint4 sum = narrow8(r);
            *(uint4 *)(residual + row + i) = sum;
            wide8(sum, r);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) squares += r[j] * r[j];
    }
    const float scale = rsqrtf(block_sum(squares, room) / (float)hidden + eps);
    // Each thread reads what it wrote itself.
    for (u32 i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
        float r[8], w[8];
        wide8(*(const uint4 *)(residual + row + i), r);
        wide8(*(const uint4 *)(weight + i), w);
#pragma unroll
        for (int j = 0; j < 8; j++) r[j] = r[j] * scale * w[j];
        *(uint4 *)(out + row + i) = narrow8(r);
    }
}

// RMSNorm of each head of q and k, RoPE (halves rotated), and the writing of k and v to the paged cache, in one launch.
// qkv: [tokens, heads + 2 kv_heads, D]; q: [tokens, heads, D]; caches: [blocks, kv_heads, BLOCK_TOKENS, D];
// turns: [positions, D] as cosines then sines. One warp a head of a token. Tokens whose row is NONE are left out.
extern "C" __global__ void qk_norm_rope_store(
    bf16 *q, bf16 *k_cache, bf16 *v_cache, const bf16 *qkv, const bf16 *q_weight, const bf16 *k_weight, const float *turns,
    const u32 *rows, const u32 *positions, const u32 *tables, u32 table_blocks, u32 tokens, u32 heads, u32 kv_heads, u32 dim,
    float eps) {
    const u32 lane = threadIdx.x & 31;
    const u32 all = heads + 2 * kv_heads;
    const u32 item = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const u32 token = item / all, head = item % all;
    if (token >= tokens || rows[token] == NONE) return;
    const u32 position = positions[token], half_dim = dim / 2;
    const bf16 *from = qkv + (u64)item * dim;
    bf16 *to;
    if (head < heads) {
        to = q + ((u64)token * heads + head) * dim;
    } else {
        const u32 block = tables[(u64)rows[token] * table_blocks + position / BLOCK_TOKENS];
        const u32 kv = (head - heads) % kv_heads;
        bf16 *cache = head < heads + kv_heads ? k_cache : v_cache;
        to = cache + (((u64)block * kv_heads + kv) * BLOCK_TOKENS + position % BLOCK_TOKENS) * dim;
    }
    if (head >= heads + kv_heads) {
        for (u32 i = lane; i < dim; i += 32) to[i] = from[i];
        return;
    }
    float squares = 0.0f;
    for (u32 i = lane; i < dim; i += 32) {
        const float x = wide(from[i]);
        squares += x * x;
    }
    const float scale = rsqrtf(warp_sum(squares) / (float)dim + eps);
    const bf16 *weight = head < heads ? q_weight : k_weight;
    const float *turn = turns + (u64)position * dim;
    for (u32 i = lane; i < half_dim; i += 32) {
        const float x = wide(from[i]) * scale * wide(weight[i]);
        const float y = wide(from[i + half_dim]) * scale * wide(weight[i + half_dim]);
        const float c = turn[i], s = turn[i + half_dim];
        to[i] = narrow(x * c - y * s);
        to[i + half_dim] = narrow(y * c + x * s);
    }
}
