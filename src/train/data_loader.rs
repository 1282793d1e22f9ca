//! The samples of each step: step s starts at position `(s - 1) · samples per step` of the sampler's order, so that a
//! resumed run needs only the step. Each rank reads its own range of every batch.

use crate::{
    config::{Config, Data, Source},
    data::{self, Dataset, Kind, Loader, Record, Sampler},
    dist::{self, Group},
    error::{Context, Result, ensure, failed},
    report, runtime,
};
use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

/// Prefetches the samples of a run, from any step on.
pub struct DataLoader {
    dataset: Arc<Dataset>,
    config: crate::config::Data,
    sampler: Sampler,
    /// Samples per step on all ranks.
    samples: usize,
    /// The ranges of this rank, by batch.
    mine: Vec<Range<usize>>,
    loader: Option<(u64, Loader)>,
    bad: u64,
    /// Samples with damaged JSON at the last warning.
    ignored: u64,
    /// Number of ranks on this machine, which share the cache of remote shards.
    ranks: usize,
    /// Names of the samples of the last step.
    names: Vec<String>,
    /// How long the last call of [`DataLoader::next`] took.
    waited: Duration,
    /// The same batches of `data.validation`.
    validation: Option<Box<DataLoader>>,
}

impl DataLoader {
    /// A loader of batches of these sizes from the sources of the configuration, and from its validation data.
    pub fn new(config: &Config, kind: Kind, batches: &[usize], group: &Group) -> Result<Self> {
        let path = config.data.validation.clone();
        if path.is_empty() {
            return Self::of(config, "data", kind, batches, group);
        }
        let sources = vec![Source { path, weight: 1.0 }];
        let data = Data { sources, shuffle_buffer: 0, prefetch: 1, ..config.data.clone() };
        let held_out = Config { data, ..config.clone() };
        let validation = Self::of(&held_out, "validation data", kind, batches, group).context("data.validation")?;
        let training = Self::of(config, "data", kind, batches, group)?;
        let hint = "encode both with the same image tokenizer";
        let same = validation.dataset.codes() == training.dataset.codes();
        ensure!(same, failed("the codes in data.validation and in data.sources differ in kind", hint));
        Ok(Self { validation: Some(Box::new(validation)), ..training })
    }

    fn of(config: &Config, what: &str, kind: Kind, batches: &[usize], group: &Group) -> Result<Self> {
        let dataset = Arc::new(Dataset::open(&config.data, kind)?);
        let samples = batches.iter().sum::<usize>();
        let sampler = Sampler::new(config.seed, "train", &dataset.shares());
        let sampler = match config.data.shuffle_buffer {
            0 => sampler,
            buffer => sampler.streamed(samples as u64, buffer as u64, dataset.shard_lengths()),
        };
        let length = sampler.epoch_length();
        if group.leads() {
            report::note(format_args!(
                "{what}: {} samples in {} sources; an epoch shows {length} in {} steps",
                dataset.shares().iter().map(|(count, _)| count).sum::<u64>(),
                dataset.sources.len(),
                length.div_ceil(samples.max(1) as u64),
            ));
            if dataset.bad.total() > 0 {
                report::warn(format_args!("damaged shards: {}", dataset.bad));
            }
        }
        let mut first = 0;
        let mine = batches.iter().map(|size| {
            let part = dist::part(*size, group.rank(), group.world_size());
            let mine = first + part.start..first + part.end;
            first += size;
            mine
        });
        let mine: Vec<Range<usize>> = mine.collect();
        let mut ranks = 1;
        if dataset.cache().is_some() {
            let own = mine.iter().map(ExactSizeIterator::len).sum::<usize>();
            let here = on_this_machine(group, own as u64)?;
            ranks = here.len();
            data::check_cache(&dataset, &config.data, here.iter().sum::<u64>() as usize, ranks)?;
        }
        Ok(Self {
            dataset,
            config: config.data.clone(),
            sampler,
            samples,
            mine,
            loader: None,
            bad: 0,
            ignored: 0,
            ranks,
            names: Vec::new(),
            waited: Duration::ZERO,
            validation: None,
        })
    }

    /// This rank's samples of a batch (counted from 1) of the validation data, the same each time; see [`DataLoader::next`].
    ///
    /// # Errors
    /// There is no validation data, or none of it can be used.
    pub fn validation(&mut self, batch: u64) -> Result<Vec<(u64, Vec<Record>)>> {
        self.validation.as_mut().context("there is no validation data")?.next(batch)
    }

    /// The data set.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The names of this rank's samples of the last step.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How long this rank waited for the samples of the last step.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The same `count` samples each time, for sample images; unreadable ones are left out.
    pub fn fixed(&self, count: usize) -> Vec<Record> {
        let draws = (0..count as u64).filter_map(|position| self.sampler.at(position));
        draws.filter_map(|draw| self.dataset.read(draw.source, draw.sample).ok()).collect()
    }

    /// This rank's samples of `step` (counted from 1), batch by batch, each with the position of its first one.
    pub fn next(&mut self, step: u64) -> Result<Vec<(u64, Vec<Record>)>> {
        let begun = Instant::now();
        let mut loader = match self.loader.take() {
            Some((next, loader)) if next == step => loader,
            _ => {
                let position = (step - 1) * self.samples as u64;
                Loader::new(
                    &self.dataset,
                    &self.config,
                    self.sampler.clone(),
                    self.samples,
                    self.mine.clone(),
                    position,
                    self.ranks,
                )?
            }
        };
        let records = loader.next_batch()?;
        self.waited = begun.elapsed();
        self.names = records.iter().map(|record| record.key.clone()).collect();
        let mut records = records.into_iter();
        if loader.bad().total() > self.bad {
            self.bad = loader.bad().total();
            report::warn(format_args!("bad samples were replaced so far: {}", loader.bad()));
        }
        // Only at powers of ten: whole data sets can have such JSON.
        if loader.ignored().total() >= (10 * self.ignored).max(1) {
            self.ignored = loader.ignored().total();
            report::warn(format_args!("damaged JSON was ignored so far: {}", loader.ignored()));
        }
        self.loader = Some((step + 1, loader));
        let batch = |mine: &Range<usize>| (mine.start as u64, records.by_ref().take(mine.len()).collect());
        Ok(self.mine.iter().map(batch).collect())
    }
}

/// What the ranks on this machine give, this one among them.
fn on_this_machine(group: &Group, ours: u64) -> Result<Vec<u64>> {
    let host = blake3::hash(runtime::host_identity().as_bytes());
    let host = u64::from_le_bytes(*host.as_bytes().first_chunk().context("a digest")?);
    let all = group.gather(vec![host, ours])?;
    Ok(all.iter().filter(|one| one.first() == Some(&host)).filter_map(|one| one.get(1).copied()).collect())
}
