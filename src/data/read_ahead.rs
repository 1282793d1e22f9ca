//! Downloads the remote shards that the next batches need, in the order of the sampler, and keeps them in the cache until
//! they have been read.

use super::{dataset::Dataset, remote::Cached, sampler::Sampler, shard::Shard};
use crate::{
    config,
    error::{Result, ensure, usage},
    report,
};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

/// Maximum number of shards that are held open.
const MAX_HELD: usize = 512;

/// Source and shard, as numbers.
type Key = (usize, usize);

/// Checks that the remote shards in use fit into the cache: all of them in random order, otherwise those in which a buffer
/// of `data.shuffle_buffer` samples of each of `streams` streams is. `ranks` share the cache.
///
/// # Errors
/// They do not fit.
pub fn check_cache(dataset: &Dataset, config: &config::Data, streams: usize, ranks: usize) -> Result<()> {
    let Some(cache) = dataset.cache() else { return Ok(()) };
    let (max, gb) = (cache.max_bytes(), |bytes: u64| (bytes as f64 / 1e7).ceil() / 100.0);
    let remote: Vec<Vec<&Shard>> = dataset.sources.iter().map(|source| remote_shards(&source.shards)).collect();
    let total: u64 = remote.iter().flatten().map(|shard| bytes(shard)).sum();
    if total <= max {
        return Ok(());
    }
    let random = config.shuffle_buffer == 0;
    let message = format!("samples are read at random from {} GB of remote shards, more than data.cache_gb", gb(total));
    let hint = format!("read sequentially with data.shuffle_buffer = 1000, or set data.cache_gb = {}", gb(total));
    ensure!(!random, usage(message, hint));
    let (mut in_use, mut largest) = (0, 0);
    for shards in remote.iter().filter(|shards| !shards.is_empty()) {
        let samples: u64 = shards.iter().map(|shard| shard.len()).sum();
        let of_buffer = (config.shuffle_buffer as u64 * shards.len() as u64).div_ceil(samples.max(1)) + 1;
        let largest_here = shards.iter().map(|shard| bytes(shard)).max().unwrap_or(0);
        in_use += (streams as u64).saturating_mul(of_buffer).saturating_mul(largest_here);
        largest = largest.max(largest_here);
    }
    // A reader may replace a bad sample by one of any shard.
    let needed = (in_use + ranks as u64 * spare(config) * largest).min(total);
    let message = format!(
        "data.cache_gb = {} is too small: {streams} streams read shards of up to {} GB at the same time, which takes {} GB",
        config.cache_gb,
        gb(largest),
        gb(needed)
    );
    let hint = format!(
        "set data.cache_gb = {}, lower data.shuffle_buffer or train.batch_size, or write smaller shards",
        gb(needed)
    );
    ensure!(needed <= max, usage(message, hint));
    Ok(())
}

fn remote_shards(shards: &[Shard]) -> Vec<&Shard> {
    shards.iter().filter(|shard| shard.remote_file().is_some()).collect()
}

fn bytes(shard: &Shard) -> u64 {
    shard.remote_file().map_or(0, |file| file.size())
}

/// Number of shards beside those that are held.
fn spare(config: &config::Data) -> u64 {
    config.workers as u64 + 1
}

/// Bytes of the cache that each of `ranks` ranks may hold; without limit if all shards fit.
fn budget(dataset: &Dataset, config: &config::Data, ranks: usize) -> Option<u64> {
    let max = dataset.cache()?.max_bytes();
    if dataset.sources.iter().flat_map(|source| &source.shards).map(bytes).sum::<u64>() <= max {
        return Some(u64::MAX);
    }
    let max = max / ranks.max(1) as u64;
    let largest = dataset.sources.iter().flat_map(|source| &source.shards).map(bytes).max()?;
    Some(max.saturating_sub(spare(config) * largest))
}

/// A thread that goes through the positions ahead of a loader; it ends when this is dropped.
#[derive(Debug)]
pub struct ReadAhead {
    window: Arc<Window>,
    thread: Option<JoinHandle<()>>,
}

/// The shards of the next batches.
#[derive(Debug)]
struct Window {
    /// Bytes that they may take.
    budget: u64,
    /// Number of all remote shards.
    shards: usize,
    /// Whether shards are read sequentially; otherwise all of them stay in the cache.
    sequential: bool,
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Number of batches that the loader delivered.
    taken: u64,
    shards: HashMap<Key, Upcoming>,
    /// Bytes of these shards.
    bytes: u64,
    /// Number of shards that are held open.
    held: usize,
}

/// A shard that the next batches need.
#[derive(Debug)]
struct Upcoming {
    /// The last batch, of those looked at, that needs it.
    last: u64,
    bytes: u64,
    file: Option<Arc<Cached>>,
}

/// The samples that a loader will read.
pub struct Plan {
    pub dataset: Arc<Dataset>,
    pub sampler: Sampler,
    pub batch_size: usize,
    pub mine: Arc<[Range<usize>]>,
    /// Position of the first batch.
    pub position: u64,
}

impl ReadAhead {
    /// Starts to download; `None` if no shard is remote. `ranks` share the cache.
    pub fn start(plan: Plan, config: &config::Data, ranks: usize) -> Result<Option<Self>> {
        let Some(budget) = budget(&plan.dataset, config, ranks) else { return Ok(None) };
        let shards = plan.dataset.sources.iter().map(|source| remote_shards(&source.shards).len()).sum();
        let (state, changed, stop) = Default::default();
        let sequential = config.shuffle_buffer > 0;
        let window = Arc::new(Window { budget, shards, sequential, state, changed, stop });
        let shared = window.clone();
        let thread = thread::Builder::new().name("read-ahead".to_owned()).spawn(move || run(&plan, &shared))?;
        Ok(Some(Self { window, thread: Some(thread) }))
    }

    /// Notes that the loader delivered this many batches.
    pub fn advance(&self, taken: u64) {
        self.window.free(taken);
        self.window.changed.notify_all();
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.window.stop.store(true, Ordering::Relaxed);
        self.window.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Window {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until batch `batch` is due, or the window has space for more shards and the batch is at most an epoch ahead; false if the
    /// thread must end.
    fn wait(&self, batch: u64, epoch: u64) -> bool {
        let mut state = self.state();
        while !self.is_stopped()
            && batch > state.taken
            && (state.bytes >= self.budget || state.shards.len() == self.shards || batch - state.taken > epoch)
        {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !self.is_stopped()
    }

    /// Notes that `batch` needs a shard; true if it is new.
    fn need(&self, key: Key, bytes: u64, batch: u64) -> bool {
        let mut state = self.state();
        if let Some(known) = state.shards.get_mut(&key) {
            known.last = batch;
            return false;
        }
        state.bytes += bytes;
        state.shards.insert(key, Upcoming { last: batch, bytes, file: None });
        true
    }

    /// Keeps a downloaded shard in the cache, if it is still needed.
    fn hold(&self, key: Key, file: Arc<Cached>) {
        let mut state = self.state();
        let has_room = state.held < MAX_HELD;
        if let Some(upcoming) = state.shards.get_mut(&key).filter(|_| has_room) {
            upcoming.file = Some(file);
            state.held += 1;
        }
    }

    /// Lets go of the shards that no batch after `count` batches needs. In random order all shards stay.
    fn free(&self, count: u64) {
        let mut state = self.state();
        state.taken = count;
        if !self.sequential {
            return;
        }
        let State { taken, shards, bytes, held } = &mut *state;
        shards.retain(|_, upcoming| {
            let keep = upcoming.last >= *taken;
            if !keep {
                *bytes -= upcoming.bytes;
                *held -= usize::from(upcoming.file.is_some());
            }
            keep
        });
    }
}

fn run(plan: &Plan, window: &Arc<Window>) {
    let epoch = plan.sampler.epoch_length().div_ceil(plan.batch_size.max(1) as u64);
    let mut batch = 0;
    while window.wait(batch, epoch) {
        let start = plan.position.wrapping_add(batch.wrapping_mul(plan.batch_size as u64));
        for offset in plan.mine.iter().cloned().flatten() {
            let draw = plan.sampler.at(start.wrapping_add(offset as u64));
            if let Some(key) = draw.and_then(|draw| plan.dataset.shard_of(draw.source, draw.sample)) {
                download(plan, window, key, batch);
            }
        }
        batch += 1;
    }
}

fn download(plan: &Plan, window: &Arc<Window>, key: Key, batch: u64) {
    let shard = plan.dataset.sources.get(key.0).and_then(|source| source.shards.get(key.1));
    let Some(file) = shard.and_then(Shard::remote_file) else { return };
    if !window.need(key, file.size(), batch) {
        return;
    }
    let (file, window) = (file.clone(), window.clone());
    file.cache().clone().in_background(move |_| {
        if window.is_stopped() {
            return;
        }
        match file.get(&window.stop) {
            Ok(cached) => window.hold(key, cached),
            // The reader that needs the shard reports the error.
            Err(error) => report::detail(format_args!("read ahead: {error:#}")),
        }
    });
}
