// The block tables of a step, from lists that lie one behind the other: tables[row, i] = blocks[starts[row] + i], for the
// starts[row + 1] - starts[row] blocks of the row. One block a row.
extern "C" __global__ void spread_tables(u32 *tables, const u32 *starts, const u32 *blocks, u32 table_blocks) {
    const u32 from = starts[blockIdx.x], count = min(starts[blockIdx.x + 1] - from, table_blocks);
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) tables[(u64)blockIdx.x * table_blocks + i] = blocks[from + i];
}
