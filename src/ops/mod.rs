//! Maths that candle lacks or does slowly: forward and backward over slices, wrapped as candle ops.
//!
//! On a CPU each op runs our kernel; on any other device (and in tests, as the oracle) it is composed
//! from stock candle ops. Kernels are generic over `f32` and `f64`, so that gradients can be checked
//! against finite differences in double precision. Results do not depend on the number of threads.

pub mod gemm;
pub mod linear;
pub mod simd;
pub mod slices;
#[cfg(test)]
pub mod testing;

pub use linear::linear;
pub use slices::{with_slice, with_slice_mut};
