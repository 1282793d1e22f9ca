//! The paper's generator: sequence layout and masks, transformer, two-way loss, decoding.

mod composed;
mod decode;
mod embedding;
mod fused;
mod head;
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
