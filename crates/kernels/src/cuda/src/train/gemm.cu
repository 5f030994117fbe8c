// Training: products that cuBLASLt does not make: of odd strides, or of operands of two types. Slow, and right.

// Element (i, p) of a at i * a_row + p * a_col, element (p, j) of b at p * b_row + j * b_col. *_wide: f32, else bf16.
__device__ __forceinline__ float element(const void *p, u32 is_wide, u64 at) {
    return is_wide ? ((const float *)p)[at] : wide(((const bf16 *)p)[at]);
}

// to[m, n] = scale * a[m, k] * b[k, n], or is added. Block: 256, as 16 by 16; grid: n / 16, m / 16.
extern "C" __global__ void __launch_bounds__(256) gemm(void *to, const void *a, const void *b, u32 m, u32 n, u32 k, u32 stride, u32 a_row, u32 a_col, u32 b_row, u32 b_col, u32 to_wide, u32 a_wide, u32 b_wide, u32 add, float scale) {
    __shared__ float left[16][17], right[16][17];
    const u32 x = threadIdx.x & 15, y = threadIdx.x >> 4;
    const u32 i = blockIdx.y * 16 + y, j = blockIdx.x * 16 + x;
    float sum = 0.0f;
    for (u32 start = 0; start < k; start += 16) {
        left[y][x] = i < m && start + x < k ? element(a, a_wide, (u64)i * a_row + (u64)(start + x) * a_col) : 0.0f;
        right[y][x] = start + y < k && j < n ? element(b, b_wide, (u64)(start + y) * b_row + (u64)j * b_col) : 0.0f;
        __syncthreads();
#pragma unroll
        for (int p = 0; p < 16; p++) sum += left[y][p] * right[p][x];
        __syncthreads();
    }
    if (i >= m || j >= n) return;
    const u64 at = (u64)i * stride + j;
    sum *= scale;
    if (add) sum += element(to, to_wide, at);
    if (to_wide)
        ((float *)to)[at] = sum;
    else
        ((bf16 *)to)[at] = narrow(sum);
}
