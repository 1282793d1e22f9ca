//! `vilg bench`: speed and memory of the real code on synthetic data.
//!
//! A measurement is one warm-up run and then timed repetitions. The report has the median, the spread and every value.
//! The share of the peak refers to [`ops::peak_flops`], measured in the same run.

pub mod attention;
pub mod data;
mod flops;
mod matcher;
mod plot;
mod shapes;
mod statistics;
mod work;

pub use plot::plot;
pub use shapes::{SHAPES, Shape};
pub use statistics::Spread;

use crate::{
    config::Precision,
    error::Result,
    ops::{self, packed::Format},
    runtime,
};
use serde::Serialize;
use std::time::Instant;

/// The result of a measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub work: &'static str,
    pub shape: &'static str,
    pub precision: &'static str,
    pub batch: usize,
    /// `cpu` or `cuda:N`.
    pub device: String,
    pub threads: usize,
    pub parameters: usize,
    /// Time of one repetition, in seconds.
    pub seconds: Spread,
    /// Number of `unit`s that one repetition processes.
    pub amount: usize,
    pub unit: &'static str,
    /// `amount` / median.
    pub per_second: f64,
    /// Useful FLOPs of one repetition.
    pub flops: f64,
    pub flops_per_second: f64,
    /// Peak FLOP/s of multiply-adds on all threads, in the precision of the matrix products; `None` on a GPU.
    pub peak_flops_per_second: Option<f64>,
    pub share_of_peak: Option<f64>,
    /// Peak memory of this process so far, in bytes; `None` on a GPU, whose memory is not counted.
    pub peak_memory_bytes: Option<u64>,
}

/// Repeatable work on synthetic data.
struct Work<'a> {
    name: &'static str,
    precision: &'static str,
    /// Precision of the matrix products.
    factors: Precision,
    run: Box<dyn FnMut() -> Result<()> + 'a>,
    parameters: usize,
    amount: usize,
    unit: &'static str,
    flops: f64,
}

/// Times complete training steps of the generator: forward, backward, gradient clipping, optimizer update.
pub fn train(shape: &Shape, repeat: usize) -> Result<Report> {
    report(shape, repeat, work::train(shape)?)
}

/// Times complete training steps of the image tokenizer.
pub fn tokenizer(shape: &Shape, repeat: usize) -> Result<Report> {
    report(shape, repeat, work::tokenizer(shape)?)
}

/// Times complete training steps of the matcher.
pub fn matcher(shape: &Shape, repeat: usize) -> Result<Report> {
    report(shape, repeat, matcher::train(shape)?)
}

/// Times the matcher's embeddings of images.
pub fn embed(shape: &Shape, repeat: usize) -> Result<Report> {
    report(shape, repeat, matcher::embed(shape)?)
}

/// Times greedy generation: all codes of one image for each sequence, with weights stored in `format`.
pub fn decode(shape: &Shape, format: Format, repeat: usize) -> Result<Report> {
    report(shape, repeat, work::decode(shape, format)?)
}

fn report(shape: &Shape, repeat: usize, mut work: Work) -> Result<Report> {
    let seconds = seconds(repeat, &mut work.run)?;
    let on_cpu = runtime::device()?.is_cpu();
    let peak_memory_bytes = runtime::peak_bytes().filter(|_| on_cpu);
    let peak = on_cpu.then(|| ops::peak_flops(work.factors));
    Ok(Report {
        work: work.name,
        shape: shape.name,
        precision: work.precision,
        batch: shape.batch,
        device: runtime::facts().device,
        threads: rayon::current_num_threads(),
        parameters: work.parameters,
        amount: work.amount,
        unit: work.unit,
        per_second: work.amount as f64 / seconds.median,
        flops: work.flops,
        flops_per_second: work.flops / seconds.median,
        peak_flops_per_second: peak,
        share_of_peak: peak.map(|peak| work.flops / seconds.median / peak),
        peak_memory_bytes,
        seconds,
    })
}

/// Seconds of each of `repeat` repetitions, after one warm-up run that is not counted.
fn seconds(repeat: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<Spread> {
    let device = runtime::device()?;
    // A device computes while the host goes on.
    let mut run = || run().and_then(|()| Ok(device.synchronize()?));
    run()?;
    let timed = |_| {
        let begun = Instant::now();
        run()?;
        Ok(begun.elapsed().as_secs_f64())
    };
    Ok(Spread::of((0..repeat).map(timed).collect::<Result<_>>()?))
}
