// Training: the optimizer, and what a norm of gradients is made of.

struct Step {
    float beta1, beta2, rest1, rest2, eps, keep, rate, root, scale;
};

__device__ __forceinline__ void update(const Step s, float &value, float grad, float &m, float &v) {
    grad *= s.scale;
    m = m * s.beta1 + grad * s.rest1;
    v = v * s.beta2 + grad * grad * s.rest2;
    value = value * s.keep - s.rate * m / (sqrtf(v) / s.root + s.eps);
}

extern "C" __global__ void adamw(float *value, const float *grad, float *m, float *v, u64 count, const float beta1, float beta2, float rest1, float rest2, float eps, float keep, float rate, float root, float scale) {
    const Step step = {beta1, beta2, rest1, rest2, eps, keep, rate, root, scale};
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
        float x = value[i], a = m[i], b = v[i];
        update(step, x, grad[i], a, b);
        value[i] = x;
        m[i] = a;
        v[i] = b;
    }
}

// The code nearest to x among 255 ascending middles; of two, the lower.
__device__ __forceinline__ unsigned char code_of(const float *middles, float x) {
    u32 low = 0;
#pragma unroll
    for (u32 step = 128; step > 0; step >>= 1)
        if (low + step <= 255 && middles[low + step - 1] < x) low += step;
    return (unsigned char)low;
}

// maps: values of the signed map [256], its middles [256], then of the unsigned. One block of 256 a block of elements.
extern "C" __global__ void adamw8(float *value, const float *grad, unsigned char *m_codes, unsigned char *v_codes, float *m_max, float *v_max, const float *maps, u64 count, float beta1, float beta2, float rest1, float rest2, float eps, float keep, float rate, float root, float scale) {
    __shared__ float map[1024];
    __shared__ float room[33];
    const Step step = {beta1, beta2, rest1, rest2, eps, keep, rate, root, scale};
    for (u32 i = threadIdx.x; i < 1024; i += 256) map[i] = maps[i];
    const float m_scale = m_max[blockIdx.x], v_scale = v_max[blockIdx.x];
    __syncthreads();
    const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    float m = 0.0f, v = 0.0f;
    if (i < count) {
        m = map[m_codes[i]] * m_scale;
        v = map[512 + v_codes[i]] * v_scale;
        float x = value[i];
        update(step, x, grad[i], m, v);
        value[i] = x;
    }
    const float m_most = block_max(fabsf(m), room), v_most = block_max(v, room);
    if (i < count) {
        m_codes[i] = code_of(map + 256, m_most > 0.0f ? m / m_most : 0.0f);
        v_codes[i] = code_of(map + 768, v_most > 0.0f ? v / v_most : 0.0f);
    }
    if (threadIdx.x == 0) {
        m_max[blockIdx.x] = m_most;
        v_max[blockIdx.x] = v_most;
    }
}

// parts[block] = sum of squares of every gridDim'th stretch. Block: 256.
extern "C" __global__ void sum_squares(double *parts, const float *x, u64 count) {
    __shared__ double room[8];
    double sum = 0.0;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < count; i += (u64)gridDim.x * 256) sum += (double)x[i] * (double)x[i];
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(FULL, sum, step);
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double all = 0.0;
        for (int i = 0; i < 8; i++) all += room[i];
        parts[blockIdx.x] = all;
    }
}

// Masters to what is multiplied.
extern "C" __global__ void round_to(bf16 *to, const float *from, u64 count) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) to[i] = narrow(from[i]);
}
