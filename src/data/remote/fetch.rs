//! Copies remote shards to a folder: resumable and verified.

use super::{
    answer::Limits,
    record::Record,
    shard::RemoteShard,
    slot::{Filled, Filling, Slot, is_intact},
};
use crate::{
    error::{Context, Error, Hint, Result, ensure, failed, usage},
    report,
};
use serde::Serialize;
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

/// Folder of records and incomplete files in the output folder.
const STATE: &str = ".fetch";

/// A copy of remote shards to a folder.
#[derive(Debug)]
pub struct Fetch {
    pub shards: Vec<RemoteShard>,
    pub output: PathBuf,
    pub limits: Limits,
    /// Downloads at the same time.
    pub threads: usize,
}

/// A copied shard.
#[derive(Debug, Serialize)]
pub struct Fetched {
    pub url: String,
    /// Path below the output folder.
    pub name: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Digest of the content (BLAKE3, hexadecimal).
    pub blake3: String,
    pub state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Downloaded,
    /// An earlier run finished it.
    FinishedBefore,
}

impl Fetch {
    /// Copies the shards that are missing or have changed on the server. Stops at the first shard that fails. `progress` is
    /// called with numbers of new bytes.
    ///
    /// # Errors
    /// Two shards have the same name, a file in the folder is not a copy of its shard, or a download fails.
    pub fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<Fetched>> {
        let mut names = HashSet::new();
        if let Some(shard) = self.shards.iter().find(|shard| !names.insert(&shard.name)) {
            let message = format!("two sources have a shard {}: {}", shard.name.display(), shard.url());
            return Err(usage(message, "copy them to different folders"));
        }
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let done: Mutex<Vec<Option<Fetched>>> = Mutex::new(self.shards.iter().map(|_| None).collect());
        let first_error: Mutex<Option<Error>> = Mutex::new(None);
        let work = || {
            while let Some((at, shard)) =
                Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, self.shards.get(at)?)))
                && !stop.load(Ordering::Relaxed)
            {
                match self.copy(shard, progress, &stop) {
                    Ok(fetched) => {
                        if let Some(place) = done.lock().unwrap_or_else(PoisonError::into_inner).get_mut(at) {
                            *place = Some(fetched);
                        }
                    }
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            }
        };
        thread::scope(|scope| {
            (0..self.threads.clamp(1, self.shards.len().max(1))).for_each(|_| drop(scope.spawn(work)))
        });
        match first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()),
        }
    }

    fn copy(&self, shard: &RemoteShard, progress: &(dyn Fn(u64) + Sync), stop: &AtomicBool) -> Result<Fetched> {
        let slot = self.slot(shard)?;
        let fetched = |record: Record, state| Fetched {
            url: record.url,
            name: shard.name.clone(),
            bytes: record.size,
            blake3: record.blake3,
            state,
        };
        let present = self.present(&slot, shard)?;
        if present.is_none() && slot.finished(shard).is_some() {
            report::warn(format_args!("{} is damaged: downloading it again", slot.file.display()));
        }
        if let Some(record) = &present
            && (shard.version.is_some() || record.etag.is_none())
        {
            return Ok(fetched(record.clone(), State::FinishedBefore));
        }
        let known = present.as_ref().and_then(|record| record.etag.as_deref());
        let filling =
            Filling { limits: self.limits, known, reserve: &|_| Ok(()), progress: &|bytes| progress(bytes), stop };
        // While this process waited, another one may have copied the shard.
        let is_done = || Ok(present.is_none() && self.present(&slot, shard)?.is_some());
        let (record, state) = match slot.fill(shard, &filling, &is_done)? {
            Filled::Downloaded(record) => (Some(record), State::Downloaded),
            Filled::NotModified => (present, State::FinishedBefore),
            Filled::ByOther => (self.present(&slot, shard)?, State::FinishedBefore),
        };
        let gone = || format!("{} was removed by another process", slot.file.display());
        Ok(fetched(record.with_context(gone)?, state))
    }

    /// The paths of a shard; makes their folders.
    fn slot(&self, shard: &RemoteShard) -> Result<Slot> {
        let file = self.output.join(&shard.name);
        let state = self.output.join(STATE).join(&shard.name);
        for folder in [file.parent(), state.parent()].into_iter().flatten() {
            fs::create_dir_all(folder)
                .hint(format_args!("cannot create {}", folder.display()), "choose another folder with -o")?;
        }
        let beside = |extension: &str| {
            let mut path = state.clone().into_os_string();
            path.push(extension);
            PathBuf::from(path)
        };
        Ok(Slot { file, record: beside(".json"), part: beside(".part"), partial: beside(".part.json") })
    }

    /// The record of a finished and intact copy; `None` if it is missing or outdated.
    fn present(&self, slot: &Slot, shard: &RemoteShard) -> Result<Option<Record>> {
        if slot.file.symlink_metadata().is_err() {
            return Ok(None);
        }
        let recorded = Record::read(&slot.record);
        let is_copy = recorded.as_ref().is_some_and(|record| record.url == shard.url()) && is_file(&slot.file);
        let message = || format!("{} is not a copy of {}", slot.file.display(), shard.url());
        ensure!(is_copy, failed(message(), "choose another folder with -o, or remove this file"));
        let Some((mut file, record)) = slot.finished(shard) else { return Ok(None) };
        let intact = is_intact(&mut file, &record).with_context(|| format!("cannot read {}", slot.file.display()))?;
        Ok(intact.then_some(record))
    }
}

/// Whether a path is a regular file itself, not a link to one.
fn is_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_file())
}
