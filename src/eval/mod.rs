//! Evaluation of a model: retrieval accuracy, FID and CLIP score of generated images, metrics of captions, reconstruction
//! quality of image tokenizers, and ratings by people.

pub mod ablation;
pub mod caption_metrics;
pub mod captioning;
pub mod color_error;
pub mod faithfulness;
pub mod features;
pub mod fid;
pub mod human;
pub mod matcher;
pub mod naming;
pub mod reconstruction;
pub mod reranking;
mod resume;
pub mod retrieval;
pub mod similarity;
pub mod t2i;
pub mod vqa;

use crate::{
    config,
    data::{BadCounts, Dataset, Kind, Record},
    error::{Result, ensure, failed},
    random::Random,
    report,
};
use image::RgbImage;
use rayon::prelude::*;
use serde::Serialize;
use std::fmt;

/// A rate of successes with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    pub hits: usize,
    pub of: usize,
    pub rate: f64,
    /// Bounds of the 95 % Wilson score interval.
    pub interval: [f64; 2],
}

impl Rate {
    /// The rate of `hits` among `of` tries.
    pub fn new(hits: usize, of: usize) -> Self {
        let (n, z) = (of.max(1) as f64, 1.959_964);
        let rate = hits as f64 / n;
        let centre = rate + z * z / (2.0 * n);
        let half = z * (rate * (1.0 - rate) / n + z * z / (4.0 * n * n)).sqrt();
        let bound = |x: f64| (x / (1.0 + z * z / n)).clamp(0.0, 1.0);
        Self { hits, of, rate, interval: [bound(centre - half), bound(centre + half)] }
    }
}

impl fmt::Display for Rate {
    /// `23.0 % (92 of 400, 95 % interval 19.1 to 27.4 %)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hits, of, rate, interval: [low, high] } = self;
        let [rate, low, high] = [rate, low, high].map(|share| share * 100.0);
        write!(f, "{rate:.1} % ({hits} of {of}, 95 % interval {low:.1} to {high:.1} %)")
    }
}

/// `count` distinct indices below `from` (all if there are fewer), chosen and ordered by the keyed random numbers.
fn choose(count: usize, from: usize, seed: u64, purpose: &str, step: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..from).collect();
    let count = count.min(from);
    for i in 0..count {
        let mut random = Random::keyed(seed, purpose, step, i as u64);
        all.swap(i, i + random.below((from - i) as u64) as usize);
    }
    all.truncate(count);
    all
}

/// `samples` places of a data set (0: all), chosen and ordered by the keyed random numbers.
fn chosen(dataset: &Dataset, samples: usize, seed: u64, purpose: &str) -> Vec<(usize, u64)> {
    let places: Vec<_> = dataset.places().collect();
    let count = if samples == 0 { places.len() } else { samples };
    choose(count, places.len(), seed, purpose, 0).into_iter().filter_map(|i| places.get(i).copied()).collect()
}

/// Reads chosen samples ([`chosen`]) with a warning about bad ones.
///
/// # Errors
/// There is no such data, or no sample could be read.
fn read_chosen(path: &str, kind: Kind, samples: usize, seed: u64, purpose: &str) -> Result<Vec<Record>> {
    let dataset = open(path, kind)?;
    let places = chosen(&dataset, samples, seed, purpose);
    read_places(path, &dataset, places, |record| record)
}

/// What `take` takes of the samples at some places, with a warning about bad ones.
fn read_places<T: Send>(
    path: &str,
    dataset: &Dataset,
    places: Vec<(usize, u64)>,
    take: impl Fn(Record) -> T + Sync,
) -> Result<Vec<T>> {
    let read = |(source, sample)| dataset.read(source, sample).map(&take);
    let read: Vec<_> = places.into_par_iter().map(read).collect();
    let (mut found, mut bad) = (Vec::with_capacity(read.len()), dataset.bad.clone());
    for taken in read {
        match taken {
            Ok(taken) => found.push(taken),
            Err(error) => bad.add(error),
        }
    }
    tell_bad(path, &bad, found.len())?;
    Ok(found)
}

/// Calls `f` with the images at some places, in batches of `size` that bad images make smaller, with a warning about these.
fn each_batch_of_images(
    path: &str,
    dataset: &Dataset,
    places: &[(usize, u64)],
    size: usize,
    mut f: impl FnMut(Vec<RgbImage>) -> Result<()>,
) -> Result<()> {
    let (mut good, mut bad) = (0, dataset.bad.clone());
    let bar = report::bar(places.len() as u64, "extracting features");
    for places in places.chunks(size) {
        let read: Vec<_> = places.par_iter().map(|&(source, sample)| dataset.read(source, sample)).collect();
        let mut images = Vec::with_capacity(size);
        for record in read {
            match record {
                Ok(record) => images.extend(record.image),
                Err(error) => bad.add(error),
            }
        }
        good += images.len();
        bar.inc(places.len() as u64);
        if !images.is_empty() {
            f(images)?;
        }
    }
    bar.finish_and_clear();
    tell_bad(path, &bad, good)
}

/// The first caption of each sample at `path`, with a warning about samples that have none.
///
/// # Errors
/// There is no such data, or no sample has a caption.
pub fn captions(path: &str) -> Result<Vec<String>> {
    let dataset = open(path, Kind::Captions)?;
    let places: Vec<_> = dataset.places().collect();
    read_places(path, &dataset, places, |record| record.caption)
}

/// A text without case and white space, for comparisons: generated texts have neither.
fn plain(text: &str) -> String {
    text.to_lowercase().split_whitespace().collect()
}

/// Opens the samples at `path`.
fn open(path: &str, kind: Kind) -> Result<Dataset> {
    let source = config::Source { path: path.to_owned(), weight: 1.0 };
    Dataset::open(&config::Data { sources: vec![source], ..config::Data::default() }, kind)
}

/// Warns about samples that could not be read.
///
/// # Errors
/// No sample could be read.
fn tell_bad(path: &str, bad: &BadCounts, good: usize) -> Result<()> {
    bad.check_fetched()?;
    let hint = "`vilg data inspect PATH` shows what the source contains";
    ensure!(good > 0, failed(format_args!("nothing in `{path}` can be used: {bad}"), hint));
    if bad.total() > 0 {
        report::warn(format_args!("skipped in `{path}`: {bad}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Against statsmodels' proportion_confint(method="wilson"), rounded.
    #[test]
    fn wilson_s_interval() {
        let close = |hits, of, low: f64, high: f64| {
            let [l, h] = Rate::new(hits, of).interval;
            assert!((l - low).abs() < 5e-4 && (h - high).abs() < 5e-4, "{hits}/{of}: {l} {h}");
        };
        close(20, 100, 0.1334, 0.2888);
        close(0, 10, 0.0, 0.2775);
        close(10, 10, 0.7225, 1.0);
        close(1, 2, 0.0945, 0.9055);
        assert_eq!(Rate::new(0, 0).rate, 0.0);
    }

    #[test]
    fn choices_are_distinct_keyed_and_uniform() {
        let set: BTreeSet<_> = choose(5, 9, 1, "a", 0).into_iter().collect();
        assert!(set.len() == 5 && set.last() < Some(&9));
        assert_eq!(choose(9, 5, 1, "a", 0).len(), 5);
        assert_eq!(choose(5, 9, 1, "a", 0), choose(5, 9, 1, "a", 0));
        assert_ne!(choose(50, 90, 1, "a", 0), choose(50, 90, 1, "a", 1));
        let mut counts = [0; 6];
        (0..6000).flat_map(|step| choose(2, 6, 1, "b", step)).for_each(|i| counts[i] += 1);
        assert!(counts.iter().all(|count| (1850..2150).contains(count)), "{counts:?}");
    }
}
