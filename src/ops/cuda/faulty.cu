// Kernels with one fault each, and one without: the tests of the emulator must tell them apart. Never built for a GPU.

#include "device.cuh"

// to[i] = from[last - i] within each block, over shared memory: correct.
extern "C" __global__ void reversed(const float *from, float *to) {
    SHARED(float, row, 1024);
    row[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    to[blockIdx.x * blockDim.x + threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// The same without its barrier.
extern "C" __global__ void faulty_shared(const float *from, float *to) {
    SHARED(float, row, 1024);
    row[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
    to[blockIdx.x * blockDim.x + threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// The same over device memory, without a barrier: what shared memory cannot notice.
extern "C" __global__ void faulty_global(const float *from, float *to) {
    Size start = static_cast<Size>(blockIdx.x) * blockDim.x;
    to[start + threadIdx.x] = from[start + threadIdx.x];
    to[start + threadIdx.x] = to[start + blockDim.x - 1 - threadIdx.x];
}

// All blocks add to one element, which f32 rounds differently in each order.
extern "C" __global__ void faulty_blocks(const float *from, float *to) {
    if (blockIdx.x == 0 && threadIdx.x == 0)
        for (Size i = 1; i < gridDim.x * blockDim.x; i++) to[i] = 0.0f;
    if (threadIdx.x == 0) to[0] = blockIdx.x == 0 ? from[0] : to[0] + from[blockIdx.x * blockDim.x];
}

// A barrier that half of the threads reach.
extern "C" __global__ void faulty_barrier(const float *from, float *to) {
    if (threadIdx.x % 2 == 0) __syncthreads();
    to[blockIdx.x * blockDim.x + threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
}

// A shuffle that one lane does not reach.
extern "C" __global__ void faulty_shuffle(const float *from, float *to) {
    float x = from[blockIdx.x * blockDim.x + threadIdx.x];
    if (threadIdx.x != 7) x += __shfl_down_sync(ALL_LANES, x, 1);
    to[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

// An index outside of shared memory.
extern "C" __global__ void faulty_index(const float *from, float *to) {
    SHARED(float, row, 16);
    row[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    to[blockIdx.x * blockDim.x + threadIdx.x] = row[threadIdx.x];
}

// Writes one element behind the result.
extern "C" __global__ void faulty_overrun(const float *from, float *to) {
    Size i = static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x;
    to[i] = from[i];
    to[i + 1] = from[i];
}

// Reads one element behind the input.
extern "C" __global__ void faulty_read(const float *from, float *to) {
    Size i = static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x;
    to[i] = from[i + 1];
}

// Leaves one element as it was.
extern "C" __global__ void faulty_unwritten(const float *from, float *to) {
    Size i = static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i != 3) to[i] = from[i];
}
