//! Kernels that candle lacks or runs slowly: forward and backward over slices, wrapped as candle ops, in one folder per
//! kind of op. `simd`, `slices`, `store`, `scatter` and `custom_gradient` are shared by all.
//!
//! On a CPU each op runs a kernel of this module; on other devices, and as the reference in tests, it is composed of
//! stock candle ops, or on CUDA runs a kernel of [`cuda`] where `--kernels fused` asks for it. Kernels are generic over
//! `f32` and `f64`, so that gradients can be checked against finite differences in double precision. Results do not depend
//! on the number of threads.

pub mod attention;
pub mod conv;
pub mod cuda;
pub mod custom_gradient;
pub mod embedding;
pub mod matmul;
pub mod nearest_code;
pub mod norm;
pub mod optim;
pub mod peak;
pub mod pointwise;
pub mod pool;
pub mod scatter;
pub mod simd;
pub mod slices;
mod store;
pub mod tape;
#[cfg(test)]
pub mod testing;

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub use matmul::bf16::amx_emulator;

// Higher floors name an op without its folder.
pub use attention::{attention, cached as cached_attention, image as image_attention};
pub use conv::{Padding, conv2d, conv2d_in, upsample as conv_upsample};
pub use embedding::embedding;
pub use matmul::{epilogue, gemm, linear, linear_activated, linear_in, matmul_weight_dtype, packed, rounds_to_bf16};
pub use nearest_code::nearest_code;
pub use norm::{group_norm, layer_norm};
pub use optim::{AdamW, Muon, adamw_step, adamw_step_on_device, muon_step, muon_step_on_device};
pub use peak::peak_flops;
pub use pointwise::{activation, bf16_pairs, cross_entropy, gelu, softmax};
pub use pool::{max_pool2x, upsample_nearest2x};
pub use slices::{assign, replace, with_slice, with_slice_mut};
pub use store::{Buffer, Store};
