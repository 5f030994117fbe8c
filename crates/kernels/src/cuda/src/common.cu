// What every kernel file begins with. No header of the toolkit is needed: bf16 is 16 bits of a float, read and rounded
// with integer operations, and what C++ lacks is inline PTX.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define NONE 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)
#define FULL 0xffffffffu
// Tokens of one block of the KV cache.
#define BLOCK_TOKENS 16

__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float((u32)x << 16); }

// To the nearest bf16, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 narrow(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40u);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The same of two at once, by the processor's own instruction; NaN becomes its one NaN.
__device__ __forceinline__ u32 narrow2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void wide8(const uint4 x, float *out) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 narrow8(const float *x) {
    return make_uint4(narrow2(x[0], x[1]), narrow2(x[2], x[3]), narrow2(x[4], x[5]), narrow2(x[6], x[7]));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

// Sum over a block of whole warps, the same in every thread and every run. `room` holds 33 floats.
__device__ __forceinline__ float block_sum(float x, float *room) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) room[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float all = warp_sum(lane < warps ? room[lane] : 0.0f);
        if (lane == 0) room[32] = all;
    }
    __syncthreads();
    return room[32];
}

__device__ __forceinline__ float block_max(float x, float *room) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) room[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float all = warp_max(lane < warps ? room[lane] : -INFINITE);
        if (lane == 0) room[32] = all;
    }
    __syncthreads();
    return room[32];
}

// D = A (16 x 16, by rows) * B (16 x 8, by columns) + D, bf16 in, fp32 sums.
__device__ __forceinline__ void mma(float *d, const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const bf16 *at) {
    u64 wide_address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(wide_address) : "l"(at));
    return (u32)wide_address;
}

// Two 8 x 8 tiles of 16-bit values, each transposed; lanes 0-15 give the addresses of the rows.
__device__ __forceinline__ void load_transposed(u32 *d, const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1]) : "r"(shared_address(row)) : "memory");
}

// Four such tiles; lanes 8 i to 8 i + 7 give the rows of tile i.
__device__ __forceinline__ void load_transposed4(u32 *d, const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(row)) : "memory");
}

// Four such tiles as they lie.
__device__ __forceinline__ void load4(u32 *d, const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(row)) : "memory");
}
