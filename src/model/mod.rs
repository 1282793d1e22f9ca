//! The paper's generator: sequence layout and masks, transformer, two-way loss, decoding.

pub mod activations;
mod composed;
mod decode;
mod embedding;
pub mod flops;
mod fused;
mod head;
pub mod listing;
mod native;
mod packed;
mod sequence;
pub mod size;
mod transformer;

pub use decode::{DecodeState, Source};
pub use sequence::{Batch, Direction, Layout, pad};
pub use transformer::Generator;

#[cfg(test)]
mod native_tests;
#[cfg(test)]
mod tests;
