// y += scale * (x A^T) B^T for tokens that have an adapter. Neighbouring tokens of one slot read A and B once.
// a: [slots, rank, depth]; b: [slots, width, rank]; ranks below `rank` are padded with zeros.

#define TOKENS 8

// h: [tokens, rank] in fp32. Grid: tokens / TOKENS, rank / 8. Block: 256, a warp for a rank.
extern "C" __global__ void __launch_bounds__(256) lora_shrink(
    float *h, const bf16 *x, const bf16 *a, const u32 *slots, u32 tokens, u32 depth, u32 rank) {
    const u32 lane = threadIdx.x & 31, row = blockIdx.y * 8 + (threadIdx.x >> 5);
    if (row >= rank) return;
    const u32 end = min(tokens, (blockIdx.x + 1) * TOKENS);
    u32 from = blockIdx.x * TOKENS;
    while (from < end) {
        const u32 slot = slots[from];
        u32 to = from + 1;
        while (to < end && slots[to] == slot) to++;
        if (slot != NONE) {
            const bf16 *matrix = a + ((u64)slot * rank + row) * depth;
            float sum[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; t++) sum[t] = 0.0f;
            for (u32 i = lane * 8; i < depth; i += 256) {
                float m[8];
                wide8(*(const uint4 *)(matrix + i), m);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
                    if (from + t < to) {
                        float v[8];
                        wide8(*(const uint4 *)(x + (u64)(from + t) * depth + i), v);
#pragma unroll
                        for (int j = 0; j < 8; j++) sum[t] += m[j] * v[j];
                    }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                const float all = warp_sum(sum[t]);
                if (lane == 0 && from + t < to) h[(u64)(from + t) * rank + row] = all;
            }
        }
        from = to;
    }
}

// h: [tokens, h_stride], of which columns h_start..h_start + rank are read; y: [tokens, y_stride], of which columns
// start..start + width are changed. Grid: tokens / TOKENS, width / 128. Block: 128.
extern "C" __global__ void __launch_bounds__(128) lora_expand(
    bf16 *y, const float *h, const bf16 *b, const float *scales, const u32 *slots, u32 tokens, u32 rank, u32 h_stride, u32 h_start,
    u32 y_stride, u32 start, u32 width) {
    const u32 column = blockIdx.y * 128 + threadIdx.x;
    if (column >= width) return;
    const u32 end = min(tokens, (blockIdx.x + 1) * TOKENS);
    u32 from = blockIdx.x * TOKENS;
    while (from < end) {
        const u32 slot = slots[from];
        u32 to = from + 1;
        while (to < end && slots[to] == slot) to++;
        if (slot != NONE) {
            const bf16 *matrix = b + ((u64)slot * width + column) * rank;
            float sum[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; t++) sum[t] = 0.0f;
            for (u32 i = 0; i < rank; i += 8) {
                float m[8];
                wide8(*(const uint4 *)(matrix + i), m);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
                    if (from + t < to) {
                        const float *v = h + (u64)(from + t) * h_stride + h_start + i;
#pragma unroll
                        for (int j = 0; j < 8; j++) sum[t] += m[j] * v[j];
                    }
            }
            const float scale = scales[slot];
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (from + t < to) {
                    bf16 *at = y + (u64)(from + t) * y_stride + start + column;
                    *at = narrow(wide(*at) + scale * sum[t]);
                }
        }
        from = to;
    }
}
