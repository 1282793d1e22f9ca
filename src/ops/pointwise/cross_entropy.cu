// Σᵢ weightᵢ · (log Σⱼ e^logitᵢⱼ − logitᵢ,targetᵢ) of logits (rows, vocabulary).
//
// The trick: a block has a row and reads it once for the largest logit and the sum of exponentials. Of each row only these
// two f32 are kept; no probabilities are stored. The gradient comes from the logits and these two, and its factor is read on the
// device, so that the host need not wait. Rows of weight 0 are not read at all.
//
// Bytes a logit, of s bytes: forward s (stock ops: 6s), backward 2s.

#include "../cuda/device.cuh"

// One block a row. statistics (rows, 2): the largest logit and 1 / Σ exp(logit − largest); losses (rows), with their weights.
// The loss of a target outside of the vocabulary is not a number.
template <class T>
__device__ void cross_entropy_forward(const T *logits, const unsigned *targets, const float *weights, float *statistics,
                                      float *losses, Size vocabulary) {
    Size row = blockIdx.x;
    float weight = weights[row];
    if (weight == 0.0f) { // the whole block
        if (threadIdx.x == 0) losses[row] = statistics[2 * row] = statistics[2 * row + 1] = 0.0f;
        return;
    }
    logits += row * vocabulary;
    Exponentials part;
    for (Size c = threadIdx.x; c < vocabulary; c += blockDim.x) part.add(to_float(logits[c]));
    float largest = block_max(part.largest, LOWEST);
    float sum = block_sum(part.sum * expf(part.largest - largest));
    if (threadIdx.x != 0) return;
    Size target = targets[row];
    float logit = target < vocabulary ? to_float(logits[target]) : __uint_as_float(0x7fc00000u);
    losses[row] = weight * (logf(sum) - (logit - largest));
    statistics[2 * row] = largest;
    statistics[2 * row + 1] = 1.0f / sum;
}

// The sum of the losses, by one block.
extern "C" __global__ void cross_entropy_total(const float *losses, float *total, Size rows) {
    float sum = 0.0f;
    for (Size row = threadIdx.x; row < rows; row += blockDim.x) sum += losses[row];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

// dlogits = gradient · weight · (softmax − one-hot target). One block a row.
template <class T>
__device__ void cross_entropy_backward(const T *logits, const unsigned *targets, const float *weights,
                                       const float *statistics, const float *gradient, T *dlogits, Size vocabulary) {
    Size row = blockIdx.x;
    logits += row * vocabulary;
    dlogits += row * vocabulary;
    float weight = weights[row];
    if (weight == 0.0f) {
        for (Size c = threadIdx.x; c < vocabulary; c += blockDim.x) store(dlogits + c, 0.0f);
        return;
    }
    Size target = targets[row];
    float largest = statistics[2 * row], inverse = statistics[2 * row + 1], scale = *gradient * weight;
    for (Size c = threadIdx.x; c < vocabulary; c += blockDim.x) {
        float probability = expf(to_float(logits[c]) - largest) * inverse;
        store(dlogits + c, scale * (c == target ? probability - 1.0f : probability));
    }
}

extern "C" __global__ void cross_entropy_forward_f32(const float *logits, const unsigned *targets, const float *weights,
                                                     float *statistics, float *losses, Size vocabulary) {
    cross_entropy_forward(logits, targets, weights, statistics, losses, vocabulary);
}

extern "C" __global__ void cross_entropy_forward_bf16(const Bf16 *logits, const unsigned *targets, const float *weights,
                                                      float *statistics, float *losses, Size vocabulary) {
    cross_entropy_forward(logits, targets, weights, statistics, losses, vocabulary);
}

extern "C" __global__ void cross_entropy_backward_f32(const float *logits, const unsigned *targets, const float *weights,
                                                      const float *statistics, const float *gradient, float *dlogits,
                                                      Size vocabulary) {
    cross_entropy_backward(logits, targets, weights, statistics, gradient, dlogits, vocabulary);
}

extern "C" __global__ void cross_entropy_backward_bf16(const Bf16 *logits, const unsigned *targets, const float *weights,
                                                       const float *statistics, const float *gradient, Bf16 *dlogits,
                                                       Size vocabulary) {
    cross_entropy_backward(logits, targets, weights, statistics, gradient, dlogits, vocabulary);
}
