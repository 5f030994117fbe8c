// Training: ops on single rows. Matrices have rows `stride` elements apart. `whole` says that rows are whole 16 bytes and
// begin at such; else elements are moved one by one.

__device__ __forceinline__ void get8(const bf16 *p, u32 left, u32 whole, float *x) {
    if (whole) {
        wide8(*(const uint4 *)p, x);
        return;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++) x[j] = j < left ? wide(p[j]) : 0.0f;
}

__device__ __forceinline__ void put8(bf16 *p, u32 left, u32 whole, const float *x) {
    if (whole) {
        *(uint4 *)p = narrow8(x);
        return;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
        if (j < left) p[j] = narrow(x[j]);
}

__device__ __forceinline__ void move8(bf16 *to, const bf16 *from, u32 left, u32 whole) {
    if (whole) {
        *(uint4 *)to = *(const uint4 *)from;
        return;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
        if (j < left) to[j] = from[j];
}

// to[i] = from[rows[i]]; a row that is not there gives zeroes. One block a row.
extern "C" __global__ void gather(bf16 *to, const bf16 *from, const u32 *rows, u32 from_rows, u32 cols, u32 to_stride, u32 from_stride, u32 whole) {
    const u32 row = rows[blockIdx.x];
    const float none[8] = {};
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        bf16 *at = to + (u64)blockIdx.x * to_stride + i;
        if (row < from_rows)
            move8(at, from + (u64)row * from_stride + i, cols - i, whole);
        else
            put8(at, cols - i, whole, none);
    }
}

// to[rows[i]] = from[i]; no row is named twice, and one that is not there is left out. One block a row.
extern "C" __global__ void scatter(bf16 *to, const bf16 *from, const u32 *rows, u32 to_rows, u32 cols, u32 to_stride, u32 from_stride, u32 whole) {
    const u32 row = rows[blockIdx.x];
    if (row >= to_rows) return;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8)
        move8(to + (u64)row * to_stride + i, from + (u64)blockIdx.x * from_stride + i, cols - i, whole);
}

// d_table[ids[i]] += d_out[i]: the block of an id's first place adds up all its places in order. Block: 256.
extern "C" __global__ void embed_grad(float *d_table, const bf16 *d_out, const u32 *ids, u32 count, u32 table_rows, u32 cols, u32 table_stride, u32 stride) {
    __shared__ u32 places[256];
    __shared__ u32 found;
    const u32 id = ids[blockIdx.x];
    if (id >= table_rows) return;
    u32 earlier = 0;
    for (u32 i = threadIdx.x; i < blockIdx.x; i += blockDim.x) earlier |= ids[i] == id;
    if (__syncthreads_or(earlier)) return;
    float *to = d_table + (u64)id * table_stride;
    for (u32 start = blockIdx.x; start < count; start += 256) {
        const u32 place = start + threadIdx.x;
        const u32 same = place < count && ids[place] == id;
        places[threadIdx.x] = same;
        const u32 any = __syncthreads_count(same);
        if (any) {
            if (threadIdx.x == 0) {
                u32 n = 0;
                for (u32 i = 0; i < 256; i++)
                    if (places[i]) places[n++] = start + i;
                found = n;
            }
            __syncthreads();
            for (u32 c = threadIdx.x; c < cols; c += 256) {
                float sum = to[c];
                for (u32 i = 0; i < found; i++) sum += wide(d_out[(u64)places[i] * stride + c]);
                to[c] = sum;
            }
        }
        __syncthreads();
    }
}

// y = w * x / rms(x). One block a row.
extern "C" __global__ void rms_norm(bf16 *y, const bf16 *x, const bf16 *weight, u32 cols, u32 y_stride, u32 x_stride, float eps, u32 whole) {
    __shared__ float room[33];
    x += (u64)blockIdx.x * x_stride;
    y += (u64)blockIdx.x * y_stride;
    float squares = 0.0f;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float a[8];
        get8(x + i, cols - i, whole, a);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += a[j] * a[j];
    }
    const float scale = rsqrtf(block_sum(squares, room) / (float)cols + eps);
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float a[8], w[8];
        get8(x + i, cols - i, whole, a);
        get8(weight + i, cols - i, whole, w);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = w[j] * (a[j] * scale);
        put8(y + i, cols - i, whole, a);
    }
}

// d_x += gradient of x; scales[row] = 1 / rms, for the weight's. One block a row.
extern "C" __global__ void rms_norm_grad(bf16 *d_x, float *scales, const bf16 *x, const bf16 *weight, const bf16 *d_y, u32 cols, u32 d_x_stride, u32 x_stride, u32 d_y_stride, float eps, u32 whole) {
    __shared__ float room[33];
    x += (u64)blockIdx.x * x_stride;
    d_y += (u64)blockIdx.x * d_y_stride;
    d_x += (u64)blockIdx.x * d_x_stride;
    float squares = 0.0f, dot = 0.0f;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float a[8], w[8], d[8];
        get8(x + i, cols - i, whole, a);
        get8(weight + i, cols - i, whole, w);
        get8(d_y + i, cols - i, whole, d);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            squares += a[j] * a[j];
            dot += d[j] * w[j] * a[j];
        }
    }
    const float scale = rsqrtf(block_sum(squares, room) / (float)cols + eps);
    const float back = block_sum(dot, room) * scale * scale * scale / (float)cols;
    if (scales && threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float a[8], w[8], d[8], sum[8];
        get8(x + i, cols - i, whole, a);
        get8(weight + i, cols - i, whole, w);
        get8(d_y + i, cols - i, whole, d);
        get8(d_x + i, cols - i, whole, sum);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += d[j] * w[j] * scale - a[j] * back;
        put8(d_x + i, cols - i, whole, sum);
    }
}

// Sums of d_y * x * scale over the rows of a chunk. parts: [chunks, cols]. Grid: cols / 128, chunks. Block: 128.
extern "C" __global__ void norm_weight_grad(float *parts, const bf16 *x, const bf16 *d_y, const float *scales, u32 rows, u32 chunk_rows, u32 cols, u32 x_stride, u32 d_y_stride) {
    const u32 c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    const u32 from = blockIdx.y * chunk_rows, to = min(rows, from + chunk_rows);
    float sum = 0.0f;
    for (u32 row = from; row < to; row++)
        sum += wide(d_y[(u64)row * d_y_stride + c]) * (wide(x[(u64)row * x_stride + c]) * scales[row]);
    parts[(u64)blockIdx.y * cols + c] = sum;
}

// to[c] += sum of parts[.., c], rows `stride` apart, in one order. Block: 1,024, as 32 columns by 32.
extern "C" __global__ void __launch_bounds__(1024) add_columns(float *to, const float *parts, u32 rows, u32 cols, u32 stride) {
    __shared__ float room[32][33];
    const u32 x = threadIdx.x & 31, y = threadIdx.x >> 5, c = blockIdx.x * 32 + x;
    float sum = 0.0f;
    if (c < cols)
        for (u32 row = y; row < rows; row += 32) sum += parts[(u64)row * stride + c];
    room[y][x] = sum;
    __syncthreads();
    if (y == 0 && c < cols) {
        float all = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) all += room[i][x];
        to[c] += all;
    }
}

// RMSNorm of each head of q and k, then RoPE (halves rotated). turns: [positions, dim] as cosines then sines.
// One warp a head of a token, 8 a block.
extern "C" __global__ void rotate(bf16 *qk, const bf16 *qkv, const bf16 *q_norm, const bf16 *k_norm, const float *turns, const u32 *positions, u32 tokens, u32 q_heads, u32 heads, u32 dim, u32 qk_stride, u32 qkv_stride, float eps) {
    const u32 lane = threadIdx.x & 31, item = blockIdx.x * 8 + (threadIdx.x >> 5);
    const u32 token = item / heads, head = item % heads, half_dim = dim / 2;
    if (token >= tokens) return;
    const bf16 *x = qkv + (u64)token * qkv_stride + head * dim;
    bf16 *y = qk + (u64)token * qk_stride + head * dim;
    float squares = 0.0f;
    for (u32 i = lane; i < dim; i += 32) squares += wide(x[i]) * wide(x[i]);
    const float scale = rsqrtf(warp_sum(squares) / (float)dim + eps);
    const bf16 *weight = head < q_heads ? q_norm : k_norm;
    const float *turn = turns + (u64)positions[token] * dim;
    for (u32 i = lane; i < half_dim; i += 32) {
        const float a = wide(weight[i]) * (wide(x[i]) * scale);
        const float b = wide(weight[i + half_dim]) * (wide(x[i + half_dim]) * scale);
        const float c = turn[i], s = turn[i + half_dim];
        y[i] = narrow(a * c - b * s);
        y[i + half_dim] = narrow(b * c + a * s);
    }
}

#define ROTATE_DIM_MAX 256
#define ROTATE_BLOCKS 512

// Its backward in place on d. parts: [ROTATE_BLOCKS, 2 dim], sums for the norms' weights of q and k, or null.
// ROTATE_BLOCKS blocks of 8 warps; each warp takes every 4,096th head.
extern "C" __global__ void __launch_bounds__(256) rotate_grad(bf16 *d, float *parts, const bf16 *qkv, const bf16 *q_norm, const bf16 *k_norm, const float *turns, const u32 *positions, u32 tokens, u32 q_heads, u32 heads, u32 dim, u32 d_stride, u32 qkv_stride, float eps) {
    __shared__ float room[8][2 * ROTATE_DIM_MAX];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half_dim = dim / 2;
    float sums[2][ROTATE_DIM_MAX / 32] = {};
    for (u64 item = blockIdx.x * 8 + warp; item < (u64)tokens * heads; item += ROTATE_BLOCKS * 8) {
        const u32 token = item / heads, head = item % heads;
        const bf16 *x = qkv + (u64)token * qkv_stride + head * dim;
        bf16 *y = d + (u64)token * d_stride + head * dim;
        const bf16 *weight = head < q_heads ? q_norm : k_norm;
        const float *turn = turns + (u64)positions[token] * dim;
        float low[ROTATE_DIM_MAX / 64], high[ROTATE_DIM_MAX / 64], squares = 0.0f, dot = 0.0f;
#pragma unroll
        for (int n = 0; n < ROTATE_DIM_MAX / 64; n++) {
            const u32 i = n * 32 + lane;
            low[n] = high[n] = 0.0f;
            if (i < half_dim) {
                const float c = turn[i], s = turn[i + half_dim], a = wide(y[i]), b = wide(y[i + half_dim]);
                const float p = wide(x[i]), q = wide(x[i + half_dim]);
                low[n] = a * c + b * s;
                high[n] = b * c - a * s;
                squares += p * p + q * q;
                dot += low[n] * wide(weight[i]) * p + high[n] * wide(weight[i + half_dim]) * q;
            }
        }
        const float scale = rsqrtf(warp_sum(squares) / (float)dim + eps);
        const float back = warp_sum(dot) * scale * scale * scale / (float)dim;
#pragma unroll
        for (int n = 0; n < ROTATE_DIM_MAX / 64; n++) {
            const u32 i = n * 32 + lane;
            if (i < half_dim) {
                const float p = wide(x[i]), q = wide(x[i + half_dim]);
                y[i] = narrow(low[n] * wide(weight[i]) * scale - p * back);
                y[i + half_dim] = narrow(high[n] * wide(weight[i + half_dim]) * scale - q * back);
                const float of_low = low[n] * (p * scale), of_high = high[n] * (q * scale);
                if (head < q_heads) {
                    sums[0][2 * n] += of_low;
                    sums[0][2 * n + 1] += of_high;
                } else {
                    sums[1][2 * n] += of_low;
                    sums[1][2 * n + 1] += of_high;
                }
            }
        }
    }
    if (!parts) return;
#pragma unroll
    for (int n = 0; n < ROTATE_DIM_MAX / 64; n++) {
        const u32 i = n * 32 + lane;
        if (i < half_dim) {
            room[warp][i] = sums[0][2 * n];
            room[warp][i + half_dim] = sums[0][2 * n + 1];
            room[warp][dim + i] = sums[1][2 * n];
            room[warp][dim + i + half_dim] = sums[1][2 * n + 1];
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 2 * dim; i += 256) {
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; w++) all += room[w][i];
        parts[(u64)blockIdx.x * 2 * dim + i] = all;
    }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// out = silu(gate) * up. One thread 8 columns of a row; eights = ceil(width / 8). Block: 256.
extern "C" __global__ void swiglu(bf16 *out, const bf16 *gate_up, u32 rows, u32 width, u32 eights, u32 out_stride, u32 stride, u32 whole) {
    const u64 item = (u64)blockIdx.x * 256 + threadIdx.x;
    const u32 row = item / eights, i = item % eights * 8;
    if (row >= rows) return;
    float g[8], u[8];
    get8(gate_up + (u64)row * stride + i, width - i, whole, g);
    get8(gate_up + (u64)row * stride + width + i, width - i, whole, u);
#pragma unroll
    for (int j = 0; j < 8; j++) g[j] = g[j] * sigmoid(g[j]) * u[j];
    put8(out + (u64)row * out_stride + i, width - i, whole, g);
}

// Its backward in place: gate_up becomes its gradient, and d_out what the forward gave.
extern "C" __global__ void swiglu_grad(bf16 *d_out, bf16 *gate_up, u32 rows, u32 width, u32 eights, u32 out_stride, u32 stride, u32 whole) {
    const u64 item = (u64)blockIdx.x * 256 + threadIdx.x;
    const u32 row = item / eights, i = item % eights * 8;
    if (row >= rows) return;
    bf16 *gate = gate_up + (u64)row * stride + i, *up = gate + width, *out = d_out + (u64)row * out_stride + i;
    float g[8], u[8], d[8];
    get8(gate, width - i, whole, g);
    get8(up, width - i, whole, u);
    get8(out, width - i, whole, d);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float s = sigmoid(g[j]), silu = g[j] * s, held = d[j];
        d[j] = silu * u[j];
        g[j] = held * u[j] * (s + silu * (1.0f - s));
        u[j] = held * silu;
    }
    put8(gate, width - i, whole, g);
    put8(up, width - i, whole, u);
    put8(out, width - i, whole, d);
}

// losses[row] = -log softmax of the target among `cols`; with `grad` these become grad * (softmax - one-hot), and what is
// behind them up to `width` zero. `whole`: rows begin at 16 bytes. One block a row.
extern "C" __global__ void cross_entropy(bf16 *logits, float *losses, const u32 *targets, u32 cols, u32 width, u32 stride, float grad, u32 backward, u32 whole) {
    __shared__ float room[33];
    bf16 *row = logits + (u64)blockIdx.x * stride;
    const u32 target = targets[blockIdx.x];
    float most = -INFINITE, sum = 0.0f;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float x[8], top = most;
        get8(row + i, cols - i, whole && i + 8 <= cols, x);
#pragma unroll
        for (u32 j = 0; j < 8; j++)
            if (i + j < cols) top = fmaxf(top, x[j]);
        float added = 0.0f;
#pragma unroll
        for (u32 j = 0; j < 8; j++)
            if (i + j < cols) added += __expf(x[j] - top);
        sum = (most == -INFINITE ? 0.0f : sum * __expf(most - top)) + added;
        most = top;
    }
    const float all_most = block_max(most, room);
    const float all = block_sum(most == -INFINITE ? sum : sum * __expf(most - all_most), room);
    const float wanted = target < cols ? wide(row[target]) : 0.0f;
    // Every thread has read the target's logit before one writes its gradient.
    __syncthreads();
    if (threadIdx.x == 0) losses[blockIdx.x] = __logf(all) + (all_most - wanted);
    if (!backward) return;
    const float share = grad / all;
    for (u32 i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float x[8];
        get8(row + i, cols - i, whole && i + 8 <= cols, x);
#pragma unroll
        for (u32 j = 0; j < 8; j++) x[j] = __expf(x[j] - all_most) * share - (i + j == target ? grad : 0.0f);
        put8(row + i, cols - i, whole && i + 8 <= cols, x);
    }
    for (u32 i = cols + threadIdx.x; i < width; i += blockDim.x) row[i] = narrow(0.0f);
}

// to[cols, rows] = from[rows, cols]ᵀ. Grid: cols / 32, rows / 32. Block: 256, a tile of 32 by 32.
extern "C" __global__ void transpose(float *to, const float *from, u32 rows, u32 cols) {
    __shared__ float tile[32][33];
    const u32 x = threadIdx.x % 32, y = threadIdx.x / 32, row = blockIdx.y * 32, col = blockIdx.x * 32;
    for (u32 i = y; i < 32; i += 8)
        if (row + i < rows && col + x < cols) tile[i][x] = from[(u64)(row + i) * cols + col + x];
    __syncthreads();
    for (u32 i = y; i < 32; i += 8)
        if (col + i < cols && row + x < rows) to[(u64)(col + i) * rows + row + x] = tile[x][i];
}
