// What the kernels share: element types, reductions over a warp and a block, sums of columns. One source compiles as CUDA
// and, for the tests, as C++ under emulator.hpp.
//
// Arithmetic is f32 for every element type. Sums run in an order that depends on the sizes only: no atomics, and the same
// bits in every run.
#pragma once

#ifdef __CUDACC__
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#else
#include "emulator.hpp"
#endif

// Sizes and indices: a tensor may have more than 2^31 elements.
typedef long long Size;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Storage of bf16, the upper half of an f32. The toolkit's type would need its headers, and has none on a CPU.
struct Bf16 {
    unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void store(float *to, float x) { *to = x; }

// Rounds to nearest, ties to even, as PyTorch and the crate `half`.
__device__ inline void store(Bf16 *to, float x) {
    unsigned bits = __float_as_uint(x);
    bits = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    to->bits = static_cast<unsigned short>(bits >> 16);
}

// The sum over a warp, the same bits in all lanes: in each step two lanes add the same two numbers.
__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over a block of whole warps, at most 1024 threads, in all threads.
__device__ inline float block_sum(float x) {
    SHARED(float, parts, WARP);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (warps == 1) return x;
    __syncthreads(); // the parts of an earlier call have been read
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? static_cast<float>(parts[lane]) : 0.0f);
}

// The largest number of a block, in all threads; at least `lowest`.
__device__ inline float block_max(float x, float lowest) {
    SHARED(float, parts, WARP);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (warps == 1) return x;
    __syncthreads(); // the parts of an earlier call have been read
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? static_cast<float>(parts[lane]) : lowest);
}

// Below every f32 that a kernel compares: the difference of two of them is finite, unlike that of infinities.
constexpr float LOWEST = -3.0e38f;

// Largest element and Σ exp(x − largest) of a part of a row, in one pass (Milakov and Gimelshein, arXiv 1805.02867): the sum
// is scaled anew where a larger element occurs.
struct Exponentials {
    float largest = LOWEST, sum = 0.0f;

    __device__ void add(float x) {
        if (x > largest) {
            sum *= expf(largest - x);
            largest = x;
        }
        sum += expf(x - largest);
    }
};

// to (columns) = the sums of the columns of from (rows, columns), for blocks of whole warps: a block has 32 columns, and its
// w-th warp sums the rows w, w + warps, .. Reads 4 bytes an element.
template <class T>
__device__ void column_sums(const float *from, T *to, Size rows, Size columns) {
    SHARED(float, sums, WARP * (WARP + 1)); // rows of 33: a column is in 32 banks
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Size column = static_cast<Size>(blockIdx.x) * WARP + lane;
    float sum = 0.0f;
    if (column < columns)
        for (Size row = warp; row < rows; row += warps) sum += from[row * columns + column];
    sums[warp * (WARP + 1) + lane] = sum;
    __syncthreads();
    for (int i = warp; i < WARP; i += warps) {
        float total = warp_sum(lane < warps ? static_cast<float>(sums[lane * (WARP + 1) + i]) : 0.0f);
        Size column = static_cast<Size>(blockIdx.x) * WARP + i;
        if (lane == 0 && column < columns) store(to + column, total);
    }
}

extern "C" __global__ void column_sums_f32(const float *from, float *to, Size rows, Size columns) {
    column_sums(from, to, rows, columns);
}

extern "C" __global__ void column_sums_bf16(const float *from, Bf16 *to, Size rows, Size columns) {
    column_sums(from, to, rows, columns);
}
