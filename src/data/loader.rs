//! Prefetching threads that deliver batches in the exact order of the sampler.

use super::{
    bad::{Bad, BadCounts, Cause},
    blocks::BlockCache,
    dataset::Dataset,
    read_ahead::{Plan, ReadAhead},
    record::Record,
    sampler::Sampler,
};
use crate::{
    config,
    error::{Context, Result, ensure, usage},
};
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread::{self, JoinHandle},
};

/// Maximum number of bad samples in a row at one position.
const MAX_ATTEMPTS: u64 = 100;
/// Maximum number of reader threads.
const MAX_WORKERS: usize = 256;
/// Maximum number of samples in a batch.
const MAX_BATCH: usize = 1 << 20;
/// Maximum size of the batches waiting in the queues, in bytes, beyond one batch per worker.
const MAX_WAITING: usize = 1 << 30;

/// Data loader: batches of samples, or this rank's part of each batch, read ahead by worker threads.
///
/// Worker `w` of `W` reads the batches `w, w + W, …` and has its own bounded queue. Taking from the queues in turn
/// gives the exact order of the sampler for any number of workers. Dropping the loader ends its threads.
/// `data.prefetch` batches are read ahead, or fewer if they would take more than 1 GiB.
pub struct Loader {
    queues: Vec<Receiver<Result<Batch>>>,
    workers: Vec<JoinHandle<()>>,
    taken: usize,
    read: u64,
    bad: BadCounts,
    ignored: BadCounts,
    max_bad_ratio: f64,
    read_ahead: Option<ReadAhead>,
    /// Ends downloads of remote shards.
    stop: Arc<AtomicBool>,
}

/// What a worker reads from.
struct Reader {
    dataset: Arc<Dataset>,
    cache: Option<Arc<BlockCache>>,
    sampler: Sampler,
    stop: Arc<AtomicBool>,
}

struct Batch {
    /// `None` if a position had only bad samples.
    records: Vec<Option<Record>>,
    bad: Vec<Bad>,
}

impl Loader {
    /// Loads batches of `batch_size` samples, starting after `position` samples; of each batch only the samples `mine`.
    /// `ranks` share the cache of remote shards.
    ///
    /// # Errors
    /// A batch has more than 2²⁰ samples, or a thread cannot be started.
    pub fn new(
        dataset: &Arc<Dataset>,
        config: &config::Data,
        sampler: Sampler,
        batch_size: usize,
        mine: Vec<Range<usize>>,
        position: u64,
        ranks: usize,
    ) -> Result<Self> {
        let hint = "lower train.batch_size";
        ensure!(batch_size <= MAX_BATCH, usage(format_args!("{batch_size} samples in a batch: too many"), hint));
        let samples: usize = mine.iter().map(ExactSizeIterator::len).sum();
        let mine: Arc<[Range<usize>]> = mine.into();
        let cache = (config.shuffle_buffer > 0)
            .then(|| Arc::new(BlockCache::new(dataset.cache_bytes(samples, config.shuffle_buffer))));
        let count = config.workers.clamp(1, MAX_WORKERS);
        let depth = depth(config.prefetch, count, samples.saturating_mul(dataset.sample_bytes()));
        let stop = Arc::new(AtomicBool::new(false));
        let plan =
            Plan { dataset: dataset.clone(), sampler: sampler.clone(), batch_size, mine: mine.clone(), position };
        let read_ahead = ReadAhead::start(plan, config, ranks)?;
        let reader = Arc::new(Reader { dataset: dataset.clone(), cache, sampler, stop: stop.clone() });
        let (mut queues, mut workers) = (Vec::new(), Vec::new());
        for worker in 0..count {
            let (sender, receiver) = sync_channel(depth);
            let (reader, mine) = (reader.clone(), mine.clone());
            let work = move || {
                for batch in (worker as u64..).step_by(count) {
                    let start = position.wrapping_add(batch.wrapping_mul(batch_size as u64));
                    let read = reader.batch(start, &mine);
                    let failed = read.is_err();
                    // The loader was dropped.
                    if sender.send(read).is_err() || failed {
                        return;
                    }
                }
            };
            let spawned = thread::Builder::new().name(format!("data-{worker}")).spawn(work);
            workers.push(spawned.context("cannot start a data thread")?);
            queues.push(receiver);
        }
        let (bad, ignored) = Default::default();
        let (taken, read, max_bad_ratio) = (0, 0, config.max_bad_ratio);
        Ok(Self { queues, workers, taken, read, bad, ignored, max_bad_ratio, read_ahead, stop })
    }

    /// The next batch. Bad samples are replaced and counted.
    ///
    /// # Errors
    /// Too many samples are bad, a remote shard cannot be downloaded, or a data thread ended.
    pub fn next_batch(&mut self) -> Result<Vec<Record>> {
        let queue = self.queues.get(self.taken % self.queues.len()).context("a loader without workers")?;
        let batch = queue.recv().context("a data thread ended")??;
        self.taken += 1;
        if let Some(read_ahead) = &self.read_ahead {
            read_ahead.advance(self.taken as u64);
        }
        self.read += (batch.records.len() + batch.bad.len()) as u64;
        batch.bad.into_iter().for_each(|bad| self.bad.add(bad));
        self.bad.check(self.read, self.max_bad_ratio)?;
        let records: Option<Vec<Record>> = batch.records.into_iter().collect();
        let ignored = records.iter().flatten().filter_map(|record| record.ignored.clone());
        ignored.for_each(|one| self.ignored.add(one));
        records.with_context(|| format!("{MAX_ATTEMPTS} bad samples in a row: {}", self.bad))
    }

    /// Bad samples found so far.
    pub fn bad(&self) -> &BadCounts {
        &self.bad
    }

    /// Damaged JSON of good samples found so far.
    pub fn ignored(&self) -> &BadCounts {
        &self.ignored
    }
}

/// Capacity in batches of `bytes` bytes of each of the `workers` queues.
fn depth(prefetch: usize, workers: usize, bytes: usize) -> usize {
    prefetch.min(MAX_WAITING / bytes.max(1)).div_ceil(workers).max(1)
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.queues.clear();
        for worker in self.workers.drain(..) {
            // A panic of a worker has already been printed by the panic hook.
            let _ = worker.join();
        }
    }
}

impl Reader {
    fn batch(&self, start: u64, mine: &[Range<usize>]) -> Result<Batch> {
        let mut bad = Vec::new();
        let positions = mine.iter().cloned().flatten().map(|offset| start + offset as u64);
        let records = positions.map(|position| self.one(position, &mut bad)).collect::<Result<_>>()?;
        Ok(Batch { records, bad })
    }

    /// The sample at `position`, or the deterministic replacement of a bad one. A shard that cannot be downloaded is an error:
    /// its samples are not replaced.
    fn one(&self, position: u64, bad: &mut Vec<Bad>) -> Result<Option<Record>> {
        let Some(first) = self.sampler.at(position) else {
            bad.push(Bad::new(Cause::Unreadable, "no samples"));
            return Ok(None);
        };
        let mut draw = first;
        for attempt in 0..MAX_ATTEMPTS {
            let _held = self.dataset.hold(draw.source, draw.sample, &self.stop)?;
            match self.dataset.read_with(self.cache.as_deref(), draw.source, draw.sample) {
                Ok(mut record) => {
                    let choice = self.sampler.caption(draw, record.captions.len());
                    if let Some(caption) = record.captions.get(choice) {
                        record.caption.clone_from(caption);
                    }
                    return Ok(Some(record));
                }
                Err(one) => bad.push(one),
            }
            draw = self.sampler.replacement(position, attempt, first);
        }
        Ok(None)
    }
}
