//! Data and steps of a run, without running it: `vilg train --dry-run`.

use super::sizes::Sizes;
use crate::{
    config::{self, Config},
    data::{self, Dataset, Kind, remote::is_remote},
    error::Result,
};
use serde::Serialize;

/// A run's plan.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// Samples, shards and weight of each source.
    pub sources: Vec<SourcePlan>,
    pub steps: u64,
    /// Samples of one step.
    pub samples_a_step: usize,
    /// Maximum number of codes and text tokens that a step predicts; for an image tokenizer, the codes.
    pub tokens_a_step: usize,
    /// Number of epochs; `None` if some sources are missing.
    pub epochs: Option<f64>,
}

/// What was found of a data source.
#[derive(Debug, Serialize)]
pub struct SourcePlan {
    pub path: String,
    pub shards: usize,
    pub samples: u64,
    pub weight: f64,
}

/// Opens the sources and counts.
///
/// # Errors
/// A source is missing or empty.
pub fn plan(config: &Config, sizes: &Sizes) -> Result<Plan> {
    planned(config, sizes, &config.data, true)
}

/// The same on a machine that lacks some sources; their paths are returned.
///
/// # Errors
/// A source is damaged or empty.
pub fn plan_without(config: &Config, sizes: &Sizes) -> Result<(Plan, Vec<String>)> {
    let mut here = config.data.clone();
    let mut missing = Vec::new();
    for source in std::mem::take(&mut here.sources) {
        // Remote shards would be downloaded to count their samples.
        if !is_remote(&source.path) && data::is_there(&source.path)? {
            here.sources.push(source);
        } else {
            missing.push(source.path);
        }
    }
    let plan = planned(config, sizes, &here, missing.is_empty())?;
    Ok((plan, missing))
}

/// The plan of a run of which the sources in `here` are opened; `all`: these are all sources.
fn planned(config: &Config, sizes: &Sizes, here: &config::Data, all: bool) -> Result<Plan> {
    let (settings, spec) = (&config.train, sizes.spec);
    let kind = spec.sample_kind(config, &sizes.inputs);
    let samples = spec.batch_sizes(settings).iter().map(|(_, size)| size).sum();
    let tokens = spec.predicted_tokens(config, &sizes.inputs);
    // `Dataset::open` reports an error if the configuration has no source at all.
    let sources = if all || !here.sources.is_empty() { sources(here, kind)? } else { Vec::new() };
    let epoch: f64 = sources.iter().map(|s| s.samples as f64 * s.weight).sum();
    let epochs = all.then(|| settings.steps as f64 * samples as f64 / epoch);
    Ok(Plan { sources, steps: settings.steps, samples_a_step: samples, tokens_a_step: tokens, epochs })
}

fn sources(here: &config::Data, kind: Kind) -> Result<Vec<SourcePlan>> {
    let found = Dataset::open(here, kind)?.sources;
    let plan = |s: &data::Source| SourcePlan {
        path: s.path.clone(),
        shards: s.shards.len(),
        samples: s.len(),
        weight: s.weight,
    };
    Ok(found.iter().map(plan).collect())
}
