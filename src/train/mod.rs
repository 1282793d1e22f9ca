//! Training: one loop for every task, over the engine of [`engine`].
//!
//! Read [`trainer`] first: a step from top to bottom. Then [`engine`] (gradients), [`shards`] (what each rank holds),
//! [`optimizer`], [`schedule`], [`ema`], [`checkpoint`]. A [`Task`] says what a batch is and which segments it runs through.
//!
//! What a run would take, without running it: [`plan()`] (data), [`memory`] and [`fit`] (GPUs), [`held`] (ranks on a CPU).

pub mod checkpoint;
mod clock;
mod data_loader;
pub mod ema;
pub mod engine;
pub mod fit;
mod generator;
pub mod held;
mod image_tokenizer;
mod init;
mod layout;
mod log;
mod loss_scale;
pub mod memory;
pub mod optimizer;
mod owned;
mod plan;
mod reshard;
mod run_folder;
mod saving;
pub mod schedule;
pub mod shards;
mod signals;
pub mod sizes;
mod spikes;
mod state;
mod trainer;

use crate::{
    config::{Config, Task as Kind},
    dist::{Group, Ranks},
    error::Result,
    nn::{params::Params, weights::Values},
    runtime,
};
use candle_core::Tensor;
pub use plan::{Plan, plan, plan_without};
use run_folder::RunFolder;
use serde_json::Value;
use shards::Shards;
use signals::Stop;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    time::Duration,
};
use trainer::train;

/// Where a run starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// From the newest whole checkpoint of the run folder, or from the beginning.
    Auto,
    /// From the beginning; refused where checkpoints lie.
    Never,
    /// From this checkpoint.
    From(PathBuf),
}

/// What one step reports.
pub struct StepMetrics {
    /// Losses by name; the first is shown first.
    pub losses: Vec<(&'static str, f64)>,
    /// What else is to be watched, by name.
    pub figures: Vec<(&'static str, f64)>,
    /// How much of `unit` the step went through.
    pub amount: usize,
    pub unit: &'static str,
}

impl StepMetrics {
    /// The sum of the losses.
    fn loss(&self) -> f64 {
        self.losses.iter().map(|(_, loss)| loss).sum()
    }
}

/// What is trained: the part of the loop that differs between tasks.
pub trait Task {
    /// The trainable parameters.
    fn params(&self) -> &Params;

    /// What a parameter begins with, f32, if its variable is empty.
    fn fresh(&self, _name: &str) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// Digests of what the weights belong to beside the configuration.
    fn fingerprint(&self) -> Result<BTreeMap<String, String>>;

    /// Whether `digest`, from a checkpoint, stands for the same as this task's digest `name`.
    fn has_fingerprint(&self, name: &str, digest: &str) -> Result<bool> {
        Ok(self.fingerprint()?.get(name).is_some_and(|ours| ours == digest))
    }

    /// The number of samples of each data source.
    fn sources(&self) -> Vec<u64> {
        Vec::new()
    }

    /// Whether the configuration keeps this parameter from ever getting a gradient.
    fn idle(&self, _name: &str) -> bool {
        false
    }

    /// The names of the parameters of each segment of the chain.
    fn parameter_groups(&self) -> Vec<Vec<String>>;

    /// Adds the gradients of `loss_scale` times the loss of this rank's samples of step `step` (counted from 1) to those
    /// in `shards`. What was measured is of all ranks, and not scaled.
    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics>;

    /// The names of the samples of this rank's last step.
    fn samples(&self) -> Vec<String>;

    /// Changes that no gradient makes, after the optimizer's update; the same on all ranks.
    fn after_step(&mut self, step: u64, shards: &mut Shards) -> Result<()>;

    /// What the task must remember across a restart, beside its parameters.
    fn state(&self) -> Value;

    /// Takes back what [`Task::state`] gave.
    fn restore(&mut self, state: &Value) -> Result<()>;

    /// Draws the sample image with the given weights.
    fn sample(&self, weights: HashMap<String, Tensor>, path: &Path) -> Result<()>;

    /// Writes the model folder with the given weights.
    fn publish(&self, weights: BTreeMap<String, Values>, folder: &Path) -> Result<()>;
}

/// Trains what the configuration says, in `runs/NAME` below the current folder; stops with a checkpoint before
/// `time_limit` is over.
///
/// With `json`, each step's metrics go to stdout as a line of JSON as well.
pub fn run(config: &Config, resume: &Resume, ranks: &Ranks, time_limit: Option<Duration>, json: bool) -> Result<()> {
    let stop = Stop::on_signals(time_limit)?;
    let _watchdog = stop.watch(Duration::from_secs(config.train.rank_timeout))?;
    let work = || launch(Path::new(""), config, resume, ranks, &stop, json);
    match ranks {
        Ranks::Threads(1) => runtime::on_threads(work),
        // These have pools of their own; this thread only waits for them.
        _ => work(),
    }
}

#[cfg(test)]
fn run_below(parent: &Path, config: &Config, resume: &Resume, ranks: &Ranks, stop: &Stop) -> Result<()> {
    launch(parent, config, resume, ranks, stop, false)
}

fn launch(parent: &Path, config: &Config, resume: &Resume, ranks: &Ranks, stop: &Stop, json: bool) -> Result<()> {
    sizes::check_ranks(config, ranks.world_size())?;
    ranks.run(Duration::from_secs(config.train.rank_timeout), |group| {
        let (mut task, mut folder) = prepare(parent, config, resume, group)?;
        folder.to_stdout = json;
        train(group, config, task.as_mut(), folder, resume, stop)
    })
}

/// The task, with the weights to start from where nothing was trained yet, and the run's folder below `parent`.
fn prepare(parent: &Path, config: &Config, resume: &Resume, group: &Group) -> Result<(Box<dyn Task>, RunFolder)> {
    // Before anything is read: `--device` may ask for what is not there.
    runtime::device()?;
    // The task first: a configuration that cannot be trained leaves no run folder behind.
    let task = task(config, group)?;
    let resumes = matches!(resume, Resume::From(_)) || checkpoint::any(&run_folder::checkpoints(parent, config))?;
    if !resumes {
        init::take_weights(config, task.as_ref())?;
    }
    group.same("configuration", &config.to_toml()?)?;
    group.same("vocabulary or image tokenizer", &format!("{:?}", task.fingerprint()?))?;
    Ok((task, RunFolder::open(parent, config, group.leads())?))
}

/// Where a run of this configuration leaves its model.
pub fn model_folder(config: &Config) -> PathBuf {
    Path::new("runs").join(&config.name).join("model")
}

fn task(config: &Config, group: &Group) -> Result<Box<dyn Task>> {
    Ok(match config.task {
        Kind::Generator => Box::new(generator::GeneratorTask::new(config, group)?),
        Kind::ImageTokenizer => Box::new(image_tokenizer::ImageTokenizerTask::new(config, group)?),
    })
}

#[cfg(test)]
mod diverging_tests;
#[cfg(test)]
mod f16_tests;
#[cfg(test)]
mod hang_tests;
#[cfg(test)]
mod ranks_tests;
#[cfg(test)]
pub(crate) mod task_tests;
#[cfg(test)]
mod tests;
