//! A remote shard that is read through a cache.

use super::{cache::Cache, folder::Cached, shard::RemoteShard};
use crate::error::{Result, ensure, failed};
use std::sync::{Arc, Mutex, PoisonError, Weak, atomic::AtomicBool};

/// A remote shard of a data set, in the version whose samples were indexed.
#[derive(Debug)]
pub struct RemoteFile {
    cache: Cache,
    shard: RemoteShard,
    size: u64,
    /// See [`Cached::short_digest`]; `None` if it is not known.
    digest: Option<u64>,
    /// The file, while someone holds it.
    held: Mutex<Weak<Cached>>,
}

impl RemoteFile {
    pub fn new(cache: Cache, shard: RemoteShard, size: u64, digest: Option<u64>) -> Self {
        Self { cache, shard, size, digest, held: Mutex::default() }
    }

    pub fn shard(&self) -> &RemoteShard {
        &self.shard
    }

    /// The URL, without secrets.
    pub fn url(&self) -> String {
        self.shard.url()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What tells versions apart: the version of the listing, or else a digest of the content.
    pub fn version(&self) -> String {
        let digest = || self.digest.map(|digest| format!("{digest:016x}"));
        self.shard.version.clone().or_else(digest).unwrap_or_default()
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The file in the cache, which is kept there while the result exists. `stop` ends a download early.
    ///
    /// # Errors
    /// As [`Cache::get`], or the content is not the one that was indexed.
    pub fn get(&self, stop: &AtomicBool) -> Result<Arc<Cached>> {
        if let Some(held) = self.held().upgrade() {
            return Ok(held);
        }
        // Not under the lock: a download takes long, and others see that it is in progress by the lock of its file.
        let cached = self.cache.get_unless(&self.shard, stop)?;
        let same = cached.size() == self.size && self.digest.is_none_or(|digest| digest == cached.short_digest());
        let folder = self.cache.folder().display();
        let hint = format!("to use the new version, remove the folder {folder} and start again");
        ensure!(same, failed(format_args!("{} has changed since its samples were indexed", self.url()), hint));
        let cached = Arc::new(cached);
        *self.held() = Arc::downgrade(&cached);
        Ok(cached)
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Weak<Cached>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
