// Mixture of experts: which experts a token goes to, an order of (token, choice) pairs by expert, and products of the
// rows of each expert with its own matrix. Nothing is added with atomics: every run gives the same bits.

#define EXPERTS_MAX 256

// Softmax over the experts in fp32, the `chosen` largest (of equals the lower number), renormalised where asked.
// logits: [tokens, experts]; ids, weights: [tokens, chosen]. One warp a token, 4 a block.
extern "C" __global__ void moe_route(u32 *ids, float *weights, const float *logits, u32 tokens, u32 experts, u32 chosen, u32 renormalise) {
    const u32 lane = threadIdx.x & 31, token = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (token >= tokens) return;
    float x[EXPERTS_MAX / 32], top = -INFINITE, all = 0.0f;
#pragma unroll
    for (int i = 0; i < EXPERTS_MAX / 32; i++) {
        const u32 e = i * 32 + lane;
        x[i] = e < experts ? logits[(u64)token * experts + e] : -INFINITE;
        top = fmaxf(top, x[i]);
    }
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < EXPERTS_MAX / 32; i++) {
        x[i] = i * 32 + lane < experts ? expf(x[i] - top) : -1.0f;
        if (x[i] >= 0.0f) all += x[i];
    }
    all = warp_sum(all);
    float kept = 0.0f, mine = 0.0f;
    u32 my_id = 0;
    for (u32 n = 0; n < chosen; n++) {
        float best = -1.0f;
        u32 at = NONE;
#pragma unroll
        for (int i = 0; i < EXPERTS_MAX / 32; i++)
            if (x[i] > best) {
                best = x[i];
                at = i * 32 + lane;
            }
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) {
            const float other = __shfl_xor_sync(FULL, best, step);
            const u32 other_at = __shfl_xor_sync(FULL, at, step);
            if (other > best || (other == best && other_at < at)) {
                best = other;
                at = other_at;
            }
        }
#pragma unroll
        for (int i = 0; i < EXPERTS_MAX / 32; i++)
            if (i * 32 + lane == at) x[i] = -1.0f;
        // NaN logits choose nobody; the pair then goes to an expert that exists, and its weight stays NaN.
        const float probability = at == NONE ? all : best / all;
        at = at == NONE ? n : at;
        kept += probability;
        if (lane == n) {
            mine = probability;
            my_id = at;
        }
    }
    if (lane < chosen) {
        ids[(u64)token * chosen + lane] = my_id;
        weights[(u64)token * chosen + lane] = renormalise ? mine / kept : mine;
    }
}

// Pairs in the order of their experts, of one expert in their own order. offsets: [experts + 1]; order: pair at a place;
// places: place of a pair. One block of EXPERTS_MAX threads, thread e for expert e.
extern "C" __global__ void moe_group(u32 *offsets, u32 *order, u32 *places, const u32 *ids, u32 pairs, u32 experts) {
    __shared__ u32 chunk[1024];
    __shared__ u32 starts[EXPERTS_MAX + 1];
    const u32 e = threadIdx.x;
    u32 count = 0;
    for (u32 base = 0; base < pairs; base += 1024) {
        const u32 n = min(1024u, pairs - base);
        __syncthreads();
        for (u32 i = e; i < n; i += blockDim.x) chunk[i] = ids[base + i];
        __syncthreads();
        for (u32 i = 0; i < n; i++) count += chunk[i] == e;
    }
    starts[e + 1] = count;
    __syncthreads();
    if (e == 0) {
        starts[0] = 0;
        for (u32 i = 0; i < EXPERTS_MAX; i++) starts[i + 1] += starts[i];
    }
    __syncthreads();
    if (e <= experts) offsets[e] = starts[e];
    if (e == 0 && experts == EXPERTS_MAX) offsets[experts] = starts[experts];
    u32 place = starts[e];
    for (u32 base = 0; base < pairs; base += 1024) {
        const u32 n = min(1024u, pairs - base);
        __syncthreads();
        for (u32 i = e; i < n; i += blockDim.x) chunk[i] = ids[base + i];
        __syncthreads();
        for (u32 i = 0; i < n; i++)
            if (chunk[i] == e) {
                order[place] = base + i;
                places[base + i] = place;
                place++;
            }
    }
}

#define M_TILE 32
#define N_TILE 64
#define K_TILE 32
#define K_STRIDE (K_TILE + 8)

// out[place] = x[source(place)] * matrices[expert of place]^T; source is order[place] / chosen, or the place itself where
// chosen is 0. x: [.., depth]; matrices: [experts, width, depth]; out: [pairs, width].
// Grid: width / N_TILE, at least pairs / M_TILE + experts. Block: 128, as 2 warps of rows by 2 of columns.
extern "C" __global__ void __launch_bounds__(128) moe_linear(
    bf16 *out, const bf16 *x, const bf16 *matrices, const u32 *offsets, const u32 *order, u32 experts, u32 chosen, u32 width, u32 depth) {
    __shared__ __align__(16) bf16 rows[M_TILE * K_STRIDE];
    __shared__ __align__(16) bf16 columns[N_TILE * K_STRIDE];
    __shared__ u32 work[3];
    if (threadIdx.x == 0) {
        u32 left = blockIdx.y;
        work[0] = NONE;
        for (u32 e = 0; e < experts; e++) {
            const u32 from = offsets[e], to = offsets[e + 1], tiles = (to - from + M_TILE - 1) / M_TILE;
            if (left < tiles) {
                work[0] = e;
                work[1] = from + left * M_TILE;
                work[2] = min(to, from + (left + 1) * M_TILE);
                break;
            }
            left -= tiles;
        }
    }
    __syncthreads();
    if (work[0] == NONE) return;
    const u32 from = work[1], to = work[2], n0 = blockIdx.x * N_TILE;
    const bf16 *matrix = matrices + (u64)work[0] * width * depth;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 r = lane / 4, c = (lane % 4) * 2;
    const u32 m_base = (warp / 2) * 16, n_base = (warp % 2) * 32;
    float sum[4][4];
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n][i] = 0.0f;
    for (u32 k0 = 0; k0 < depth; k0 += K_TILE) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < M_TILE * K_TILE / 8; i += 128) {
            const u32 m = i / (K_TILE / 8), k = i % (K_TILE / 8) * 8;
            uint4 value = make_uint4(0, 0, 0, 0);
            if (from + m < to && k0 + k < depth) {
                const u32 source = chosen ? order[from + m] / chosen : from + m;
                value = *(const uint4 *)(x + (u64)source * depth + k0 + k);
            }
            *(uint4 *)(rows + m * K_STRIDE + k) = value;
        }
        for (u32 i = threadIdx.x; i < N_TILE * K_TILE / 8; i += 128) {
            const u32 n = i / (K_TILE / 8), k = i % (K_TILE / 8) * 8;
            uint4 value = make_uint4(0, 0, 0, 0);
            if (n0 + n < width && k0 + k < depth) value = *(const uint4 *)(matrix + (u64)(n0 + n) * depth + k0 + k);
            *(uint4 *)(columns + n * K_STRIDE + k) = value;
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < K_TILE / 16; s++) {
            const bf16 *row = rows + (m_base + r) * K_STRIDE + s * 16 + c;
            const u32 a[4] = {*(const u32 *)row, *(const u32 *)(row + 8 * K_STRIDE), *(const u32 *)(row + 8), *(const u32 *)(row + 8 * K_STRIDE + 8)};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const bf16 *column = columns + (n_base + n * 8 + r) * K_STRIDE + s * 16 + c;
                mma(sum[n], a, *(const u32 *)column, *(const u32 *)(column + 8));
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const u32 column = n0 + n_base + n * 8 + c, low = from + m_base + r, high = low + 8;
        if (column >= width) continue;
        if (low < to) *(u32 *)(out + (u64)low * width + column) = narrow2(sum[n][0], sum[n][1]);
        if (high < to) *(u32 *)(out + (u64)high * width + column) = narrow2(sum[n][2], sum[n][3]);
    }
}

// out[token] = sum over its choices, in their order, of weight * y[place]; fp32, rounded once. One block a token.
extern "C" __global__ void moe_combine(bf16 *out, const bf16 *y, const float *weights, const u32 *places, u32 chosen, u32 hidden) {
    const u64 token = blockIdx.x;
    for (u32 i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (u32 n = 0; n < chosen; n++) {
            const float weight = weights[token * chosen + n];
            float value[8];
            wide8(*(const uint4 *)(y + (u64)places[token * chosen + n] * hidden + i), value);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += weight * value[j];
        }
        *(uint4 *)(out + token * hidden + i) = narrow8(sum);
    }
}
