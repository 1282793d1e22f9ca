//! Data sets: finds samples, indexes them, reads them in a reproducible order, and delivers them in batches.
//!
//! Reading order: `paths` and `tar` find and index shards, [`Dataset`] holds them, [`Sampler`] gives the sample at each
//! position, [`Record`] is one sample, [`Loader`] reads ahead in threads. `remote_source` opens remote shards through a
//! cache, and `read_ahead` downloads those that the next batches need. A damaged sample is a [`Bad`], counted in
//! [`BadCounts`].

mod bad;
mod blocks;
pub mod build;
mod clean;
mod codes;
mod dataset;
mod embed;
pub mod embeddings;
mod encode;
#[cfg(test)]
mod encode_fault_tests;
#[cfg(test)]
mod encode_tests;
#[cfg(test)]
mod fault_tests;
pub mod filter;
pub mod image;
pub mod image_file;
#[cfg(test)]
mod image_tests;
pub mod index;
#[cfg(test)]
mod index_tests;
pub mod inspect;
mod keys;
pub mod label;
mod loader;
mod members;
pub mod numpy;
mod order;
pub mod output;
pub mod paths;
mod questions;
mod read_ahead;
mod record;
pub mod remote;
mod remote_source;
mod resample;
mod sampler;
mod shard;
mod source_file;
mod streams;
pub mod table;
mod tar;
#[cfg(test)]
mod tests;
pub mod translate;

pub use bad::{Bad, BadCounts, Cause, printable};
pub use codes::{CODES_FILE, CodesInfo, npy};
pub use dataset::{Dataset, Source, are_codes};
pub use embed::{Embedder, Report as EmbeddingReport};
pub use encode::{Encoder, Report};
pub use keys::keys;
pub use loader::Loader;
pub use members::Members;
pub use order::Draw;
pub use paths::is_there;
pub use questions::{Question, questions};
pub use read_ahead::check_cache;
pub use record::{IMAGE_EXTENSIONS, Kind, Record};
pub use resample::{Filter, resize, resize_bicubic, resize_unrounded};
pub use sampler::Sampler;
pub use shard::Shard;
