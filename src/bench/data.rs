//! How fast samples are read from shards, in both orders.

use crate::{
    config,
    data::{Dataset, Kind, Loader, Sampler, are_codes, check_cache},
    error::Result,
};
use serde::Serialize;
use std::{sync::Arc, time::Instant};

/// What to read, and how.
pub struct Reading {
    pub data: config::Data,
    /// Side of the images in pixels, if the shards have images.
    pub image_size: u32,
    /// Number of samples of a batch.
    pub batch: usize,
    /// Number of samples to read in each repetition.
    pub samples: u64,
    pub repeat: usize,
}

/// The speed of one order.
#[derive(Debug, Serialize)]
pub struct Speed {
    pub order: &'static str,
    /// Median over the repetitions.
    pub samples_per_second: f64,
    /// Each repetition.
    pub all: Vec<f64>,
}

/// Times reading at random and with `data.shuffle_buffer`, in turn.
///
/// # Errors
/// A source has no samples, or too many samples are bad.
pub fn data(reading: &Reading) -> Result<[Speed; 2]> {
    let kind = if reading.data.sources.iter().all(|source| are_codes(&source.path, &reading.data)) {
        Kind::Codes
    } else {
        Kind::Pairs(reading.image_size)
    };
    let dataset = Arc::new(Dataset::open(&reading.data, kind)?);
    check_cache(&dataset, &reading.data, reading.batch, 1)?;
    let random = config::Data { shuffle_buffer: 0, ..reading.data.clone() };
    let mut speeds = [("random", Vec::new()), ("sequential", Vec::new())];
    for _ in 0..reading.repeat {
        for ((_, all), data) in speeds.iter_mut().zip([&random, &reading.data]) {
            all.push(read(&dataset, data, reading)?);
        }
    }
    Ok(speeds.map(|(order, all)| {
        let mut sorted = all.clone();
        sorted.sort_by(f64::total_cmp);
        Speed { order, samples_per_second: sorted.get(sorted.len() / 2).copied().unwrap_or(0.0), all }
    }))
}

/// Samples per second.
fn read(dataset: &Arc<Dataset>, data: &config::Data, reading: &Reading) -> Result<f64> {
    let sampler = Sampler::new(1, "train", &dataset.shares());
    let sampler = match data.shuffle_buffer {
        0 => sampler,
        buffer => sampler.streamed(reading.batch as u64, buffer as u64, dataset.shard_lengths()),
    };
    let start = Instant::now();
    let mut loader =
        Loader::new(dataset, data, sampler, reading.batch, std::iter::once(0..reading.batch).collect(), 0, 1)?;
    let mut samples = 0;
    while samples < reading.samples {
        samples += loader.next_batch()?.len() as u64;
    }
    Ok(samples as f64 / start.elapsed().as_secs_f64())
}
