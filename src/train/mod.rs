//! Training: one loop for every task, over the engine of [`engine`].
//!
//! Read [`train`] first: a step from top to bottom. Then [`engine`] (gradients), [`shards`] (what each rank holds),
//! [`optimizer`], [`schedule`], [`ema`], [`checkpoint`]. A [`Task`] says what a batch is and which segments it runs through.
//!
//! What a run would take, without running it: [`plan()`] (data), [`memory`] and [`fit`] (GPUs), [`held`] (ranks on a CPU).

pub mod checkpoint;
pub mod ema;
pub mod engine;
mod feed;
pub mod fit;
mod generator;
pub mod held;
mod image_tokenizer;
mod init;
mod layout;
pub mod memory;
pub mod optimizer;
mod plan;
mod reshard;
mod run_folder;
pub mod schedule;
pub mod shards;
mod signals;
pub mod sizes;
mod state;

use crate::{
    config::{Config, Task as Kind},
    dist::{self, Group},
    error::{Result, ensure},
    nn::{gradients, params::Params},
    report, runtime,
};
use candle_core::{Tensor, Var};
pub use plan::{Plan, plan, plan_without};
use run_folder::RunFolder;
use serde_json::{Value, json};
use shards::Shards;
use signals::Stop;
use state::RunState;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

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
pub struct Measured {
    /// Losses by name; the first is shown first.
    pub losses: Vec<(&'static str, f64)>,
    /// How much of `unit` the step went through.
    pub amount: usize,
    pub unit: &'static str,
}

/// What is trained: the part of the loop that differs between tasks.
pub trait Task {
    /// The trainable parameters.
    fn params(&self) -> &Params;

    /// Digests of what the weights belong to beside the configuration.
    fn identity(&self) -> Result<BTreeMap<String, String>>;

    /// Whether the configuration keeps this parameter from ever getting a gradient.
    fn idle(&self, _name: &str) -> bool {
        false
    }

    /// The names of the parameters of each segment of the chain.
    fn units(&self) -> Vec<Vec<String>>;

    /// Adds the gradients of this rank's samples of step `step` (counted from 1) to those in `shards`. What was measured
    /// is of all ranks.
    fn gradients(&mut self, step: u64, shards: &mut Shards) -> Result<Measured>;

    /// Changes that no gradient makes, after the optimizer's update; the same on all ranks.
    fn after_step(&mut self, step: u64) -> Result<()>;

    /// What the task must remember across a restart, beside its parameters.
    fn state(&self) -> Value;

    /// Takes back what [`Task::state`] gave.
    fn restore(&mut self, state: &Value) -> Result<()>;

    /// Draws the sample picture with the given weights.
    fn sample(&self, weights: HashMap<String, Tensor>, path: &Path) -> Result<()>;

    /// Writes the model folder with the given weights.
    fn publish(&self, weights: HashMap<String, Tensor>, folder: &Path) -> Result<()>;
}

/// Trains what the configuration says, in `runs/NAME` below the current folder.
pub fn run(config: &Config, resume: &Resume, ranks: usize) -> Result<()> {
    run_below(Path::new(""), config, resume, ranks, &Stop::on_signals()?)
}

fn run_below(parent: &Path, config: &Config, resume: &Resume, ranks: usize, stop: &Stop) -> Result<()> {
    sizes::check_ranks(config, ranks)?;
    let patience = Duration::from_secs(config.train.rank_timeout);
    dist::launch(ranks, patience, |group| {
        let (mut task, folder) = prepare(parent, config, resume, group)?;
        train(group, config, task.as_mut(), folder, resume, stop)
    })?;
    Ok(())
}

/// The task, with the weights to start from where nothing was trained yet, and the run's folder below `parent`.
fn prepare(parent: &Path, config: &Config, resume: &Resume, group: &Group) -> Result<(Box<dyn Task>, RunFolder)> {
    // The task first: a configuration that cannot be trained leaves no run folder behind.
    let task = task(config, group)?;
    let resumes = matches!(resume, Resume::From(_)) || checkpoint::any(&run_folder::checkpoints(parent, config))?;
    if !resumes {
        init::take_weights(config, task.as_ref())?;
    }
    group.same("configuration", &config.to_toml()?)?;
    group.same("vocabulary or image tokenizer", &format!("{:?}", task.identity()?))?;
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

/// Steps in a row that may have a gradient that is not finite.
const MAX_SKIPPED: u64 = 10;

fn train(
    group: &Group,
    config: &Config,
    task: &mut dyn Task,
    mut folder: RunFolder,
    resume: &Resume,
    stop: &Stop,
) -> Result<()> {
    let settings = &config.train;
    let whole = |name: &str, var: &Var| optimizer::is_muons(settings, name, var);
    let mut shards = Shards::new(group, settings.shard_stage, task.params(), &task.units(), whole)?;
    let mut run = RunState::start(config, task, &mut shards, &folder.checkpoints(), resume)?;
    folder.begin(config, run.step)?;
    if run.step == 0 {
        // Before the first step, so that a full disk shows at once.
        run.save(config, task, &shards, &folder.checkpoints())?;
    }
    while run.step < settings.steps {
        let begun = Instant::now();
        run.step += 1;
        shards.begin(run.step);
        let measured = task.gradients(run.step, &mut shards)?;
        shards.finish()?;
        if run.step == 1 {
            let names: Vec<&String> = task.params().keys().filter(|name| !task.idle(name)).collect();
            gradients::check_complete(&names, &shards.sizes(&names)?)?;
        }
        let Agreed { norm, signal } = agree(&shards, stop)?;
        let rate = schedule::rate(settings, run.step);
        if norm.is_finite() {
            let scale = optimizer::clip_scale(norm, settings.clip_norm);
            run.optimizer.step(&mut shards, settings, run.step, rate, scale)?;
            shards.refresh()?;
            task.after_step(run.step)?;
            if let Some(average) = &mut run.average {
                ema::update(average, &shards, settings.ema_decay, run.step)?;
            }
            run.skipped = 0;
        } else {
            run.skipped += 1;
            let skipped = format!("step {}: the gradient is not finite; its update is skipped", run.step);
            group.leads().then(|| report::warn(skipped));
            ensure!(run.skipped < MAX_SKIPPED, "{MAX_SKIPPED} steps in a row had a gradient that is not finite");
        }
        if group.leads() {
            log(&mut folder, settings, &run, &measured, norm, rate * settings.learning_rate, begun)?;
        }

        let last = run.step == settings.steps;
        if signal != 0 || last || due(run.step, settings.checkpoint_every) {
            run.save(config, task, &shards, &folder.checkpoints())?;
            publish(&run, task, &shards, &folder)?;
        }
        if let Some(stopped) = Stop::error(signal, run.step).filter(|_| !last) {
            return Err(stopped);
        }
        let sampled = due(run.step, settings.sample_every) || (last && settings.sample_every > 0);
        if sampled && let Some(weights) = run.published(&shards)? {
            task.sample(weights, &folder.sample(run.step))?;
        }
    }
    // The leading rank looks: others might while it writes.
    let missing = group.leads() && !folder.model().exists();
    if group.sum(&[f64::from(u8::from(missing))])?[0] > 0.0 {
        publish(&run, task, &shards, &folder)?;
    }
    if group.leads() {
        report::note(format_args!("{} steps done; the model is in {}", run.step, folder.model().display()));
    }
    Ok(())
}

/// What all ranks know alike after the backward pass.
struct Agreed {
    /// The gradient's global norm.
    norm: f64,
    /// A signal to stop that came to any rank; 0: none.
    signal: i32,
}

/// The one exchange of a step beside the gradients'.
fn agree(shards: &Shards, stop: &Stop) -> Result<Agreed> {
    let squares = optimizer::squares(shards.reduced())?;
    let all = shards.group().gather(vec![(squares, stop.signal())])?;
    let squares = if shards.replicated() { squares } else { all.iter().map(|rank| rank[0].0).sum() };
    let signal = all.iter().map(|rank| rank[0].1).max().unwrap_or(0);
    Ok(Agreed { norm: squares.sqrt(), signal })
}

/// Writes the model folder.
fn publish(run: &RunState, task: &dyn Task, shards: &Shards, folder: &RunFolder) -> Result<()> {
    match run.published(shards)? {
        Some(weights) => task.publish(weights, &folder.model()),
        None => Ok(()),
    }
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// One line on stderr and one in metrics.jsonl.
fn log(
    folder: &mut RunFolder,
    settings: &crate::config::Train,
    run: &RunState,
    measured: &Measured,
    norm: f64,
    learning_rate: f64,
    begun: Instant,
) -> Result<()> {
    let seconds = begun.elapsed().as_secs_f64();
    let speed = measured.amount as f64 / seconds;
    let memory = runtime::resident_bytes();
    let losses: Vec<_> = measured.losses.iter().map(|(name, loss)| format!("{name} {loss:.4}")).collect();
    report::note(format_args!(
        "step {}/{}  {}  norm {norm:.3}  lr {learning_rate:.2e}  {speed:.0} {}/s  {:.2} GB",
        run.step,
        settings.steps,
        losses.join("  "),
        measured.unit,
        memory as f64 / 1e9,
    ));
    let mut line = json!({
        "step": run.step, "gradient_norm": norm, "learning_rate": learning_rate, "seconds": seconds,
        "per_second": speed, "unit": measured.unit, "memory_bytes": memory,
    });
    for (name, loss) in &measured.losses {
        line[*name] = json!(loss);
    }
    folder.log(&line)
}

#[cfg(test)]
mod ranks_tests;
#[cfg(test)]
pub(crate) mod task_tests;
#[cfg(test)]
mod tests;
