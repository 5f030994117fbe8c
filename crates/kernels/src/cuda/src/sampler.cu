// One id a row from fp32 logits, with its log-probability and the most likely ids. One block of 1024 threads a row.
//
// In this order: penalties, bias, mask; division by the temperature; top-k; top-p over what that left; min-p; a draw. Ids
// from `ids_end` on pad the table: they are not looked at. All filters keep whatever equals the last value kept. Masses are 40-bit fixed
// point, so that sums do not depend on an order: a row, its seed and its step give the same id in every batch.
// Log-probabilities are those of the model: of the logits as they came, at temperature 1.

#define THREADS 1024
#define TOP_MAX 20

struct Row {
    float temperature; // 0: the largest; below 0: the row is left out and gets NONE
    u32 top_k;         // 0: all
    float top_p;       // 1: all
    float min_p;       // 0: all
    u32 seed_low, seed_high, step;
    u32 top_count; // log-probabilities of the most likely ids: at most TOP_MAX
    float repetition, presence, frequency;
    u32 seen_from, seen_to; // of `pairs`: ids that were seen, and how often the answer has them; each id once
    u32 mask;               // row of `masks`, or NONE
    u32 bias_from, bias_to; // of `pairs`: ids, and what is added to their logits; each id once
    u32 feed;               // place in `drawn`, or NONE
};

// Larger floats have larger keys.
__device__ __forceinline__ u32 key_of(float x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 mass_of(float x, float top) { return (u64)(expf(x - top) * 1099511627776.0f); }

// Philox 4x32-10 (Salmon et al., 2011): key = seed, counter = (step, 0, 0, 0); the first two words.
__device__ __forceinline__ u64 philox(u32 seed_low, u32 seed_high, u32 step) {
    u32 c0 = step, c1 = 0, c2 = 0, c3 = 0, k0 = seed_low, k1 = seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        const u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (u64)c0 | ((u64)c1 << 32);
}

__device__ __forceinline__ u64 warp_sum64(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

// The largest (key, lower id first) below `bound`, packed as key << 32 | ~id; 0 where there is none.
__device__ u64 largest(const float *x, u32 count, u64 bound, u64 *room) {
    u64 best = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        const float value = x[i];
        const u64 packed = ((u64)key_of(value) << 32) | (u32)~i;
        if (value == value && value > -INFINITE && packed < bound && packed > best) best = packed;
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        const u64 other = __shfl_xor_sync(FULL, best, step);
        best = other > best ? other : best;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = best;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) best = room[w] > best ? room[w] : best;
    return best;
}

__device__ u64 block_sum64(u64 x, u64 *room) {
    x = warp_sum64(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
    __syncthreads();
    u64 all = 0;
    for (int w = 0; w < THREADS / 32; w++) all += room[w];
    return all;
}

// What values with keys from `lowest` on weigh together.
__device__ u64 mass_from(const float *x, u32 count, float top, u32 lowest, u64 *room) {
    u64 mass = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        if (key_of(x[i]) >= lowest) mass += mass_of(x[i], top);
    return block_sum64(mass, room);
}

// The largest key so that values with it or a larger one weigh at least `wanted` together: one each, or their mass.
// Only keys from `lowest` on count; they must weigh that much. `bins`: 256 words; `found`: 2.
template <bool MASS>
__device__ u32 select_key(const float *x, u32 count, float top, u32 lowest, u64 wanted, u64 *bins, u64 *found) {
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        for (u32 base = 0; base < count; base += THREADS) {
            const u32 i = base + threadIdx.x;
            const float value = i < count ? x[i] : -INFINITE;
            const u32 key = key_of(value);
            const bool counts = i < count && key >= lowest && (shift == 24 || (key >> (shift + 8)) == (prefix >> (shift + 8)));
            const u32 bin = (key >> shift) & 255;
            if (MASS) {
                const u64 mass = counts ? mass_of(value, top) : 0;
                if (mass) atomicAdd(&bins[bin], mass);
            } else {
                // Most values share a few bins: one addition a bin and warp.
                const u32 peers = __match_any_sync(FULL, counts ? bin : 256u);
                if (counts && (__ffs(peers) - 1) == (threadIdx.x & 31)) atomicAdd(&bins[bin], (u64)__popc(peers));
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const u32 lane = threadIdx.x;
            u64 own = 0;
            for (u32 j = 0; j < 8; j++) own += bins[255 - lane * 8 - j];
            u64 upto = own;
            for (u32 step = 1; step < 32; step <<= 1) {
                const u64 other = __shfl_up_sync(FULL, upto, step);
                if (lane >= step) upto += other;
            }
            u64 before = upto - own;
            if (before < wanted && upto >= wanted)
                for (u32 j = 0; j < 8; j++) {
                    const u32 bin = 255 - lane * 8 - j;
                    if (before + bins[bin] >= wanted) {
                        found[0] = bin;
                        found[1] = before;
                        break;
                    }
                    before += bins[bin];
                }
        }
        __syncthreads();
        prefix |= (u32)found[0] << shift;
        wanted -= found[1];
    }
    return prefix;
}

// The id at `target` when the masses of the kept are laid end to end in the order of ids. A warp sums a range of ids; the
// warp whose range holds the target walks through it.
__device__ void walk(const float *x, u32 count, float top, u32 lowest, u64 target, u64 *room, u32 *answer) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 each = (count + THREADS / 32 - 1) / (THREADS / 32);
    const u32 from = warp * each, to = min(from + each, count);
    u64 mass = 0;
    for (u32 i = from + lane; i < to; i += 32)
        if (key_of(x[i]) >= lowest) mass += mass_of(x[i], top);
    mass = warp_sum64(mass);
    __syncthreads();
    if (lane == 0) room[warp] = mass;
    __syncthreads();
    u64 before = 0;
    for (u32 w = 0; w < warp; w++) before += room[w];
    if (target < before || target >= before + mass) return;
    for (u32 base = from; base < to; base += 32) {
        const u32 i = base + lane;
        const u64 own = i < to && key_of(x[i]) >= lowest ? mass_of(x[i], top) : 0;
        u64 upto = own;
        for (u32 step = 1; step < 32; step <<= 1) {
            const u64 other = __shfl_up_sync(FULL, upto, step);
            if (lane >= step) upto += other;
        }
        if (own && target >= before + upto - own && target < before + upto) *answer = i;
        before += __shfl_sync(FULL, upto, 31);
        if (target < before) return;
    }
}

// logits, work: [rows, columns]; masks: [.., (columns + 31) / 32] bits, 1 = allowed; pairs: [..] of an id and a value;
// top_ids, top_logprobs: [rows, TOP_MAX]. A row of which no id can be drawn, or with NaN, gets NONE.
extern "C" __global__ void __launch_bounds__(THREADS) sample(
    u32 *ids, float *logprobs, u32 *top_ids, float *top_logprobs, u32 *drawn, float *work, const float *logits, const Row *rows,
    const u32 *masks, const uint2 *pairs, u32 columns, u32 ids_end) {
    __shared__ float room[33];
    __shared__ u64 room64[THREADS / 32];
    __shared__ u64 bins[256], found[2];
    __shared__ u32 answer;
    const Row row = rows[blockIdx.x];
    const float *raw = logits + (u64)blockIdx.x * columns;
    float *x = work + (u64)blockIdx.x * columns;
    if (row.temperature < 0.0f) {
        if (threadIdx.x == 0) ids[blockIdx.x] = NONE;
        return;
    }

    // What the model said.
    float top = -INFINITE, nans = 0.0f;
    for (u32 i = threadIdx.x; i < ids_end; i += THREADS) {
        const float value = raw[i];
        top = fmaxf(top, value);
        if (value != value) nans += 1.0f;
        x[i] = value;
    }
    top = block_max(top, room);
    nans = block_sum(nans, room);
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < ids_end; i += THREADS) sum += expf(raw[i] - top);
    const float lse = top + logf(block_sum(sum, room));

    // What may be drawn. Every sum above ended with a barrier: x is written.
    for (u32 i = row.seen_from + threadIdx.x; i < row.seen_to; i += THREADS) {
        const uint2 seen = pairs[i];
        if (seen.x >= ids_end) continue;
        float value = x[seen.x];
        value = value > 0.0f ? value / row.repetition : value * row.repetition;
        value -= row.frequency * (float)seen.y;
        if (seen.y) value -= row.presence;
        x[seen.x] = value;
    }
    __syncthreads();
    for (u32 i = row.bias_from + threadIdx.x; i < row.bias_to; i += THREADS)
        if (pairs[i].x < ids_end) x[pairs[i].x] += __uint_as_float(pairs[i].y);
    __syncthreads();
    const u32 words = (columns + 31) / 32;
    const float inverse = row.temperature > 0.0f ? 1.0f / row.temperature : 1.0f;
    u64 candidates = 0;
    for (u32 i = threadIdx.x; i < ids_end; i += THREADS) {
        const bool allowed = row.mask == NONE || (masks[(u64)row.mask * words + i / 32] >> (i % 32)) & 1;
        const float value = allowed ? x[i] * inverse : -INFINITE;
        x[i] = value;
        candidates += value > -INFINITE;
    }
    __syncthreads();
    const u64 best = largest(x, ids_end, ~0ull, room64);
    candidates = block_sum64(candidates, room64);
    if (threadIdx.x == 0) answer = best && nans == 0.0f && top < INFINITE ? ~(u32)best : NONE;
    __syncthreads();

    if (row.temperature > 0.0f && answer != NONE) {
        const float most = x[answer];
        u32 lowest = key_of(-INFINITE) + 1;
        if (row.top_k > 0 && row.top_k < candidates)
            lowest = select_key<false>(x, ids_end, most, lowest, row.top_k, bins, found);
        u64 total = mass_from(x, ids_end, most, lowest, room64);
        if (row.top_p < 1.0f || row.min_p > 0.0f) {
            u64 wanted = (u64)((double)total * (double)row.top_p);
            wanted = wanted < 1 ? 1 : wanted > total ? total : wanted;
            if (row.top_p < 1.0f) lowest = select_key<true>(x, ids_end, most, lowest, wanted, bins, found);
            if (row.min_p > 0.0f) lowest = max(lowest, key_of(most + logf(row.min_p)));
            total = mass_from(x, ids_end, most, lowest, room64);
        }
        const u64 target = __umul64hi(philox(row.seed_low, row.seed_high, row.step), total);
        __syncthreads();
        walk(x, ids_end, most, lowest, target, room64, &answer);
        __syncthreads();
    }

    const u32 id = answer;
    if (threadIdx.x == 0) {
        ids[blockIdx.x] = id;
        logprobs[blockIdx.x] = id == NONE ? 0.0f : raw[id] - lse;
        if (row.feed != NONE) drawn[row.feed] = id;
    }
    u64 bound = ~0ull;
    for (u32 n = 0; n < min(row.top_count, (u32)TOP_MAX); n++) {
        bound = largest(raw, ids_end, bound, room64);
        if (threadIdx.x == 0) {
            const u32 at = ~(u32)bound;
            top_ids[blockIdx.x * TOP_MAX + n] = bound ? at : NONE;
            top_logprobs[blockIdx.x * TOP_MAX + n] = bound ? raw[at] - lse : -INFINITE;
        }
    }
}
