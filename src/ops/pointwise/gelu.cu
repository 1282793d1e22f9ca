// y = gelu(x + bias) of x (rows, columns), the bias of a linear layer before its activation; without a bias, gelu(x).
//
// The trick: one pass instead of the eleven of stock ops (cast, bias, nine for GELU), and the backward pass computes x + bias
// again instead of keeping it. A thread has one column of several rows: neighbours read neighbours, the bias is
// read once, and the gradient of the bias is summed in a register; `column_sums` then adds the blocks in order. x may be
// stored in another type than y: products in bf16, the rest in f32.
//
// Bytes an element, of s bytes in x and t in y: forward s + t (stock ops, for a product in bf16 and f32 after it: 98), backward
// 2s + t.

#include "../cuda/device.cuh"

// σ(2u) with u = √(2/π) (x + 0.044715 x³), so that gelu(x) = x · σ(2u): the tanh approximation.
__device__ inline float gelu_gate(float x) {
    constexpr float LINEAR = -1.5957691216057308f, CUBIC = -0.071354816f;
    return 1.0f / (1.0f + expf(x * (LINEAR + CUBIC * x * x)));
}

// The derivative: s + x · s (1 − s) · 2u′.
__device__ inline float gelu_slope(float x) {
    constexpr float LINEAR = 1.5957691216057308f, CUBIC = 0.21406445f;
    float s = gelu_gate(x);
    return s + x * s * (1.0f - s) * (LINEAR + CUBIC * x * x);
}

// Blocks (columns / block size, rows / rows_per_block).
template <class X, class Y>
__device__ void bias_gelu_forward(const X *x, const Y *bias, Y *y, Size rows, Size columns, Size rows_per_block) {
    Size c = static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x, first = blockIdx.y * rows_per_block;
    if (c >= columns) return;
    float b = bias ? to_float(bias[c]) : 0.0f;
    for (Size r = first; r < first + rows_per_block && r < rows; r++) {
        float z = to_float(x[r * columns + c]) + b;
        store(y + r * columns + c, z * gelu_gate(z));
    }
}

// partial (blocks of rows, columns): the sums of dx over the rows of each block; null: there is no bias.
template <class X, class Y>
__device__ void bias_gelu_backward(const X *x, const Y *bias, const Y *dy, X *dx, float *partial, Size rows, Size columns,
                                   Size rows_per_block) {
    Size c = static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x, first = blockIdx.y * rows_per_block;
    if (c >= columns) return;
    float b = bias ? to_float(bias[c]) : 0.0f, sum = 0.0f;
    for (Size r = first; r < first + rows_per_block && r < rows; r++) {
        float d = to_float(dy[r * columns + c]) * gelu_slope(to_float(x[r * columns + c]) + b);
        store(dx + r * columns + c, d);
        sum += d;
    }
    if (partial) partial[blockIdx.y * columns + c] = sum;
}

extern "C" __global__ void bias_gelu_forward_f32_f32(const float *x, const float *bias, float *y, Size rows, Size columns,
                                                     Size rows_per_block) {
    bias_gelu_forward(x, bias, y, rows, columns, rows_per_block);
}

extern "C" __global__ void bias_gelu_forward_bf16_f32(const Bf16 *x, const float *bias, float *y, Size rows, Size columns,
                                                      Size rows_per_block) {
    bias_gelu_forward(x, bias, y, rows, columns, rows_per_block);
}

extern "C" __global__ void bias_gelu_forward_bf16_bf16(const Bf16 *x, const Bf16 *bias, Bf16 *y, Size rows, Size columns,
                                                       Size rows_per_block) {
    bias_gelu_forward(x, bias, y, rows, columns, rows_per_block);
}

extern "C" __global__ void bias_gelu_backward_f32_f32(const float *x, const float *bias, const float *dy, float *dx,
                                                      float *partial, Size rows, Size columns, Size rows_per_block) {
    bias_gelu_backward(x, bias, dy, dx, partial, rows, columns, rows_per_block);
}

extern "C" __global__ void bias_gelu_backward_bf16_f32(const Bf16 *x, const float *bias, const float *dy, Bf16 *dx,
                                                       float *partial, Size rows, Size columns, Size rows_per_block) {
    bias_gelu_backward(x, bias, dy, dx, partial, rows, columns, rows_per_block);
}

extern "C" __global__ void bias_gelu_backward_bf16_bf16(const Bf16 *x, const Bf16 *bias, const Bf16 *dy, Bf16 *dx,
                                                        float *partial, Size rows, Size columns, Size rows_per_block) {
    bias_gelu_backward(x, bias, dy, dx, partial, rows, columns, rows_per_block);
}
