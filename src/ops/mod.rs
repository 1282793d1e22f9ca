//! Maths that candle lacks or does slowly: forward and backward over slices, wrapped as candle ops.
//!
//! On a CPU each op runs our kernel; on any other device (and in tests, as the oracle) it is composed
//! from stock candle ops. Kernels are generic over `f32` and `f64`, so that gradients can be checked
//! against finite differences in double precision.
