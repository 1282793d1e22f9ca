//! Samples: found, indexed, read in a repeatable order, and delivered in batches.
//!
//! Reading order: `paths` and `tar` find and index shards, [`Dataset`] holds them, [`Sampler`] says which sample
//! stands where, [`Record`] is one sample, [`Loader`] reads ahead in threads. What is wrong with a sample
//! is a [`Bad`], counted in [`BadCounts`].

mod bad;
mod codes;
mod dataset;
mod encode;
#[cfg(test)]
mod encode_tests;
pub mod image;
#[cfg(test)]
mod image_tests;
pub mod inspect;
mod loader;
pub mod paths;
pub mod picture;
mod record;
mod sampler;
mod tar;
#[cfg(test)]
mod tests;

pub use bad::{Bad, BadCounts, Cause};
pub use codes::{CODES_FILE, CodesInfo, npy};
pub use dataset::{Dataset, Shard, Source};
pub use encode::{Encoder, Report};
pub use loader::Loader;
pub use paths::is_there;
pub use record::{IMAGE_EXTENSIONS, Kind, Record};
pub use sampler::{Draw, Sampler};
pub use tar::Members;
