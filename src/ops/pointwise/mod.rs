//! Elementwise functions, and functions of rows.

pub mod activation;
pub mod bf16_pairs;
pub mod cross_entropy;
pub mod cross_entropy_cuda;
pub mod gelu;
pub mod gelu_cuda;
pub mod softmax;

pub use activation::activation;
pub use cross_entropy::cross_entropy;
pub use gelu::gelu;
