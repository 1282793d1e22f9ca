//! Training: one loop for every task, over the engine of [`engine`].
//!
//! Read [`train`] first: a step from top to bottom. Then [`engine`] (gradients), [`optimizer`],
//! [`schedule`], [`ema`], [`checkpoint`]. A [`Task`] says what a batch is and which segments it runs through.

pub mod checkpoint;
pub mod ema;
pub mod engine;
mod feed;
mod generator;
mod image_tokenizer;
mod init;
pub mod optimizer;
mod plan;
mod run_folder;
pub mod schedule;
mod signals;
mod state;

use crate::{
    config::{Config, Task as Kind},
    error::{Result, ensure},
    nn::{gradients::Gradients, params::Params},
    report, runtime,
};
use candle_core::Tensor;
pub use plan::{Plan, plan};
use run_folder::RunFolder;
use serde_json::{Value, json};
use signals::Stop;
use state::RunState;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    time::Instant,
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

    /// Adds the gradients of step `step` (counted from 1) to `gradients`.
    fn gradients(&mut self, step: u64, gradients: &mut Gradients) -> Result<Measured>;

    /// Changes that no gradient makes, after the optimizer's update.
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
pub fn run(config: &Config, resume: &Resume) -> Result<()> {
    let (mut task, folder) = prepare(Path::new(""), config, resume)?;
    train(config, task.as_mut(), folder, resume, &Stop::on_signals()?)
}

/// The task, with the weights to start from where nothing was trained yet, and the run's folder below `parent`.
fn prepare(parent: &Path, config: &Config, resume: &Resume) -> Result<(Box<dyn Task>, RunFolder)> {
    // The task first: a configuration that cannot be trained leaves no run folder behind.
    let task = task(config)?;
    let resumes = matches!(resume, Resume::From(_)) || checkpoint::any(&run_folder::checkpoints(parent, config))?;
    if !resumes {
        init::take_weights(config, task.as_ref())?;
    }
    Ok((task, RunFolder::open(parent, config)?))
}

/// Where a run of this configuration leaves its model.
pub fn model_folder(config: &Config) -> PathBuf {
    Path::new("runs").join(&config.name).join("model")
}

fn task(config: &Config) -> Result<Box<dyn Task>> {
    Ok(match config.task {
        Kind::Generator => Box::new(generator::GeneratorTask::new(config)?),
        Kind::ImageTokenizer => Box::new(image_tokenizer::ImageTokenizerTask::new(config)?),
    })
}

/// Steps in a row that may have a gradient that is not finite.
const MAX_SKIPPED: u64 = 10;

fn train(config: &Config, task: &mut dyn Task, mut folder: RunFolder, resume: &Resume, stop: &Stop) -> Result<()> {
    let settings = &config.train;
    let mut run = RunState::start(config, task, &folder.checkpoints(), resume)?;
    folder.begin(config, run.step)?;
    if run.step == 0 {
        // Before the first step, so that a full disk shows at once.
        run.save(config, task, &folder.checkpoints())?;
    }
    let mut gradients = Gradients::default();
    while run.step < settings.steps {
        let begun = Instant::now();
        run.step += 1;
        gradients.clear();
        let measured = task.gradients(run.step, &mut gradients)?;
        if run.step == 1 {
            gradients.check_complete(task.params().keys().filter(|name| !task.idle(name)))?;
        }
        let norm = optimizer::global_norm(&gradients)?;
        let rate = schedule::rate(settings, run.step);
        if norm.is_finite() {
            let scale = optimizer::clip_scale(norm, settings.clip_norm);
            run.optimizer.step(task.params(), &gradients, settings, run.step, rate, scale)?;
            task.after_step(run.step)?;
            if let Some(average) = &mut run.average {
                ema::update(average, task.params(), settings.ema_decay, run.step)?;
            }
            run.skipped = 0;
        } else {
            run.skipped += 1;
            report::warn(format_args!("step {}: the gradient is not finite; its update is skipped", run.step));
            ensure!(run.skipped < MAX_SKIPPED, "{MAX_SKIPPED} steps in a row had a gradient that is not finite");
        }
        log(&mut folder, settings, &run, &measured, norm, rate * settings.learning_rate, begun)?;

        let stopped = stop.requested(run.step);
        let last = run.step == settings.steps;
        if stopped.is_some() || last || due(run.step, settings.checkpoint_every) {
            run.save(config, task, &folder.checkpoints())?;
            task.publish(run.published(task.params())?, &folder.model())?;
        }
        if let Some(stopped) = stopped.filter(|_| !last) {
            return Err(stopped);
        }
        if due(run.step, settings.sample_every) || (last && settings.sample_every > 0) {
            task.sample(run.published(task.params())?, &folder.sample(run.step))?;
        }
    }
    if !folder.model().exists() {
        task.publish(run.published(task.params())?, &folder.model())?;
    }
    report::note(format_args!("{} steps done; the model is in {}", run.step, folder.model().display()));
    Ok(())
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
pub(crate) mod task_tests;
#[cfg(test)]
mod tests;
