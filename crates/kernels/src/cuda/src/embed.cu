// Rows of the embedding table. One block a token.
// An id with its highest bit set is the place in `drawn` where the sampler left the id of the step before.
extern "C" __global__ void embed(bf16 *out, const u32 *ids, const u32 *drawn, const bf16 *table, u32 hidden, u32 vocab, u32 places) {
    const u32 token = blockIdx.x;
    u32 id = ids[token];
    if (id & 0x80000000u) {
        const u32 place = id & 0x7fffffffu;
        id = place < places ? drawn[place] : NONE;
    }
    const uint4 *from = (const uint4 *)(table + (u64)id * hidden);
    uint4 *to = (uint4 *)(out + (u64)token * hidden);
    for (u32 i = threadIdx.x; i < hidden / 8; i += blockDim.x) to[i] = id < vocab ? from[i] : make_uint4(0, 0, 0, 0);
}

// out[i] = table[rows[i]]: the rows of which logits are wanted. One block a row; NONE gives zeros.
extern "C" __global__ void gather_rows(bf16 *out, const u32 *rows, const bf16 *table, u32 hidden, u32 count) {
    const u32 row = rows[blockIdx.x];
    const uint4 *from = (const uint4 *)(table + (u64)row * hidden);
    uint4 *to = (uint4 *)(out + (u64)blockIdx.x * hidden);
    for (u32 i = threadIdx.x; i < hidden / 8; i += blockDim.x) to[i] = row < count ? from[i] : make_uint4(0, 0, 0, 0);
}
