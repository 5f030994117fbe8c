// out[row, i] = silu(x[row, i]) * x[row, width + i]; 8 values a thread.
extern "C" __global__ void silu_mul(bf16 *out, const bf16 *x, u32 rows, u32 width) {
    const u64 item = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (item >= (u64)rows * width) return;
    const u64 row = item / width, column = item % width;
    float gate[8], up[8];
    wide8(*(const uint4 *)(x + row * 2 * width + column), gate);
    wide8(*(const uint4 *)(x + row * 2 * width + width + column), up);
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * up[j];
    *(uint4 *)(out + item) = narrow8(gate);
}
