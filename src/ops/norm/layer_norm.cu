// y = (x − mean) / sqrt(variance + eps) · weight + bias over rows of x (rows, channels).
//
// The trick: a block has a row, which stays in the L1 cache over the passes for mean, variance and result, so that device
// memory is read once. The forward pass saves nothing; the backward pass computes mean and variance again. A block of the
// backward pass has several rows and sums their gradients of weight and bias in shared memory, where each thread owns its
// channels; `column_sums` then adds the blocks in order.
//
// Weight and bias are f32 for every type of x, as parameters are.
//
// Bytes an element of x, of s bytes: forward 2s (stock ops: 12s), backward 3s, and 8 bytes for each channel and block.

#include "../cuda/device.cuh"

struct Moments {
    float mean, scale;
};

// Mean and 1 / standard deviation of a row, in all threads.
template <class T>
__device__ Moments moments(const T *x, Size channels, float eps) {
    float sum = 0.0f, squares = 0.0f;
    for (Size c = threadIdx.x; c < channels; c += blockDim.x) sum += to_float(x[c]);
    float mean = block_sum(sum) / channels;
    for (Size c = threadIdx.x; c < channels; c += blockDim.x) {
        float centred = to_float(x[c]) - mean;
        squares += centred * centred;
    }
    return {mean, 1.0f / sqrtf(block_sum(squares) / channels + eps)};
}

// One block a row.
template <class T>
__device__ void layer_norm_forward(const T *x, const float *weight, const float *bias, T *y, Size channels, float eps) {
    x += blockIdx.x * channels;
    y += blockIdx.x * channels;
    Moments row = moments(x, channels, eps);
    for (Size c = threadIdx.x; c < channels; c += blockDim.x)
        store(y + c, (to_float(x[c]) - row.mean) * row.scale * weight[c] + bias[c]);
}

// With x̂ the normalized row and g = dy·weight: dx = (g − mean(g) − x̂·mean(g·x̂)) / standard deviation. partial (blocks, 2,
// channels): the sums of dy·x̂ and dy over the rows of each block. Shared memory: 2 · channels floats.
template <class T>
__device__ void layer_norm_backward(const T *x, const float *weight, const T *dy, T *dx, float *partial, Size rows,
                                    Size channels, Size rows_per_block, float eps) {
    DYNAMIC_SHARED(float, sums);
    for (Size c = threadIdx.x; c < 2 * channels; c += blockDim.x) sums[c] = 0.0f;
    __syncthreads(); // the second half belongs to other threads than the first
    Size first = blockIdx.x * rows_per_block;
    for (Size r = first; r < first + rows_per_block && r < rows; r++) {
        const T *x_row = x + r * channels, *dy_row = dy + r * channels;
        Moments row = moments(x_row, channels, eps);
        float sum = 0.0f, slope = 0.0f;
        for (Size c = threadIdx.x; c < channels; c += blockDim.x) {
            float d = to_float(dy_row[c]), g = d * weight[c];
            float normed = (to_float(x_row[c]) - row.mean) * row.scale;
            sums[c] += d * normed;
            sums[channels + c] += d;
            sum += g;
            slope += g * normed;
        }
        sum = block_sum(sum) / channels;
        slope = block_sum(slope) / channels;
        for (Size c = threadIdx.x; c < channels; c += blockDim.x) {
            float g = to_float(dy_row[c]) * weight[c];
            float normed = (to_float(x_row[c]) - row.mean) * row.scale;
            store(dx + r * channels + c, (g - sum - normed * slope) * row.scale);
        }
    }
    __syncthreads();
    for (Size c = threadIdx.x; c < 2 * channels; c += blockDim.x) partial[blockIdx.x * 2 * channels + c] = sums[c];
}

extern "C" __global__ void layer_norm_forward_f32(const float *x, const float *weight, const float *bias, float *y,
                                                  Size channels, float eps) {
    layer_norm_forward(x, weight, bias, y, channels, eps);
}

extern "C" __global__ void layer_norm_forward_bf16(const Bf16 *x, const float *weight, const float *bias, Bf16 *y,
                                                   Size channels, float eps) {
    layer_norm_forward(x, weight, bias, y, channels, eps);
}

extern "C" __global__ void layer_norm_backward_f32(const float *x, const float *weight, const float *dy, float *dx,
                                                   float *partial, Size rows, Size channels, Size rows_per_block,
                                                   float eps) {
    layer_norm_backward(x, weight, dy, dx, partial, rows, channels, rows_per_block, eps);
}

extern "C" __global__ void layer_norm_backward_bf16(const Bf16 *x, const float *weight, const Bf16 *dy, Bf16 *dx,
                                                    float *partial, Size rows, Size channels, Size rows_per_block,
                                                    float eps) {
    layer_norm_backward(x, weight, dy, dx, partial, rows, channels, rows_per_block, eps);
}
