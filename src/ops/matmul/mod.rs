//! Matrix products in f32, f64 and bf16, the linear layer, and packed weights for decoding.

pub mod bf16;
pub mod epilogue;
pub mod gemm;
pub mod linear;
pub mod linear_activated;
pub mod linear_on_device;
pub mod matrix;
pub mod packed;
mod packed_kernel;

pub use linear::{linear, linear_in, matmul_weight_dtype, rounds_to_bf16};
pub use linear_activated::linear_activated;
