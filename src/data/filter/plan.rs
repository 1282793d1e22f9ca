//! What a run over many rows would cost, from the first rows of its inputs.

use super::{Settings, feature, input::Input, scan::scan, text::load_dictionary};
use crate::{
    data::embeddings::PairEmbedder,
    error::{Result, ensure, failed},
};
use std::time::Instant;

/// The first pass over the first rows.
#[derive(Debug, Clone, Copy)]
pub struct Sampled {
    pub rows: u64,
    /// Rows that break no rule of the first pass, so that they are compared with all others.
    pub passed: u64,
    pub rows_per_second: f64,
}

/// Scans the first rows of the inputs for about `seconds` seconds.
///
/// # Errors
/// An input cannot be read, or there are no rows.
pub fn sample(
    inputs: &[Input],
    settings: &Settings,
    matcher: Option<&PairEmbedder<'_>>,
    seconds: f64,
) -> Result<Sampled> {
    load_dictionary();
    let (start, mut rows, mut passed) = (Instant::now(), 0, 0);
    for input in inputs {
        scan(input, settings, matcher, &|_| {}, &mut |scanned| {
            rows += scanned.len() as u64;
            let features = scanned.iter().flatten();
            let broken = |one: &feature::Feature| one.broken.or_else(|| settings.broken_by_similarity(one.similarity));
            passed += features.filter(|one| broken(one).is_none()).count() as u64;
            Ok(start.elapsed().as_secs_f64() < seconds)
        })?;
        if start.elapsed().as_secs_f64() >= seconds {
            break;
        }
    }
    ensure!(rows > 0, failed("the inputs have no rows", "`vilg data inspect PATH` shows what a source contains"));
    Ok(Sampled { rows, passed, rows_per_second: rows as f64 / start.elapsed().as_secs_f64() })
}

/// Bytes of the files that store what the first pass finds out about `rows` rows.
pub fn disk_bytes(rows: f64) -> f64 {
    rows * feature::BYTES as f64
}

impl Settings {
    /// Bytes of memory to compare rows: one for the verdict of each of `rows` rows, and an entry for each caption or image
    /// of the `passed` ones that break no other rule. Captions and images are compared one after the other. The memory of
    /// the first pass does not depend on the number of rows.
    pub fn memory_bytes(&self, rows: f64, passed: f64) -> f64 {
        rows + passed * self.duplicates.bytes() as f64
    }
}
