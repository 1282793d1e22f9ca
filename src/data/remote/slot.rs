//! The place of one shard on the disk: file, record, and an incomplete download. Processes that want the same shard wait for
//! the one that downloads it.

use super::{
    answer::Limits,
    download::{Task, download},
    record::{Record, digest},
    shard::RemoteShard,
};
use crate::{
    data::output::remove_leftovers,
    error::{Context, Hint, Result, ensure, failed},
    runtime::{self, Lock},
};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

/// Time between two looks whether another process has finished a download.
const POLL: Duration = Duration::from_millis(50);

/// Paths of one shard.
#[derive(Debug, Clone)]
pub struct Slot {
    pub file: PathBuf,
    pub record: PathBuf,
    /// The incomplete file, and its record.
    pub part: PathBuf,
    pub partial: PathBuf,
}

/// How a shard is downloaded.
pub struct Filling<'a> {
    pub limits: Limits,
    /// ETag of the version that is there already.
    pub known: Option<&'a str>,
    /// Called with the number of bytes that the file needs, before it grows to it.
    pub reserve: &'a dyn Fn(u64) -> Result<()>,
    /// Called with the number of new bytes.
    pub progress: &'a dyn Fn(u64),
    /// Ends the download early.
    pub stop: &'a AtomicBool,
}

/// What [`Slot::fill`] did.
pub enum Filled {
    Downloaded(Record),
    NotModified,
    /// Another process finished the shard meanwhile.
    ByOther,
}

impl Slot {
    /// Downloads the shard, unless `is_done` holds once no other process downloads it.
    ///
    /// # Errors
    /// As [`download`]; the folder cannot be written, or its file system has no locks.
    pub fn fill(
        &self,
        shard: &RemoteShard,
        filling: &Filling<'_>,
        is_done: &dyn Fn() -> Result<bool>,
    ) -> Result<Filled> {
        let cannot = || format!("cannot write {}", self.part.display());
        let part = loop {
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&self.part);
            let part = opened.hint(cannot(), "choose another folder")?;
            match runtime::lock(&part).with_context(cannot)? {
                // The previous holder may have renamed the file between our opening and locking it.
                Lock::Held if is_at(&part, &self.part) => break part,
                Lock::Held => {}
                Lock::Busy => {
                    let stopped =
                        || failed(format_args!("{}: stopped", shard.url()), "run the command again to resume");
                    ensure!(!filling.stop.load(Ordering::Relaxed), stopped());
                    thread::sleep(POLL);
                }
                Lock::Unsupported(error) => return Err(no_locks(&self.part, &error)),
            }
        };
        if is_done()? {
            self.remove_part();
            return Ok(Filled::ByOther);
        }
        remove_leftovers(&self.partial);
        remove_leftovers(&self.record);
        let Filling { limits, known, reserve, progress, stop } = *filling;
        let task = Task { shard, limits, part: &self.part, partial: &self.partial, reserve, progress, stop };
        // The lock is held until `part` is dropped: another process must not write to the file before it is renamed.
        let record = match download(&task, part.try_clone().with_context(cannot)?, known) {
            Ok(Some(record)) => record,
            Ok(None) => {
                self.remove_part();
                return Ok(Filled::NotModified);
            }
            Err(error) => {
                // Without a record it cannot be resumed.
                if !self.partial.exists() {
                    self.remove_part();
                }
                return Err(error);
            }
        };
        // Record before file: a file without a record is never taken for a download.
        record.write(&self.record)?;
        fs::rename(&self.part, &self.file).with_context(|| format!("cannot write {}", self.file.display()))?;
        let _ = fs::remove_file(&self.partial);
        drop(part);
        runtime::sync_folder(self.file.parent().unwrap_or(Path::new(".")))?;
        Ok(Filled::Downloaded(record))
    }

    /// Opens the file if it has a record that fits the shard.
    pub fn finished(&self, shard: &RemoteShard) -> Option<(File, Record)> {
        let record = Record::read(&self.record).filter(|record| record.fits(shard))?;
        let file = File::open(&self.file).ok()?;
        let meta = file.metadata().ok()?;
        (meta.is_file() && meta.len() == record.size).then_some((file, record))
    }

    /// The caller must hold the lock.
    pub fn remove_part(&self) {
        // What cannot be removed is used by the next download.
        let _ = fs::remove_file(&self.partial);
        let _ = fs::remove_file(&self.part);
    }
}

/// Whether the content of a file has the digest of its record.
///
/// # Errors
/// The file cannot be read.
pub fn is_intact(file: &mut File, record: &Record) -> std::io::Result<bool> {
    let hasher = digest(file, record.size)?;
    Ok(hasher.is_some_and(|hasher| hasher.finalize().to_hex().as_str() == record.blake3))
}

/// Whether the open file is still the one at `path`.
pub fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(opened), Ok(present)) = (file.metadata(), fs::metadata(path)) else { return false };
    (opened.dev(), opened.ino()) == (present.dev(), present.ino())
}

/// The error on a file system without locks.
pub fn no_locks(path: &Path, error: &std::io::Error) -> crate::error::Error {
    let folder = path.parent().unwrap_or(path).display();
    failed(format_args!("cannot lock files in {folder}: {error}"), "choose a folder on a local disk")
}
