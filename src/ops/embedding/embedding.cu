// Rows of a table (rows, hidden) by ids (n), and the gradient of the table.
//
// The trick: the gradient is gathered, not scattered. A block has one row of the table, searches the ids for it, 32 with one
// ballot, and adds what it finds in the order of the ids: no atomics, no sorting, and no pass that fills the table with zeros
// first. (candle's `index_add` has one thread for each column, which walks through all ids.)
//
// Bytes an element, of s bytes: forward 2s. Backward s for dy and s for the table, and 4 for each id, row of the table and 1024
// columns, mostly from the L2 cache.

#include "../cuda/device.cuh"

constexpr int COLUMNS = 4; // of a thread

// Blocks (n, hidden / block size). An id outside of the table gives no numbers.
template <class T>
__device__ void embedding_forward(const T *table, const unsigned *ids, T *y, Size rows, Size hidden) {
    Size c = static_cast<Size>(blockIdx.y) * blockDim.x + threadIdx.x, id = ids[blockIdx.x];
    if (c >= hidden) return;
    float value = id < rows ? to_float(table[id * hidden + c]) : __uint_as_float(0x7fc00000u);
    store(y + blockIdx.x * hidden + c, value);
}

// Blocks (rows of the table, hidden / (COLUMNS · block size)).
template <class T>
__device__ void embedding_backward(const unsigned *ids, const T *dy, T *dtable, Size n, Size hidden) {
    SHARED(unsigned, found, 2 * WARP); // which ids of a part are the row's; one part is read while the next is written
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, half = 0;
    Size first = static_cast<Size>(blockIdx.y) * COLUMNS * blockDim.x + threadIdx.x;
    float sums[COLUMNS] = {};
    for (Size part = 0; part < n; part += blockDim.x, half = WARP - half) {
        Size i = part + threadIdx.x;
        unsigned bits = __ballot_sync(ALL_LANES, i < n && ids[i] == blockIdx.x);
        if (lane == 0) found[half + warp] = bits;
        __syncthreads();
        for (int w = 0; w < warps; w++) {
            for (unsigned left = found[half + w]; left; left &= left - 1) {
                const T *row = dy + (part + w * WARP + __ffs(static_cast<int>(left)) - 1) * hidden;
                for (int k = 0; k < COLUMNS; k++) {
                    Size c = first + k * blockDim.x;
                    if (c < hidden) sums[k] += to_float(row[c]);
                }
            }
        }
    }
    for (int k = 0; k < COLUMNS; k++) {
        Size c = first + k * blockDim.x;
        if (c < hidden) store(dtable + blockIdx.x * hidden + c, sums[k]);
    }
}

extern "C" __global__ void embedding_forward_f32(const float *table, const unsigned *ids, float *y, Size rows, Size hidden) {
    embedding_forward(table, ids, y, rows, hidden);
}

extern "C" __global__ void embedding_forward_bf16(const Bf16 *table, const unsigned *ids, Bf16 *y, Size rows, Size hidden) {
    embedding_forward(table, ids, y, rows, hidden);
}

extern "C" __global__ void embedding_backward_f32(const unsigned *ids, const float *dy, float *dtable, Size n, Size hidden) {
    embedding_backward(ids, dy, dtable, n, hidden);
}

extern "C" __global__ void embedding_backward_bf16(const unsigned *ids, const Bf16 *dy, Bf16 *dtable, Size n, Size hidden) {
    embedding_backward(ids, dy, dtable, n, hidden);
}
