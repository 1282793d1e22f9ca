//! Maths that candle lacks or does slowly: forward and backward over slices, wrapped as candle ops.
//!
//! On a CPU each op runs our kernel; on any other device (and in tests, as the oracle) it is composed
//! from stock candle ops. Kernels are generic over `f32` and `f64`, so that gradients can be checked
//! against finite differences in double precision. Results do not depend on the number of threads.

pub mod adamw;
pub mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub mod amx_emulator;
pub mod attention;
pub mod avx512_bf16;
pub mod bf16_pairs;
pub mod bf16_unit;
pub mod cached_attention;
pub mod conv;
mod conv_kernel;
mod conv_loops;
mod conv_region;
mod conv_tiles;
pub mod conv_upsample;
pub mod cross_entropy;
pub mod epilogue;
pub mod gelu;
pub mod gemm;
pub mod gemm_bf16;
mod gemm_bf16_pack;
pub mod group_norm;
pub mod key_ranges;
pub mod layer_norm;
pub mod linear;
pub mod max_pool;
pub mod muon;
pub mod nearest_code;
mod newton_schulz;
pub mod packed;
mod packed_kernel;
pub mod peak;
pub mod picture_attention;
pub mod scatter;
pub mod simd;
pub mod slices;
pub mod softmax;
mod store;
#[cfg(test)]
pub mod testing;
pub mod upsample;
mod vector;
mod winograd;
mod winograd_bf16;
mod winograd_products;
mod winograd_transforms;

pub use adamw::{AdamW, adamw_step};
pub use attention::attention;
pub use conv::{Padding, conv2d, conv2d_in};
pub use cross_entropy::cross_entropy;
pub use gelu::gelu;
pub use group_norm::group_norm;
pub use layer_norm::layer_norm;
pub use linear::{factor_dtype, linear, linear_in, rounds_to_bf16};
pub use max_pool::max_pool2x;
pub use muon::{Muon, muon_step};
pub use nearest_code::nearest_code;
pub use peak::peak_flops;
pub use slices::{assign, replace, with_slice, with_slice_mut};
pub use store::{Floats, Store};
pub use upsample::upsample_nearest2x;

/// Elements that one task of a parallel elementwise loop takes.
const CHUNK: usize = 1 << 14;
