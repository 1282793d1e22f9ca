//! A folder with a bounded number of bytes that keeps remote shards; several processes may share it.

use super::{
    answer::Limits,
    folder::{Cached, Folder},
    prefetch::Prefetch,
    shard::RemoteShard,
};
use crate::error::Result;
use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

/// A cache of remote shards. Clones share their threads.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: Arc<Folder>,
    prefetch: Arc<Prefetch>,
}

impl Cache {
    /// Opens the cache in `folder`, which is created if needed, with at most `max_bytes` bytes of shards.
    ///
    /// # Errors
    /// The folder cannot be created.
    pub fn open(folder: &Path, max_bytes: u64) -> Result<Self> {
        Self::with_limits(folder, max_bytes, Limits::default())
    }

    /// The same with other limits of time.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub fn with_limits(folder: &Path, max_bytes: u64, limits: Limits) -> Result<Self> {
        let folder = Arc::new(Folder::open(folder, max_bytes, limits)?);
        Ok(Self { prefetch: Arc::new(Prefetch::new(Arc::clone(&folder))), folder })
    }

    /// The shard as a local file; downloads it if it is not in the cache. The content is checked against its digest at the
    /// first use in a process. A shard without a known version is not compared with the server again.
    ///
    /// # Errors
    /// The download fails, the shard is larger than the cache, or all shards in the cache are in use.
    pub fn get(&self, shard: &RemoteShard) -> Result<Cached> {
        self.folder.get(shard, &AtomicBool::new(false))
    }

    /// Downloads shards in the background, in this order. Errors appear when the shard is wanted. The shards may be removed
    /// before they are used if the cache is too small for them.
    pub fn prefetch(&self, shards: impl IntoIterator<Item = RemoteShard>) {
        self.prefetch.add(shards);
    }
}
