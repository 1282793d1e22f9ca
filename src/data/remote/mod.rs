//! Remote shards: `s3://`, `oss://`, `https://`, `hf://` and `pipe:COMMAND`.
//!
//! Reading order: `location` parses URLs, [`list()`] expands a source to [`RemoteShard`]s, `client` makes requests, `download`
//! repeats and resumes them, `slot` places a file and its record on the disk, [`Cache`] keeps a bounded number of shards,
//! [`RemoteFile`] is a shard of a data set that is read through it, and [`fetch`] copies all shards to a folder.
//!
//! Whole files are downloaded, and read from the disk: a shard is read in random order, so that a slow server cannot hold up
//! a training step that is already prepared. A file counts as downloaded only with a record of its size and digest. Without
//! the feature `remote`, only `pipe:` works.

pub mod answer;
mod cache;
#[cfg_attr(not(feature = "remote"), path = "client_disabled.rs")]
mod client;
mod download;
mod fetch;
mod file;
mod folder;
mod list;
mod location;
mod pipe;
mod prefetch;
mod record;
mod shard;
mod slot;
mod space;

pub use answer::Limits;
pub use cache::Cache;
pub use fetch::{Fetch, Fetched, State};
pub use file::RemoteFile;
pub use folder::Cached;
pub use list::{check, list};
pub use location::{is_remote, shown};
pub use shard::RemoteShard;
