//! The records beside downloaded files: what is in them, and how far a download got.

use super::{location::Location, shard::RemoteShard};
use crate::{
    bounded_read,
    data::output::write_whole,
    error::{Context, Result},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fs::File, io, io::Write, path::Path};

/// Maximum size of a record in bytes.
const MAX_RECORD: u64 = 64 << 10;

/// A complete file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The source, without secrets.
    pub url: String,
    /// Version by the listing.
    pub version: Option<String>,
    /// ETag of the server's answer.
    pub etag: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Digest of the content (BLAKE3, hexadecimal).
    pub blake3: String,
}

/// An incomplete download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partial {
    pub url: String,
    pub version: Option<String>,
    pub etag: Option<String>,
    /// Size of the whole file in bytes.
    pub size: Option<u64>,
    /// Number of bytes that are safely on the disk.
    pub length: u64,
    /// Digest of these bytes.
    pub blake3: String,
}

impl Record {
    /// Reads a record; `None` if there is none that can be read.
    pub fn read(path: &Path) -> Option<Self> {
        read(path)
    }

    /// Whether the record is of this shard, in the version of the listing where both are known.
    pub fn fits(&self, shard: &RemoteShard) -> bool {
        // The versions in listings of S3 are ETags.
        let etag = self.etag.as_ref().filter(|_| matches!(shard.location, Location::S3 { .. }));
        let recorded = self.version.as_ref().or(etag);
        let same = |(a, b): (&String, &String)| a.trim_matches('"') == b.trim_matches('"');
        self.url == shard.url()
            && recorded.zip(shard.version.as_ref()).is_none_or(same)
            && shard.size.is_none_or(|size| size == self.size)
    }

    /// Writes the record atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write(self, path)
    }
}

impl Partial {
    /// Reads a record; `None` if there is none that can be read.
    pub fn read(path: &Path) -> Option<Self> {
        read(path)
    }

    /// Writes the record atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write(self, path)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&bounded_read::read(path, MAX_RECORD).ok()?).ok()
}

fn write(record: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_string(record)?;
    write_whole(path, |file| Ok(file.write_all(text.as_bytes()).map(|()| true)?))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Digests the first `length` bytes of a file; `None` if it is shorter.
///
/// # Errors
/// The file cannot be read.
pub fn digest(file: &mut File, length: u64) -> io::Result<Option<blake3::Hasher>> {
    let mut hasher = blake3::Hasher::new();
    let read = io::copy(&mut io::Read::take(file, length), &mut hasher)?;
    Ok((read == length).then_some(hasher))
}
