//! Matrix products with factors rounded to bf16 and sums in f32, on the processor's bf16 instructions.

pub mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub mod amx_emulator;
pub mod avx512;
pub mod gemm;
pub(in crate::ops) mod pack;
pub(in crate::ops) mod tile;
pub mod unit;
