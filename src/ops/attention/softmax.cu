// Softmax of scores plus bias over rows of scores (samples, heads, queries, keys), for blockwise attention. A row in which
// the bias hides every key becomes zero.
//
// The trick: rows are short (a text and a few rows or one column of codes), so a warp has a row and needs no barrier. Largest
// score and sum are found in one pass; the second pass finds the row in the L1 cache. Bias and hiding cost no pass of their own.
//
// Bytes a score, of s bytes: forward 2s (stock ops: 40 in f32), backward 3s. The bias is f32, the same for all heads, and
// mostly found in the L2 cache.

#include "../cuda/device.cuh"

// The bias of a row: bias (samples or 1, 1, `bias_rows`, keys), where `bias_rows` is the number of queries or 1. `bias_step`:
// rows from a sample's bias to the next one's, 0 if all samples have the same.
__device__ inline const float *bias_of(const float *bias, Size row, Size width, Size rows_per_sample, Size bias_rows,
                                       Size bias_step) {
    return bias + (row / rows_per_sample * bias_step + row % bias_rows) * width;
}

// One warp a row. A key is hidden where its bias is not above `hidden`; `bias` may be null.
template <class T>
__device__ void softmax_forward(const T *scores, const float *bias, T *y, Size rows, Size width, Size rows_per_sample,
                                Size bias_rows, Size bias_step, float hidden) {
    int lane = threadIdx.x % WARP;
    Size row = static_cast<Size>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return; // the whole warp
    const float *b = bias ? bias_of(bias, row, width, rows_per_sample, bias_rows, bias_step) : nullptr;
    scores += row * width;
    y += row * width;
    Exponentials part;
    float visible = b ? 0.0f : 1.0f;
    for (Size c = lane; c < width; c += WARP) {
        part.add(to_float(scores[c]) + (b ? b[c] : 0.0f));
        if (b && b[c] > hidden) visible = 1.0f;
    }
    float largest = warp_max(part.largest);
    float sum = warp_sum(part.sum * expf(part.largest - largest));
    float scale = warp_max(visible) / sum;
    for (Size c = lane; c < width; c += WARP)
        store(y + c, expf(to_float(scores[c]) + (b ? b[c] : 0.0f) - largest) * scale);
}

// dx = y · (dy − Σ y·dy). One warp a row.
template <class T>
__device__ void softmax_backward(const T *y, const T *dy, T *dx, Size rows, Size width) {
    int lane = threadIdx.x % WARP;
    Size row = static_cast<Size>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return; // the whole warp
    y += row * width;
    dy += row * width;
    dx += row * width;
    float sum = 0.0f;
    for (Size c = lane; c < width; c += WARP) sum += to_float(y[c]) * to_float(dy[c]);
    sum = warp_sum(sum);
    for (Size c = lane; c < width; c += WARP) store(dx + c, to_float(y[c]) * (to_float(dy[c]) - sum));
}

extern "C" __global__ void softmax_forward_f32(const float *scores, const float *bias, float *y, Size rows, Size width,
                                               Size rows_per_sample, Size bias_rows, Size bias_step, float hidden) {
    softmax_forward(scores, bias, y, rows, width, rows_per_sample, bias_rows, bias_step, hidden);
}

extern "C" __global__ void softmax_forward_bf16(const Bf16 *scores, const float *bias, Bf16 *y, Size rows, Size width,
                                                Size rows_per_sample, Size bias_rows, Size bias_step, float hidden) {
    softmax_forward(scores, bias, y, rows, width, rows_per_sample, bias_rows, bias_step, hidden);
}

extern "C" __global__ void softmax_backward_f32(const float *y, const float *dy, float *dx, Size rows, Size width) {
    softmax_backward(y, dy, dx, rows, width);
}

extern "C" __global__ void softmax_backward_bf16(const Bf16 *y, const Bf16 *dy, Bf16 *dx, Size rows, Size width) {
    softmax_backward(y, dy, dx, rows, width);
}
