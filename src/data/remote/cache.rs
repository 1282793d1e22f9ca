//! A folder with a bounded number of bytes that keeps remote shards; several processes may share it.

use super::{
    answer::Limits,
    folder::{Cached, Folder},
    prefetch::Prefetch,
    shard::RemoteShard,
};
use crate::{
    config,
    error::{Hint, Result, ensure, usage},
    report,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

/// A cache of remote shards. Clones share their threads.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: Arc<Folder>,
    prefetch: Arc<Prefetch>,
}

impl Cache {
    /// The cache of `data.cache_dir` and `data.cache_gb`.
    ///
    /// # Errors
    /// Its size is not above 0, or there is no home folder for the default.
    pub fn of(data: &config::Data) -> Result<Self> {
        let folder = if data.cache_dir.is_empty() { default_folder()? } else { PathBuf::from(&data.cache_dir) };
        let ok = data.cache_gb > 0.0 && data.cache_gb <= 1e6;
        ensure!(ok, usage(format_args!("a cache of {} GB", data.cache_gb), "set its size above 0, at most 1e6"));
        Self::with_limits(&folder, (data.cache_gb * 1e9) as u64, Limits::default())
    }

    /// The cache in `folder`, which is created when it is needed, with at most `max_bytes` bytes of shards.
    ///
    /// # Errors
    /// The size is 0.
    pub fn with_limits(folder: &Path, max_bytes: u64, limits: Limits) -> Result<Self> {
        let folder = Arc::new(Folder::new(folder, max_bytes, limits)?);
        Ok(Self { prefetch: Arc::default(), folder })
    }

    /// Path of the folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Maximum size of the shards in bytes.
    pub fn max_bytes(&self) -> u64 {
        self.folder.max_bytes()
    }

    /// The shard as a local file; downloads it if it is not in the cache. The content is checked against its digest at the
    /// first use in a process. A shard without a known version is not compared with the server again.
    ///
    /// # Errors
    /// The download fails, the shard is larger than the cache, or all shards in the cache are in use.
    pub fn get(&self, shard: &RemoteShard) -> Result<Cached> {
        self.get_unless(shard, &AtomicBool::new(false))
    }

    /// The same; `stop` ends a download early.
    ///
    /// # Errors
    /// As [`Cache::get`], or the download is stopped.
    pub fn get_unless(&self, shard: &RemoteShard, stop: &AtomicBool) -> Result<Cached> {
        self.folder.get(shard, stop, false)
    }

    /// As [`Cache::get`], in the version that the server has now.
    ///
    /// # Errors
    /// As [`Cache::get`].
    pub fn renew(&self, shard: &RemoteShard) -> Result<Cached> {
        self.folder.get(shard, &AtomicBool::new(false), true)
    }

    /// Runs `task` in a background thread of the cache, after the tasks before it. Its argument is set when the cache is closed.
    pub(in crate::data) fn in_background(&self, task: impl FnOnce(&AtomicBool) + Send + 'static) {
        self.prefetch.add(Box::new(task));
    }

    /// Downloads shards in the background, in this order. Errors appear when the shard is wanted. The shards may be removed
    /// before they are used if the cache is too small for them.
    pub fn prefetch(&self, shards: impl IntoIterator<Item = RemoteShard>) {
        for shard in shards {
            let folder = Arc::clone(&self.folder);
            self.in_background(move |stop| {
                if let Err(error) = folder.get(&shard, stop, false) {
                    report::detail(format_args!("read ahead: {error:#}"));
                }
            });
        }
    }
}

/// `vilg/shards` in the folder for caches of the user.
fn default_folder() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let caches =
        caches.hint("there is no home folder for the cache of remote shards", "set data.cache_dir (--cache-dir)")?;
    Ok(caches.join("vilg/shards"))
}
