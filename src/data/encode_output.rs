//! The output folder of `vilg data encode`: one writer at a time, shards that appear whole or not at all, and in each
//! shard the record of what it was made from.

use super::{codes::CodesInfo, dataset::Shard, files::open_regular};
use crate::{
    error::{Context, Hint, Result, failed},
    report,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    hash::{BuildHasher, RandomState},
    io::{BufWriter, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The first member of a shard. Its name has no extension, so that it is part of no sample.
pub const MADE_FROM: &str = "encoded-from";
/// Largest record that is read.
const MAX_RECORD: u64 = 64 << 10;
const LOCK: &str = ".encode.lock";

/// What a shard of codes was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeFrom {
    /// Absolute path of the source shard or folder.
    pub path: PathBuf,
    /// Digest of the source's samples, sizes and modification times.
    pub digest: String,
    /// The image tokenizer and its grid.
    pub codes: CodesInfo,
}

impl MadeFrom {
    /// The record of a source shard.
    ///
    /// # Errors
    /// The shard cannot be examined.
    pub fn of(shard: &Shard, codes: &CodesInfo) -> Result<Self> {
        let path = fs::canonicalize(&shard.path).with_context(|| format!("cannot find {}", shard.path.display()))?;
        Ok(Self { path, digest: shard.digest(true)?.to_hex().to_string(), codes: codes.clone() })
    }

    /// The record in a shard of codes; `None` if it has none (an older version wrote it) or is damaged.
    pub fn read(path: &Path) -> Option<Self> {
        let mut archive = tar::Archive::new(open_regular(path).ok()?);
        let member = archive.entries().ok()?.next()?.ok()?;
        if *member.path_bytes() != *MADE_FROM.as_bytes() {
            return None;
        }
        let mut text = Vec::new();
        member.take(MAX_RECORD).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

/// Whether a shard has to be encoded, given the file of its name in the output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Missing,
    Finished,
    /// The source changed since.
    Outdated,
}

impl Standing {
    /// Compares the shard at `output` with what would be written there.
    ///
    /// # Errors
    /// The file there was made from another source or has no record: it is not replaced.
    pub fn of(output: &Path, wanted: &MadeFrom) -> Result<Self> {
        if output.symlink_metadata().is_err() {
            return Ok(Self::Missing);
        }
        let shown = output.display();
        let hint = "choose another folder with -o, or delete this file to encode it again";
        let none = || format!("{shown} has no record of its source: an older version of vilg or another tool wrote it");
        let found = MadeFrom::read(output).hint(none(), hint)?;
        if found == *wanted {
            return Ok(Self::Finished);
        }
        if found.path == wanted.path {
            return Ok(Self::Outdated);
        }
        // The same samples, moved.
        if found.digest == wanted.digest && found.codes == wanted.codes {
            return Ok(Self::Finished);
        }
        let (theirs, ours) = (found.path.display(), wanted.path.display());
        Err(failed(format_args!("{shown} was encoded from {theirs}, not from {ours}"), hint))
    }
}

/// The lock of an output folder; released and removed when dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: Option<File>,
}

impl Lock {
    /// Locks a folder. File systems without locks get a warning and no lock.
    ///
    /// # Errors
    /// Another process holds the lock, or its file cannot be made.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK);
        loop {
            let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
            let file = opened.hint(format_args!("cannot write {}", path.display()), "choose another folder with -o")?;
            match file.try_lock() {
                // The holder before may have removed the file between our opening and locking it.
                Ok(()) if is_at(&file, &path) => return Ok(Self { path, file: Some(file) }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let message = format!("another process is encoding into {}", folder.display());
                    return Err(failed(message, "wait until it is done, or choose another folder with -o"));
                }
                Err(TryLockError::Error(error)) => {
                    let folder = folder.display();
                    report::warn(format_args!(
                        "cannot lock {folder} ({error}): make sure that no other process encodes into it"
                    ));
                    return Ok(Self { path, file: None });
                }
            }
        }
    }

    /// Whether no other process writes into the folder.
    pub fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(there)) = (file.metadata(), fs::metadata(path)) else { return false };
    (ours.dev(), ours.ino()) == (there.dev(), there.ino())
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A lock file that cannot be removed does no harm: the next process locks it again.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes a file under a temporary name that nobody else uses, and renames it when it is complete and on the disk.
///
/// # Errors
/// `write` fails, or the file cannot be written; no file is left behind then.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<bool>) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}.tmp", RandomState::new().hash_one(std::process::id())));
    let temporary = PathBuf::from(name);
    let mut file = BufWriter::new(OpenOptions::new().write(true).create_new(true).open(&temporary)?);
    let written = write(&mut file).and_then(|keep| {
        file.into_inner()?.sync_all()?;
        if keep {
            fs::rename(&temporary, path)?;
        }
        Ok(keep)
    });
    if !matches!(written, Ok(true)) {
        // The error that stopped the writing is reported; one from removing the rest of it would hide it.
        let _ = fs::remove_file(&temporary);
        return written.map(|_| ());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    // Makes the new name itself durable; some file systems cannot.
    let _ = File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Removes temporary files of runs that were killed while they wrote `path`. Only for the holder of the [`Lock`].
pub fn remove_leftovers(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let entry_name = entry.file_name();
        let rest = entry_name.to_str().and_then(|entry| entry.strip_prefix(name));
        let random = rest.and_then(|rest| rest.strip_prefix('.')?.strip_suffix(".tmp"));
        let ours = random.is_some_and(|hex| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
        // Earlier versions used this name.
        if ours || rest == Some(".tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
}
