//! Keeps the size of a cache folder below its limit: removes the shards that were not used for longest.

use super::{
    record::{Partial, Record},
    slot::{Slot, no_locks},
};
use crate::{
    error::{Context, Hint, Result, ensure, failed, usage},
    report,
    runtime::{self, Lock},
};
use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Locked while a process frees space.
const LOCK: &str = "cache.lock";
/// Length of the name of a shard: hexadecimal digits.
const KEY: usize = 32;

/// The paths of a shard in a cache folder.
pub fn slot(folder: &Path, key: &str) -> Slot {
    let path = |extension: &str| folder.join(format!("{key}.{extension}"));
    Slot { file: path("tar"), record: path("json"), part: path("part"), partial: path("part.json") }
}

/// A file of the cache: a shard or an incomplete download.
struct Entry {
    file: PathBuf,
    record: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// Frees space for a download of `needed` bytes, and lets `take` occupy it before other processes look.
///
/// # Errors
/// The download is larger than the cache, all other shards are in use, or the folder cannot be read or written.
pub fn make_room(
    folder: &Path,
    max_bytes: u64,
    key: &str,
    needed: u64,
    take: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let hint = "raise data.cache_gb (--cache-gb)";
    let larger = || usage(format_args!("a shard of {needed} bytes is larger than the cache ({max_bytes} bytes)"), hint);
    ensure!(needed <= max_bytes, larger());
    let _lock = lock(folder)?;
    let mut entries = entries(folder, key)?;
    let mut occupied: u64 = entries.iter().map(|entry| entry.bytes).sum();
    entries.sort_by_key(|entry| entry.used);
    for entry in entries {
        if occupied + needed <= max_bytes {
            break;
        }
        if remove(&entry)? {
            report::detail(format_args!("removed {} from the cache", entry.file.display()));
            occupied -= entry.bytes;
        }
    }
    let shown = folder.display();
    let full = || format!("the cache {shown} is full: {occupied} of {max_bytes} bytes are in use, {needed} are needed");
    ensure!(occupied + needed <= max_bytes, failed(full(), hint));
    take()
}

/// Waits until no other process frees space.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = opened
        .hint(format_args!("cannot write {}", path.display()), "set data.cache_dir (--cache-dir) to another folder")?;
    match runtime::lock(&file)? {
        Lock::Held => {}
        Lock::Busy => file.lock().with_context(|| format!("cannot lock {}", path.display()))?,
        Lock::Unsupported(error) => return Err(no_locks(&path, &error)),
    }
    Ok(file)
}

/// The files that a cache made, without the incomplete download `key`.
fn entries(folder: &Path, key: &str) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let hint = "check that it is a folder and that you have permission to read it";
    for entry in fs::read_dir(folder).hint(format_args!("cannot list {}", folder.display()), hint)? {
        let name = entry.with_context(|| format!("cannot list {}", folder.display()))?.file_name();
        let Some((stem, extension)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        if stem.len() != KEY || !stem.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        let Slot { file, record, part, partial } = slot(folder, stem);
        let (file, record, is_ours) = match extension {
            "tar" => (file, record.clone(), Record::read(&record).is_some()),
            "part" if stem != key => (part, partial.clone(), true),
            _ => continue,
        };
        // Another process may have removed it.
        let Ok(meta) = fs::symlink_metadata(&file) else { continue };
        let used = fs::metadata(&record).and_then(|record| record.modified()).or_else(|_| meta.modified());
        if is_ours && meta.is_file() {
            entries.push(Entry { file, record, bytes: meta.len(), used: used.unwrap_or(SystemTime::UNIX_EPOCH) });
        }
    }
    Ok(entries)
}

/// Removes a file and its record; false if it is in use, or if it is not known to be one of a cache.
fn remove(entry: &Entry) -> Result<bool> {
    let is_part = entry.file.extension().is_some_and(|extension| extension == "part");
    if is_part && Partial::read(&entry.record).is_none() {
        return Ok(false);
    }
    let Ok(file) = OpenOptions::new().read(true).write(true).open(&entry.file) else { return Ok(false) };
    if !matches!(runtime::lock(&file)?, Lock::Held) {
        return Ok(false);
    }
    let shown = entry.file.display();
    fs::remove_file(&entry.file)
        .hint(format_args!("cannot remove {shown}"), "set data.cache_dir (--cache-dir) to another folder")?;
    // A record without a file has no effect.
    let _ = fs::remove_file(&entry.record);
    Ok(true)
}

/// Notes that a shard is used now.
pub fn touch(record: &Path) {
    // If it fails, the shard is removed earlier than others.
    let _ = OpenOptions::new().write(true).open(record).and_then(|file| file.set_modified(SystemTime::now()));
}
