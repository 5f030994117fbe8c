// Training: mixtures of experts. A slot is a token's choice; its place is where it stands when slots lie by expert.

#define EXPERTS_MAX 256
#define EACH (EXPERTS_MAX / 32)

// Softmax of a row of logits, `EACH` a lane: expert i * 32 + lane. Numbers behind the last are 0.
__device__ __forceinline__ void softmax(float *x, const float *logits, u32 experts, u32 lane) {
    float top = -INFINITE, all = 0.0f;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        x[i] = i * 32 + lane < experts ? logits[i * 32 + lane] : -INFINITE;
        top = fmaxf(top, x[i]);
    }
    top = warp_max(top);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        x[i] = i * 32 + lane < experts ? expf(x[i] - top) : 0.0f;
        all += x[i];
    }
    all = warp_sum(all);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) x[i] /= all;
}

// The `chosen` most probable experts of each token (of equals the lower), ascending. One warp a token, 4 a block.
extern "C" __global__ void route(u32 *ids, float *weights, const float *logits, u32 tokens, u32 experts, u32 chosen, u32 stride, u32 renormalise) {
    const u32 lane = threadIdx.x & 31, token = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (token >= tokens) return;
    float x[EACH], kept = 0.0f;
    softmax(x, logits + (u64)token * stride, experts, lane);
    u32 taken = 0;
    for (u32 n = 0; n < chosen; n++) {
        float best = -1.0f;
        u32 at = NONE;
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            // What is no number is as improbable as can be, but can be chosen, so that it shows.
            const float p = x[i] >= 0.0f ? x[i] : 0.0f;
            if (i * 32 + lane < experts && !(taken >> i & 1) && p > best) {
                best = p;
                at = i * 32 + lane;
            }
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
        if (at % 32 == lane) taken |= 1u << (at / 32);
        kept += best;
    }
    u32 before = 0;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 all = __ballot_sync(FULL, taken >> i & 1);
        if (taken >> i & 1) {
            const u64 slot = (u64)token * chosen + before + __popc(all & ((1u << lane) - 1));
            ids[slot] = i * 32 + lane;
            weights[slot] = renormalise ? x[i] / kept : x[i];
        }
        before += __popc(all);
    }
}

// d_logits from gradients of the slots' weights. One warp a token, 4 a block.
extern "C" __global__ void route_grad(bf16 *d_logits, const float *logits, const u32 *ids, const float *d_weights, u32 tokens, u32 experts, u32 chosen, u32 d_stride, u32 stride, u32 renormalise) {
    const u32 lane = threadIdx.x & 31, token = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (token >= tokens) return;
    float x[EACH], d[EACH] = {}, kept = 0.0f, mean = 0.0f;
    softmax(x, logits + (u64)token * stride, experts, lane);
    u32 taken = 0;
    for (u32 n = 0; n < chosen; n++) {
        const u64 slot = (u64)token * chosen + n;
        const u32 expert = ids[slot];
#pragma unroll
        for (u32 i = 0; i < EACH; i++)
            if (i * 32 + lane == expert) {
                taken |= 1u << i;
                d[i] = d_weights[slot];
            }
    }
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
        if (taken >> i & 1) kept += x[i];
    kept = warp_sum(kept);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        // The chosen alone share the weight: a softmax among themselves.
        if (renormalise) x[i] = taken >> i & 1 ? x[i] / kept : 0.0f;
        mean += x[i] * d[i];
    }
    mean = warp_sum(mean);
#pragma unroll
    for (u32 i = 0; i < EACH; i++)
        if (i * 32 + lane < experts) d_logits[(u64)token * d_stride + i * 32 + lane] = narrow(x[i] * (d[i] - mean));
}

// places[order[i]] = i.
extern "C" __global__ void places(u32 *places, const u32 *order, u32 slots) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i < slots) places[order[i]] = i;
}

// to[place] = from[token of the place]. One block a place.
extern "C" __global__ void rows_by_expert(bf16 *to, const bf16 *from, const u32 *order, u32 chosen, u32 cols, u32 stride) {
    const u32 token = order[blockIdx.x] / chosen;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8)
        *(uint4 *)(to + (u64)blockIdx.x * cols + i) = *(const uint4 *)(from + (u64)token * stride + i);
}

#define M_TILE 32
#define N_TILE 64
#define K_TILE 32
#define K_STRIDE (K_TILE + 8)
#define N_STRIDE (N_TILE + 8)

// out[place] = x[place] * matrix of its expert; `turned`: matrices are [experts, width, depth] and transposed, else
// [experts, depth, width]. Grid: width / N_TILE, at least slots / M_TILE + experts. Block: 128, as 2 warps of rows by 2.
extern "C" __global__ void __launch_bounds__(128) grouped(bf16 *out, const bf16 *x, const bf16 *matrices, const u32 *starts, u32 experts, u32 width, u32 depth, u32 turned) {
    __shared__ __align__(16) bf16 rows[M_TILE * K_STRIDE];
    __shared__ __align__(16) bf16 columns[N_TILE * K_STRIDE];
    __shared__ u32 work[3];
    if (threadIdx.x == 0) {
        u32 left = blockIdx.y;
        work[0] = NONE;
        for (u32 e = 0; e < experts; e++) {
            const u32 from = starts[e], to = starts[e + 1], tiles = (to - from + M_TILE - 1) / M_TILE;
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
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane / 4, c = lane % 4 * 2;
    const u32 m_base = warp / 2 * 16, n_base = warp % 2 * 32;
    float sum[4][4] = {};
    for (u32 k0 = 0; k0 < depth; k0 += K_TILE) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < M_TILE * K_TILE / 8; i += 128) {
            const u32 m = i / (K_TILE / 8), k = i % (K_TILE / 8) * 8;
            const bool there = from + m < to && k0 + k < depth;
            *(uint4 *)(rows + m * K_STRIDE + k) = there ? *(const uint4 *)(x + (u64)(from + m) * depth + k0 + k) : make_uint4(0, 0, 0, 0);
        }
        for (u32 i = threadIdx.x; i < N_TILE * K_TILE / 8; i += 128) {
            if (turned) {
                const u32 n = i / (K_TILE / 8), k = i % (K_TILE / 8) * 8;
                const bool there = n0 + n < width && k0 + k < depth;
                *(uint4 *)(columns + n * K_STRIDE + k) = there ? *(const uint4 *)(matrix + (u64)(n0 + n) * depth + k0 + k) : make_uint4(0, 0, 0, 0);
            } else {
                const u32 k = i / (N_TILE / 8), n = i % (N_TILE / 8) * 8;
                const bool there = n0 + n < width && k0 + k < depth;
                *(uint4 *)(columns + k * N_STRIDE + n) = there ? *(const uint4 *)(matrix + (u64)(k0 + k) * width + n0 + n) : make_uint4(0, 0, 0, 0);
            }
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < K_TILE / 16; s++) {
            const bf16 *row = rows + (m_base + r) * K_STRIDE + s * 16 + c;
            const u32 a[4] = {*(const u32 *)row, *(const u32 *)(row + 8 * K_STRIDE), *(const u32 *)(row + 8), *(const u32 *)(row + 8 * K_STRIDE + 8)};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 b[2];
                if (turned) {
                    const bf16 *column = columns + (n_base + n * 8 + r) * K_STRIDE + s * 16 + c;
                    b[0] = *(const u32 *)column;
                    b[1] = *(const u32 *)(column + 8);
                } else {
                    load_transposed(b, columns + (s * 16 + lane % 16) * N_STRIDE + n_base + n * 8);
                }
                mma(sum[n], a, b[0], b[1]);
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

// Gradients of gate and up in place, and what each slot's weight is worth. One warp a place, 4 a block.
extern "C" __global__ void mixed_grad(bf16 *gate_up, float *d_weights, const bf16 *d_mixed, const float *weights, const u32 *order, u32 slots, u32 width) {
    const u32 lane = threadIdx.x & 31, place = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (place >= slots) return;
    const u32 slot = order[place];
    const float weight = weights[slot];
    bf16 *gate = gate_up + (u64)place * 2 * width, *up = gate + width;
    const bf16 *d = d_mixed + (u64)place * width;
    float worth = 0.0f;
    for (u32 i = lane; i < width; i += 32) {
        const float g = wide(gate[i]), u = wide(up[i]), own = wide(d[i]);
        const float s = 1.0f / (1.0f + __expf(-g)), silu = g * s;
        worth += own * silu * u;
        up[i] = narrow(own * weight * silu);
        gate[i] = narrow(own * weight * u * (s + silu * (1.0f - s)));
    }
    worth = warp_sum(worth);
    if (lane == 0) d_weights[slot] = worth;
}

// y[token] += weight * rows[place] over the token's choices, in order; weights are 1 where there are none. One block a token.
extern "C" __global__ void add_up(bf16 *y, const bf16 *rows, const float *weights, const u32 *places, u32 chosen, u32 cols, u32 stride) {
    const u64 token = blockIdx.x;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float sum[8];
        wide8(*(const uint4 *)(y + token * stride + i), sum);
        for (u32 n = 0; n < chosen; n++) {
            const u64 slot = token * chosen + n;
            const float weight = weights ? weights[slot] : 1.0f;
            float x[8];
            wide8(*(const uint4 *)(rows + (u64)places[slot] * cols + i), x);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += weight * x[j];
        }
        *(uint4 *)(y + token * stride + i) = narrow8(sum);
    }
}
