//! The paper's generator: sequence layout and masks, transformer, two-way loss, decoding.

mod decode;
mod embedding;
mod head;
mod native;
mod sequence;
pub mod size;
mod transformer;

pub use decode::{DecodeState, Source};
pub use sequence::{Batch, Direction, Layout, pad};
pub use transformer::Generator;

#[cfg(test)]
mod tests;
