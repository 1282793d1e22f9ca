//! The output folder of `vilg data encode` and `vilg data build`: only one process writes to it, shards are written
//! atomically, and each shard records its source.

use super::source_file::open_regular;
use crate::{
    error::{Context, Hint, Result, failed},
    report, runtime,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File, OpenOptions},
    hash::{BuildHasher, RandomState},
    io::{BufWriter, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Maximum size of a record in bytes.
const MAX_RECORD: u64 = 64 << 10;
const LOCK: &str = ".encode.lock";

/// How shards are made from their source; it is a part of their record.
pub trait Recipe: PartialEq + Serialize + DeserializeOwned {
    /// Name of the first member of a shard, its record. It has no extension, so it belongs to no sample.
    const MEMBER: &'static str;
    /// What happened to the source, for error messages.
    const VERB: &'static str;
}

/// The source of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeFrom<R> {
    /// Absolute path of the source.
    pub path: PathBuf,
    /// Digest of the source's samples, sizes and modification times.
    pub digest: String,
    #[serde(flatten)]
    pub recipe: R,
}

impl<R: Recipe> MadeFrom<R> {
    /// Reads the record of a shard; `None` if the shard is damaged or has none (older versions wrote none).
    pub fn read(path: &Path) -> Option<Self> {
        let mut archive = tar::Archive::new(open_regular(path).ok()?);
        let member = archive.entries().ok()?.next()?.ok()?;
        if *member.path_bytes() != *R::MEMBER.as_bytes() {
            return None;
        }
        let mut text = Vec::new();
        member.take(MAX_RECORD).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Writes the record as the first member of a shard.
    ///
    /// # Errors
    /// The shard cannot be written.
    pub fn write(&self, shard: &mut tar::Builder<impl Write>) -> Result<()> {
        append(shard, R::MEMBER, &serde_json::to_vec(self)?)
    }
}

/// Appends a member to a shard.
///
/// # Errors
/// The shard cannot be written.
pub fn append(shard: &mut tar::Builder<impl Write>, name: &str, content: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    shard.append_data(&mut header, name, content)?;
    Ok(())
}

/// Whether a shard still has to be written, given the output file of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Missing,
    Finished,
    /// The source has changed since the shard was written.
    Outdated,
}

impl Standing {
    /// Compares the record of the file `output` with the record `wanted` of the source.
    ///
    /// # Errors
    /// The file has no record or was made from another source; it must not be replaced.
    pub fn of<R: Recipe>(output: &Path, wanted: &MadeFrom<R>) -> Result<Self> {
        if output.symlink_metadata().is_err() {
            return Ok(Self::Missing);
        }
        let shown = output.display();
        let hint = "choose another folder with -o, or delete this file to write it again";
        let none = || format!("{shown} has no record of its source: an older version of vilg or another tool wrote it");
        let found = MadeFrom::<R>::read(output).hint(none(), hint)?;
        if found == *wanted {
            return Ok(Self::Finished);
        }
        if found.path == wanted.path {
            return Ok(Self::Outdated);
        }
        // The same samples under another path.
        if found.digest == wanted.digest && found.recipe == wanted.recipe {
            return Ok(Self::Finished);
        }
        let (recorded, requested) = (found.path.display(), wanted.path.display());
        Err(failed(format_args!("{shown} was {} from {recorded}, not from {requested}", R::VERB), hint))
    }
}

/// The lock of an output folder. Dropping it releases the lock and removes its file.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: Option<File>,
}

impl Lock {
    /// Locks a folder for writing shards. On file systems without locks it prints a warning and returns without a lock.
    ///
    /// # Errors
    /// Another process holds the lock, or the lock file cannot be created or locked.
    pub fn take(folder: &Path) -> Result<Self> {
        let busy = || format!("another process is writing to {}", folder.display());
        Self::try_take(folder, LOCK)?.hint(busy(), "wait until it is done, or choose another folder with -o")
    }

    /// As [`Lock::take`], for one of several ranks that write different shards.
    ///
    /// # Errors
    /// As [`Lock::take`].
    pub fn take_for_rank(folder: &Path, rank: usize) -> Result<Self> {
        let busy = || format!("another process writes to {} as rank {rank}", folder.display());
        Self::try_take(folder, &format!("{LOCK}.{rank}"))?
            .hint(busy(), "wait until it is done, or choose another folder")
    }

    /// Locks the file `name` in a folder; `None` if another process holds the lock. On file systems without locks it prints
    /// a warning and returns without a lock.
    ///
    /// # Errors
    /// The lock file cannot be created or locked.
    pub fn try_take(folder: &Path, name: &str) -> Result<Option<Self>> {
        let path = folder.join(name);
        loop {
            let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
            let file = opened.hint(format_args!("cannot write {}", path.display()), "choose another folder with -o")?;
            match runtime::lock(&file).with_context(|| format!("cannot lock {}", folder.display()))? {
                // The previous holder may have removed the file between our opening and locking it.
                runtime::Lock::Held if is_at(&file, &path) => return Ok(Some(Self { path, file: Some(file) })),
                runtime::Lock::Held => {}
                runtime::Lock::Busy => return Ok(None),
                runtime::Lock::Unsupported(error) => {
                    let folder = folder.display();
                    report::warn(format_args!(
                        "cannot lock {folder} ({error}): make sure that no other process writes to it"
                    ));
                    return Ok(Some(Self { path, file: None }));
                }
            }
        }
    }

    /// Whether the lock is held, so that no other process writes to the folder.
    pub fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(opened), Ok(present)) = (file.metadata(), fs::metadata(path)) else { return false };
    (opened.dev(), opened.ino()) == (present.dev(), present.ino())
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A lock file that cannot be removed is harmless: the next process locks it again.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes a file atomically: under a unique temporary name, renamed once it is complete and flushed to the disk. If
/// `write` returns false, nothing is kept.
///
/// # Errors
/// `write` fails, or the file cannot be written; the temporary file is then removed.
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
        // An error of the removal would hide the error that stopped the writing.
        let _ = fs::remove_file(&temporary);
        return written.map(|_| ());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    runtime::sync_folder(folder.unwrap_or(Path::new(".")))
}

/// Removes temporary files of processes that were killed while they wrote `path`. The caller must hold the [`Lock`].
pub fn remove_leftovers(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let entry_name = entry.file_name();
        let rest = entry_name.to_str().and_then(|entry| entry.strip_prefix(name));
        let random = rest.and_then(|rest| rest.strip_prefix('.')?.strip_suffix(".tmp"));
        let ours = random.is_some_and(|hex| hex.len() == 16 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
        // Earlier versions used the name `.tmp`.
        if ours || rest == Some(".tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
}
