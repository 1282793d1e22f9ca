//! The folder of a cache: finds shards in it, checks them, and downloads those that are missing.

use super::{
    answer::Limits,
    record::Record,
    shard::RemoteShard,
    slot::{Filled, Filling, Slot, is_at, is_intact, no_locks},
    space::{make_room, slot, touch},
};
use crate::{
    error::{Context, Hint, Result, ensure, usage},
    report,
    runtime::{self, Lock},
};
use std::{
    collections::HashMap,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, atomic::AtomicBool},
    thread,
    time::Duration,
};

/// Time after which a shard is tried again that another process is just removing.
const POLL: Duration = Duration::from_millis(20);

/// A shard in the cache; the file is kept while this exists.
#[derive(Debug)]
pub struct Cached {
    path: PathBuf,
    size: u64,
    blake3: String,
    /// Locked against removal.
    _file: File,
}

/// The folder of a cache.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    max_bytes: u64,
    limits: Limits,
    /// Inode and digest of the files whose content this process has checked, by key.
    checked: Mutex<HashMap<String, (u64, String)>>,
}

impl Cached {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Digest of the content (BLAKE3, hexadecimal).
    pub fn blake3(&self) -> &str {
        &self.blake3
    }
}

impl Folder {
    /// The folder at `path`, which is created if needed.
    ///
    /// # Errors
    /// The folder cannot be created.
    pub fn open(path: &Path, max_bytes: u64, limits: Limits) -> Result<Self> {
        ensure!(max_bytes > 0, usage("a cache of 0 bytes can hold no shard", "set its size in bytes"));
        let shown = path.display();
        fs::create_dir_all(path).hint(format_args!("cannot create {shown}"), "choose another cache folder")?;
        Ok(Self { path: path.to_owned(), max_bytes, limits, checked: Mutex::default() })
    }

    /// As [`Cache::get`](super::Cache::get); `stop` ends a download early.
    ///
    /// # Errors
    /// As [`Cache::get`](super::Cache::get).
    pub fn get(&self, shard: &RemoteShard, stop: &AtomicBool) -> Result<Cached> {
        let key = shard.key();
        let slot = slot(&self.path, &key);
        let reserve = |bytes: u64| {
            let take = || Ok(File::options().write(true).open(&slot.part)?.set_len(bytes)?);
            make_room(&self.path, self.max_bytes, &key, bytes, take).with_context(|| shard.url())
        };
        let filling = Filling { limits: self.limits, known: None, reserve: &reserve, progress: &|_| {}, stop };
        loop {
            if let Some(cached) = self.find(&slot, &key, shard)? {
                touch(&slot.record);
                return Ok(cached);
            }
            // Another process may remove the shard before it is locked here: then it is downloaded again.
            let filled = slot.fill(shard, &filling, &|| Ok(self.find(&slot, &key, shard)?.is_some()))?;
            if let Filled::Downloaded(record) = filled
                && let Ok(meta) = fs::metadata(&slot.file)
            {
                self.remember(&key, meta.ino(), &record);
            }
        }
    }

    /// The shard, if it is in the cache and intact.
    fn find(&self, slot: &Slot, key: &str, shard: &RemoteShard) -> Result<Option<Cached>> {
        loop {
            let Some((mut file, record)) = slot.finished(shard) else { return Ok(None) };
            let cannot = || format!("cannot read {}", slot.file.display());
            match runtime::lock_shared(&file).with_context(cannot)? {
                Lock::Held if is_at(&file, &slot.file) => {}
                Lock::Held => continue,
                Lock::Busy => {
                    thread::sleep(POLL);
                    continue;
                }
                Lock::Unsupported(error) => return Err(no_locks(&slot.file, &error)),
            }
            let inode = file.metadata().with_context(cannot)?.ino();
            if !self.is_checked(key, inode, &record) {
                if !is_intact(&mut file, &record).with_context(cannot)? {
                    report::warn(format_args!("{} in the cache is damaged: downloading it again", shard.url()));
                    return Ok(None);
                }
                self.remember(key, inode, &record);
            }
            let Record { size, blake3, .. } = record;
            return Ok(Some(Cached { path: slot.file.clone(), size, blake3, _file: file }));
        }
    }

    fn is_checked(&self, key: &str, inode: u64, record: &Record) -> bool {
        let checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        checked.get(key).is_some_and(|(i, digest)| *i == inode && *digest == record.blake3)
    }

    fn remember(&self, key: &str, inode: u64, record: &Record) {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        checked.insert(key.to_owned(), (inode, record.blake3.clone()));
    }
}
