//! What all sources have in common.

use super::emit::Emit;
use crate::error::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

/// A source of rows in one format.
pub trait Reader: Sync {
    /// Sends all rows, always in the same order.
    ///
    /// # Errors
    /// The source cannot be read, or the writer has stopped.
    fn read(&self, rows: &mut Emit) -> Result<()>;

    /// The files that determine the rows; separate image files are not among them.
    fn files(&self) -> Vec<PathBuf>;

    /// Digest of everything but separate image files.
    ///
    /// # Errors
    /// A file can no longer be read.
    fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for path in self.files() {
            update(&mut hasher, &path).with_context(|| format!("cannot read the metadata of {}", path.display()))?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Whether rows contain their images.
    fn embedded(&self) -> bool {
        false
    }
}

/// Adds the size and modification time of a file to a digest.
pub fn update(hasher: &mut blake3::Hasher, path: &Path) -> std::io::Result<()> {
    let meta = fs::metadata(path)?;
    let modified = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    hasher.update(&meta.len().to_le_bytes()).update(&modified.unwrap_or_default().as_nanos().to_le_bytes());
    Ok(())
}
