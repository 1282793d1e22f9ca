//! The paper's generator: sequence layout and masks, transformer, two-way loss, decoding. [`matcher`] is a model of its own.

pub mod activations;
mod batch;
mod decode;
pub mod device_activations;
mod embedding;
pub mod end_to_end;
pub mod flops;
mod head;
mod joint_tokenizer;
mod layer;
mod manual;
pub mod matcher;
mod segments;
mod sequence;
mod straight_through;
mod transformer;

pub use batch::{Batch, Tokens};
pub use decode::{DecodeState, Decoder, Running, Source};
pub use joint_tokenizer::JointTokenizer;
pub use matcher::Matcher;
pub use sequence::{Layout, Modality, Role, Slot, Span};
pub use transformer::Generator;

#[cfg(test)]
mod blockwise_tests;
#[cfg(test)]
mod decode_tests;
#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod end_to_end_tests;
#[cfg(test)]
mod joint_tokenizer_tests;
#[cfg(test)]
mod manual_tests;
#[cfg(test)]
mod tests;
