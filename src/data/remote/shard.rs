//! A remote shard: its URL, its name, and what is known of it before it is downloaded.

use super::{
    answer::Entry,
    location::{Location, shown},
};
use std::{fmt, path::PathBuf};

/// A shard that is not on this machine.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteShard {
    /// As given by the user; may contain secrets.
    source: String,
    pub(super) location: Location,
    /// Relative path below the folder of the source; without `..`.
    pub name: PathBuf,
    /// Size in bytes, by the listing.
    pub size: Option<u64>,
    /// Version by the listing: an ETag, or the digest that Hugging Face lists.
    pub version: Option<String>,
}

impl RemoteShard {
    pub(super) fn new(source: String, location: Location, name: PathBuf) -> Self {
        Self { source, location, name, size: None, version: None }
    }

    pub(super) fn listed(source: String, location: Location, name: PathBuf, entry: Entry) -> Self {
        Self { source, location, name, size: Some(entry.size), version: entry.version }
    }

    /// The URL without user name, password and query; of `pipe:`, only the first word of the command.
    pub fn url(&self) -> String {
        shown(&self.source)
    }

    /// Name of the shard in a cache: a digest of URL and version, 32 hexadecimal digits.
    pub fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.source.as_bytes()).update(&[0]).update(self.version.as_deref().unwrap_or("").as_bytes());
        format!("{:.32}", hasher.finalize().to_hex())
    }
}

impl fmt::Debug for RemoteShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, size, version, .. } = self;
        write!(f, "RemoteShard {{ url: {:?}, name: {name:?}, size: {size:?}, version: {version:?} }}", self.url())
    }
}
