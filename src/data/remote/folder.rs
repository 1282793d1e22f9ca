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

    /// The first 8 bytes of the digest.
    pub fn short_digest(&self) -> u64 {
        self.blake3.get(..16).and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or(0)
    }
}

impl Folder {
    /// The folder at `path`, which need not exist.
    ///
    /// # Errors
    /// The size is 0.
    pub fn new(path: &Path, max_bytes: u64, limits: Limits) -> Result<Self> {
        ensure!(max_bytes > 0, usage("a cache of 0 bytes can hold no shard", "set data.cache_gb (--cache-gb)"));
        Ok(Self { path: path.to_owned(), max_bytes, limits, checked: Mutex::default() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Maximum size of the shards in bytes.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// As [`Cache::get`](super::Cache::get); `stop` ends a download early. With `renew`, a file that is there is first compared
    /// with the server.
    ///
    /// # Errors
    /// As [`Cache::get`](super::Cache::get).
    pub fn get(&self, shard: &RemoteShard, stop: &AtomicBool, renew: bool) -> Result<Cached> {
        let key = shard.key();
        let slot = slot(&self.path, &key);
        let mut renew = renew;
        let reserve = |bytes: u64| {
            let hint = "free some space on the disk, or set data.cache_dir (--cache-dir) to another folder";
            let take = || {
                let grown = File::options().write(true).open(&slot.part).and_then(|part| part.set_len(bytes));
                grown.hint(format_args!("cannot write {}", slot.part.display()), hint)
            };
            make_room(&self.path, self.max_bytes, &key, bytes, take).with_context(|| shard.url())
        };
        loop {
            let found = self.find(&slot, &key, shard)?;
            let known = found.as_ref().and_then(|_| slot.finished(shard)?.1.etag);
            if let Some(cached) = found.filter(|_| !renew) {
                touch(&slot.record);
                return Ok(cached);
            }
            let shown = self.path.display();
            fs::create_dir_all(&self.path)
                .hint(format_args!("cannot create {shown}"), "set data.cache_dir (--cache-dir) to another folder")?;
            // Another process may remove the shard before it is locked here: then it is downloaded again.
            let known = known.as_deref();
            let filling = Filling { limits: self.limits, known, reserve: &reserve, progress: &|_| {}, stop };
            let filled = slot.fill(shard, &filling, &|| Ok(!renew && self.find(&slot, &key, shard)?.is_some()))?;
            renew = false;
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
