//! Statistics of a source: counts, sizes, captions, and bad samples by cause.

use super::{
    bad::{Bad, BadCounts, Cause, printable},
    codes::CodesInfo,
    dataset::Source,
    image,
    record::{Kind, image_member},
    remote_source,
    shard::Shard,
};
use crate::error::Result;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;

/// The statistics of one source.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub path: String,
    pub shards: Vec<ShardCount>,
    #[serde(flatten)]
    pub found: Findings,
}

/// The number of samples in one shard.
#[derive(Debug, Serialize)]
pub struct ShardCount {
    pub name: String,
    pub samples: u64,
    /// Number of bad samples and of damaged places of the shard itself.
    pub bad: u64,
}

/// Statistics of samples.
#[derive(Debug, Default, Serialize)]
pub struct Findings {
    pub samples: u64,
    pub images: u64,
    pub codes: u64,
    /// Image sizes in pixels.
    pub widths: Spread,
    pub heights: Spread,
    /// Number of captions per sample.
    pub captions: Spread,
    /// Number of characters per caption.
    pub caption_lengths: Spread,
    pub bad: BadCounts,
    /// Damaged JSON of good samples, and files of folders that belong to no sample.
    pub ignored: BadCounts,
    /// Key and caption of the first good sample.
    pub example: Option<(String, String)>,
}

/// A histogram of values; serialized as minimum, median, mean and maximum.
#[derive(Debug, Default)]
pub struct Spread(BTreeMap<u64, u64>);

/// The summary of a [`Spread`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    pub min: u64,
    pub median: u64,
    pub mean: f64,
    pub max: u64,
}

impl Spread {
    fn add(&mut self, value: u64) {
        *self.0.entry(value).or_default() += 1;
    }

    fn merge(&mut self, other: Self) {
        for (value, count) in other.0 {
            *self.0.entry(value).or_default() += count;
        }
    }

    /// `None` if no value was counted.
    pub fn summary(&self) -> Option<Summary> {
        let count: u64 = self.0.values().sum();
        let mut below = 0;
        let mut median = self.0.iter().skip_while(|(_, n)| {
            below += **n;
            2 * below < count
        });
        let total: f64 = self.0.iter().map(|(value, n)| *value as f64 * *n as f64).sum();
        Some(Summary {
            min: *self.0.first_key_value()?.0,
            median: *median.next()?.0,
            mean: total / count as f64,
            max: *self.0.last_key_value()?.0,
        })
    }
}

impl Serialize for Spread {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.summary().serialize(serializer)
    }
}

impl Findings {
    fn merge(mut self, other: Self) -> Self {
        self.samples += other.samples;
        self.images += other.images;
        self.codes += other.codes;
        self.widths.merge(other.widths);
        self.heights.merge(other.heights);
        self.captions.merge(other.captions);
        self.caption_lengths.merge(other.caption_lengths);
        self.bad.merge(other.bad);
        self.ignored.merge(other.ignored);
        self.example = self.example.or(other.example);
        self
    }
}

impl Findings {
    /// Whether any image or code could be read.
    pub fn usable(&self) -> bool {
        self.images + self.codes > 0
    }
}

/// Reads every sample of a source. `progress` is called with the number of samples of each finished shard.
///
/// # Errors
/// A remote shard cannot be downloaded.
pub fn inspect(source: &Source, progress: impl Fn(u64)) -> Result<Inspection> {
    let mut shards = Vec::new();
    let mut found = Findings { bad: source.bad.clone(), ignored: source.ignored.clone(), ..Findings::default() };
    for (number, shard) in source.shards.iter().enumerate() {
        let _held = shard.hold_before(source.shards.get(number + 1))?;
        let mut of_shard = inspect_shard(shard);
        progress(shard.len());
        of_shard.bad.merge(shard.bad.clone());
        let (samples, bad) = (shard.len(), of_shard.bad.total());
        shards.push(ShardCount { name: printable(&shard.path.display().to_string()), samples, bad });
        found = found.merge(of_shard);
    }
    Ok(Inspection { path: source.path.clone(), shards, found })
}

fn inspect_shard(shard: &Shard) -> Findings {
    let info = remote_source::codes_of(shard).ok();
    // Merged in order, so that the examples do not depend on the number of threads.
    let each: Vec<Findings> = (0..shard.len() as usize)
        .collect::<Vec<_>>()
        .par_chunks(64)
        .map(|chunk| {
            chunk.iter().fold(Findings::default(), |all, i| all.merge(inspect_sample(shard, *i, info.as_ref())))
        })
        .collect();
    each.into_iter().fold(Findings::default(), Findings::merge)
}

fn inspect_sample(shard: &Shard, index: usize, info: Option<&CodesInfo>) -> Findings {
    let mut found = Findings { samples: 1, ..Findings::default() };
    if let Err(bad) = look_at(shard, index, info, &mut found) {
        found.bad.add(bad);
    }
    found
}

fn look_at(shard: &Shard, index: usize, info: Option<&CodesInfo>, found: &mut Findings) -> Result<(), Bad> {
    let (key, members) = shard.members(index, None)?;
    let locate = |bad| shard.locate(&key, bad);
    if let Some(npy) = members.get("npy") {
        let info = info.ok_or_else(|| Bad::new(Cause::BadCodes, "no readable codes.json next to the shard"));
        info.and_then(|info| info.parse(npy)).map_err(locate)?;
        found.codes += 1;
    } else {
        let image = image_member(&members).and_then(image::decode).map_err(locate)?;
        found.images += 1;
        found.widths.add(image.width().into());
        found.heights.add(image.height().into());
    }
    let record = shard.parse(&key, &members, Kind::Captions, None, &[])?;
    record.ignored.into_iter().for_each(|bad| found.ignored.add(bad));
    found.captions.add(record.captions.len() as u64);
    record.captions.iter().for_each(|caption| found.caption_lengths.add(caption.chars().count() as u64));
    found.example = Some((record.key, record.caption));
    Ok(())
}
