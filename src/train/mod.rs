//! Training: one loop for every task, over the [`engine`].
//!
//! Read [`trainer`] first: a step from top to bottom. Then [`engine`] (gradients; [`contrast`] for a matcher), [`shards`] (what each rank holds),
//! [`optimizer`], [`schedule`], [`ema`], [`checkpoint`]. [`tasks`] has a file for each task: what a batch is, and which
//! segments it runs through.
//!
//! Planning without training: [`plan()`] (data), [`memory`], [`fit`] and [`roofline`] (GPUs), [`held`] (ranks on a CPU).

pub mod checkpoint;
mod clock;
pub mod contrast;
mod data_loader;
pub mod decoding_time;
pub mod ema;
pub mod engine;
pub mod fit;
pub mod held;
mod init;
pub mod inputs;
mod layout;
mod log;
mod loss_scale;
pub mod memory;
pub mod optimizer;
mod owned;
mod plan;
mod publishing;
mod reshard;
pub mod roofline;
mod run_folder;
mod saving;
pub mod schedule;
pub mod shards;
mod signals;
pub mod sizes;
mod spikes;
mod state;
pub mod tasks;
mod tensorboard;
mod trainer;
mod utilization;

use crate::{
    bundle,
    config::Config,
    dist::{Group, Ranks},
    error::Result,
    report, runtime,
};
pub use plan::{Plan, plan, plan_without};
use run_folder::RunFolder;
use signals::Stop;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tasks::{Task, TaskSpec};
use trainer::train;

/// Where a run starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// From the newest complete checkpoint of the run folder, or from the beginning.
    Auto,
    /// From the beginning; an error if there are checkpoints.
    Never,
    /// From this checkpoint.
    From(PathBuf),
}

/// The metrics of a step.
pub struct StepMetrics {
    /// Losses by name, in the order of the log line.
    pub losses: Vec<(&'static str, f64)>,
    /// Other metrics by name.
    pub figures: Vec<(&'static str, f64)>,
    /// The number of `unit` that the step processed: tokens, images.
    pub amount: usize,
    pub unit: &'static str,
    /// Model FLOPs of the step, forward and backward, of all ranks; recomputation does not count.
    pub flops: f64,
}

impl StepMetrics {
    /// The sum of the losses.
    fn loss(&self) -> f64 {
        self.losses.iter().map(|(_, loss)| loss).sum()
    }
}

/// Trains the task of the configuration in `runs/NAME` below the current folder, and stops with a checkpoint before
/// `time_limit` is over. With `json`, the metrics of each step also go to stdout as a line of JSON.
pub fn run(config: &Config, resume: &Resume, ranks: &Ranks, time_limit: Option<Duration>, json: bool) -> Result<()> {
    let stop = Stop::on_signals(time_limit)?;
    let _watchdog = stop.watch(Duration::from_secs(config.train.rank_timeout))?;
    let work = || launch(Path::new(""), tasks::spec(config.task), config, resume, ranks, &stop, json);
    match ranks {
        Ranks::Threads(1) => runtime::on_threads(work),
        // They have thread pools of their own.
        _ => work(),
    }
}

#[cfg(test)]
fn run_below(parent: &Path, config: &Config, resume: &Resume, ranks: &Ranks, stop: &Stop) -> Result<()> {
    launch(parent, tasks::spec(config.task), config, resume, ranks, stop, false)
}

#[cfg(test)]
fn prepare_task(parent: &Path, config: &Config, resume: &Resume, group: &Group) -> Result<(Box<dyn Task>, RunFolder)> {
    prepare(parent, tasks::spec(config.task), config, resume, group)
}

fn launch(
    parent: &Path,
    spec: &dyn TaskSpec,
    config: &Config,
    resume: &Resume,
    ranks: &Ranks,
    stop: &Stop,
    json: bool,
) -> Result<()> {
    sizes::check_ranks(spec, config, ranks.world_size())?;
    ranks.run(Duration::from_secs(config.train.rank_timeout), |group| {
        let (mut task, mut folder) = prepare(parent, spec, config, resume, group)?;
        folder.to_stdout = json;
        train(group, config, task.as_mut(), folder, resume, stop)
    })
}

/// The task, with initial weights unless the run resumes from its own, and the run folder below `parent`.
fn prepare(
    parent: &Path,
    spec: &dyn TaskSpec,
    config: &Config,
    resume: &Resume,
    group: &Group,
) -> Result<(Box<dyn Task>, RunFolder)> {
    // Before anything is read: `--device` may name a missing device.
    runtime::device()?;
    // The task first: a configuration that cannot be trained leaves no run folder behind.
    let task = spec.start(config, group)?;
    let resumes = matches!(resume, Resume::From(_)) || checkpoint::any(&run_folder::checkpoints(parent, config))?;
    // The base of adapters is not in their checkpoints.
    if !resumes || config.lora.is_on() {
        init::take_weights(spec, config, task.as_ref())?;
    }
    group.same("program", &report::version().to_string())?;
    group.same("configuration", &config.to_toml()?)?;
    group.same("vocabulary or image tokenizer", &format!("{:?}", task.fingerprint()?))?;
    Ok((task, RunFolder::open(parent, config, group.leads())?))
}

/// What a run of this configuration writes, and its folder: a model, or an adapter.
pub fn output(config: &Config) -> (&'static str, PathBuf) {
    let name = if config.lora.is_on() { bundle::ADAPTER } else { "model" };
    (name, Path::new("runs").join(&config.name).join(name))
}

#[cfg(test)]
mod answer_tests;
#[cfg(test)]
mod diverging_tests;
#[cfg(test)]
mod end_to_end_tests;
#[cfg(test)]
mod f16_tests;
#[cfg(test)]
mod hang_tests;
#[cfg(test)]
mod joint_tests;
#[cfg(test)]
mod lora_tests;
#[cfg(test)]
mod matcher_tests;
#[cfg(test)]
mod normalize_tests;
#[cfg(test)]
mod ranks_tests;
#[cfg(test)]
mod resume_tests;
#[cfg(test)]
pub(crate) mod task_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod utilization_tests;
#[cfg(test)]
mod validation_tests;
