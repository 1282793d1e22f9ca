// The kernels as a library for tests: what emulator.rs compiles and calls.

#include "kernels.cu"
#include "faulty.cu"

namespace {

#define KERNEL(name) {#name, emulator::kernel_of(name)}

const std::map<std::string, emulator::Kernel> &kernels() {
    static const std::map<std::string, emulator::Kernel> kernels{
        KERNEL(adamw_f32),
        KERNEL(bias_gelu_backward_bf16_bf16), KERNEL(bias_gelu_backward_bf16_f32), KERNEL(bias_gelu_backward_f32_f32),
        KERNEL(bias_gelu_forward_bf16_bf16), KERNEL(bias_gelu_forward_bf16_f32), KERNEL(bias_gelu_forward_f32_f32),
        KERNEL(column_sums_bf16), KERNEL(column_sums_f32), KERNEL(cross_entropy_backward_bf16),
        KERNEL(cross_entropy_backward_f32), KERNEL(cross_entropy_forward_bf16), KERNEL(cross_entropy_forward_f32),
        KERNEL(cross_entropy_total), KERNEL(embedding_backward_bf16),
        KERNEL(embedding_backward_f32), KERNEL(embedding_forward_bf16), KERNEL(embedding_forward_f32),
        KERNEL(layer_norm_backward_bf16), KERNEL(layer_norm_backward_f32), KERNEL(layer_norm_forward_bf16),
        KERNEL(layer_norm_forward_f32), KERNEL(softmax_backward_bf16), KERNEL(softmax_backward_f32),
        KERNEL(softmax_forward_bf16), KERNEL(softmax_forward_f32),
        // Of faulty.cu.
        KERNEL(faulty_barrier), KERNEL(faulty_blocks), KERNEL(faulty_global), KERNEL(faulty_index),
        KERNEL(faulty_overrun), KERNEL(faulty_read), KERNEL(faulty_shared), KERNEL(faulty_shuffle),
        KERNEL(faulty_unwritten), KERNEL(reversed),
    };
    return kernels;
}

} // namespace

// Runs a kernel in one order (see emulator::Order). sizes: the bytes of each argument. Returns what went wrong, or null; the
// text is valid until the next call of this thread.
extern "C" const char *vilg_emulate(const char *name, unsigned grid_x, unsigned grid_y, unsigned threads,
                                    unsigned dynamic_bytes, void *const *arguments, const std::size_t *sizes,
                                    std::size_t count, std::uint64_t order) {
    static thread_local std::string error;
    auto kernel = kernels().find(name);
    if (kernel == kernels().end()) {
        error = "there is no such kernel";
        return error.c_str();
    }
    std::vector<std::pair<void *, std::size_t>> given;
    for (std::size_t i = 0; i < count; i++) given.emplace_back(arguments[i], sizes[i]);
    error = emulator::run(kernel->second, emulator::Index{grid_x, grid_y, 1}, threads, dynamic_bytes, given, order);
    return error.empty() ? nullptr : error.c_str();
}
