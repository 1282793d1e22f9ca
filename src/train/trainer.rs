//! The training loop: a step from top to bottom.

use super::{
    Resume, StepMetrics, Task, checkpoint, ema,
    log::StepLog,
    loss_scale::LossScale,
    optimizer::{self, GradientScale},
    publishing::Publishing,
    run_folder::RunFolder,
    saving::Saving,
    schedule,
    shards::Shards,
    signals::Stop,
    spikes::Spikes,
    state::RunState,
    utilization::StepTimes,
};
use crate::{
    config::{Config, Offload, Spike},
    dist::Group,
    error::{Result, ensure, failed},
    nn::gradients,
    ops::{self, Store},
    report, runtime,
};
use std::time::{Duration, Instant};

/// Maximum number of skipped updates in a row.
const MAX_SKIPPED: u64 = 10;
/// Maximum number of roll-backs because of spikes.
const MAX_ROLLBACKS: u64 = 5;

/// Trains until the last step, a signal or an error.
pub fn train(
    group: &Group,
    config: &Config,
    task: &mut dyn Task,
    folder: RunFolder,
    resume: &Resume,
    stop: &Stop,
) -> Result<()> {
    let mut trainer = Trainer::start(group, config, task, folder, resume, stop)?;
    while trainer.run.step < config.train.steps {
        trainer.step()?;
    }
    trainer.end()
}

/// The run of one rank.
struct Trainer<'a> {
    config: &'a Config,
    task: &'a mut dyn Task,
    folder: RunFolder,
    stop: &'a Stop,
    shards: Shards<'a>,
    run: RunState,
    saving: Saving<'a>,
    publishing: Publishing,
    log: StepLog,
}

/// What all ranks agree on after the backward pass.
struct Agreed {
    /// The gradient's global norm.
    norm: f64,
    /// The signal that any rank received; 0: none.
    signal: i32,
    /// Whether all ranks have written their files of the current checkpoint.
    saved: bool,
    /// The longest time that a rank waited for its samples.
    data_wait: Duration,
}

impl<'a> Trainer<'a> {
    fn start(
        group: &'a Group,
        config: &'a Config,
        task: &'a mut dyn Task,
        mut folder: RunFolder,
        resume: &Resume,
        stop: &'a Stop,
    ) -> Result<Self> {
        let settings = &config.train;
        group.shard_over(settings.hsdp_shard_size)?;
        if settings.overlap {
            group.overlap()?;
        }
        group.use_device(&runtime::device()?)?;
        let rounded = ops::rounds_to_bf16(settings.precision, &runtime::device()?);
        // A processor without bf16 reads the exact weights.
        let rounded = group.gather(vec![u8::from(rounded)])?.iter().all(|rank| rank[0] == 1);
        optimizer::check_frozen(settings, task.params())?;
        let handling = |name: &str, attributes| optimizer::handling(settings, rounded, name, attributes);
        let store = match settings.offload {
            Offload::None if !runtime::device()?.is_cpu() => Store::Device(runtime::device()?),
            Offload::None | Offload::Cpu => Store::Memory,
            Offload::Disk => Store::Disk(folder.offload(group.rank())),
        };
        let fresh = |name: &str| task.fresh(name);
        let mut shards =
            Shards::new(group, settings.zero_stage, store, task.params(), &task.parameter_groups(), handling, fresh)?;
        let run = RunState::start(config, task, &mut shards, &folder.checkpoints(), resume)?;
        folder.begin(config, run.step)?;
        let log = StepLog::start(settings, run.step, group.world_size());
        let saving = Saving::new(group, folder.checkpoints(), settings.keep_checkpoints);
        let publishing = Publishing::default();
        let mut trainer = Self { config, task, folder, stop, shards, run, saving, publishing, log };
        if trainer.run.step == 0 || matches!(resume, Resume::From(_)) {
            // Before the first step, so that a full disk shows at once.
            trainer.save(false)?;
            trainer.saving.finish()?;
        }
        Ok(trainer)
    }

    /// One step, from the samples to the checkpoint.
    fn step(&mut self) -> Result<()> {
        let (settings, begun, waited) = (&self.config.train, Instant::now(), self.shards.group().waited());
        self.run.step += 1;
        let step = self.run.step;
        self.shards.begin(step);
        let factor = self.run.loss_scale.map_or(1.0, LossScale::factor);
        if self.task.loss_changes_at(step + self.run.passed_over) {
            self.run.spikes = Spikes::default();
        }
        let measured = self.task.gradients(step + self.run.passed_over, factor, &mut self.shards)?;
        self.shards.finish()?;
        let Agreed { norm, signal, saved, data_wait } = self.agree(factor)?;
        let rate = schedule::rate(settings, step);
        let finite = norm.is_finite() && measured.loss().is_finite();
        if finite {
            self.run.loss_scale.iter_mut().for_each(LossScale::grow);
            self.saving.confirm(step - 1);
        }
        let has_targets = measured.amount > 0;
        if finite && has_targets && self.run.updates == 0 {
            self.check_complete()?;
        }
        if !finite {
            self.overflow(norm)?;
        } else if !has_targets {
            report::note(format_args!("step {step} has nothing to predict: no update"));
        } else if settings.spike != Spike::Ignore && self.run.spikes.is_spike(measured.loss(), norm) {
            match settings.spike {
                Spike::RollBack => return self.roll_back(),
                _ => self.skip("its loss or gradient is a spike")?,
            }
        } else {
            self.update(norm, rate, factor)?;
        }
        let communication_wait = self.shards.group().waited().saturating_sub(waited);
        let times = StepTimes { spent: begun.elapsed(), data_wait, communication_wait };
        let last = step == settings.steps;
        let validation = self.validate(last)?;
        if self.shards.group().leads() {
            let rate = rate * settings.learning_rate;
            self.log.step(&mut self.folder, &self.run, (&measured, &validation), norm, rate, times)?;
        }

        if saved {
            self.complete()?;
        }
        let leave = last || signal != 0;
        if leave {
            self.stop.heard();
        }
        if leave || due(step, settings.checkpoint_every) {
            let background = settings.background_checkpoints && !leave;
            self.save(background)?;
            if !background {
                self.complete()?;
                self.publishing.finish()?;
            }
            if leave {
                // The leader writes the model folder: who leaves before it is done ends the run.
                self.shards.group().barrier()?;
            }
        }
        if let Some(stopped) = Stop::error(signal, step).filter(|_| !last) {
            return Err(stopped);
        }
        self.stop.took(begun.elapsed());
        let sampled = due(step, settings.sample_every) || (last && settings.sample_every > 0);
        if sampled && let Some(weights) = self.run.shown(&self.shards)? {
            self.task.sample(weights, &self.folder.sample(step))?;
            self.folder.log_sample(step);
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.complete()?;
        if self.shards.group().leads() {
            // A run that was killed between its last checkpoint and the model folder left an older folder.
            if self.publishing.step() != Some(self.run.step) {
                self.publish(self.run.step)?;
            }
            self.publishing.finish()?;
            let (step, output) = (self.run.step, self.task.output());
            let folder = self.folder.output(output);
            report::note(format_args!("{step} steps done; the {output} is in {}", folder.display()));
        }
        Ok(())
    }

    /// The means over batches of the validation data, where they are due.
    fn validate(&mut self, last: bool) -> Result<Vec<(String, f64)>> {
        let Config { data, train: settings, .. } = self.config;
        let step = self.run.step;
        let wanted = !data.validation.is_empty() && settings.validate_every > 0;
        if !wanted || !(last || due(step, settings.validate_every)) {
            return Ok(Vec::new());
        }
        // A batch may lack a loss: that of answers, where no sample has a question.
        let mut sums: Vec<(&str, f64, f64)> = Vec::new();
        for batch in 1..=settings.validation_batches {
            let StepMetrics { losses, figures, .. } = self.task.validate(step, batch, &mut self.shards)?;
            for (name, value) in losses.into_iter().chain(figures) {
                match sums.iter_mut().find(|(known, ..)| *known == name) {
                    Some((_, sum, count)) => (*sum, *count) = (*sum + value, *count + 1.0),
                    None => sums.push((name, value, 1.0)),
                }
            }
        }
        Ok(sums.into_iter().map(|(name, sum, count)| (format!("validation_{name}"), sum / count)).collect())
    }

    /// Checks before the first update that every parameter that can have a gradient has one.
    fn check_complete(&self) -> Result<()> {
        let names: Vec<&String> = self.task.params().keys().filter(|name| self.gets_gradient(name)).collect();
        gradients::check_complete(&names, &self.shards.sizes(&names)?)
    }

    /// Whether a parameter has a gradient in the first steps.
    fn gets_gradient(&self, name: &str) -> bool {
        let requires_grad = self.task.params().get(name).is_some_and(|param| param.attributes.requires_grad);
        requires_grad && self.task.gets_gradient(name) && !self.config.train.freezes(name)
    }

    /// The only collective of a step beside those of weights, gradients and metrics.
    fn agree(&self, factor: f64) -> Result<Agreed> {
        let squares = optimizer::squares(self.shards.reduced(), self.shards.params())?;
        let saved = f64::from(u8::from(self.saving.is_written()));
        let ours = vec![squares, f64::from(self.stop.signal()), saved, self.task.data_wait().as_secs_f64()];
        let all = self.shards.group().gather(ours)?;
        let replica = all.iter().take(self.shards.group().hsdp_shard_size());
        let squares = if self.shards.replicated() { squares } else { replica.map(|rank| rank[0]).sum() };
        let signal = all.iter().map(|rank| rank[1]).fold(0.0, f64::max) as i32;
        let data_wait = Duration::from_secs_f64(all.iter().map(|rank| rank[3]).fold(0.0, f64::max));
        let saved = all.iter().all(|rank| rank[2] > 0.0);
        Ok(Agreed { norm: squares.sqrt() / factor, signal, saved, data_wait })
    }

    fn update(&mut self, norm: f64, rate: f64, factor: f64) -> Result<()> {
        let (settings, step) = (&self.config.train, self.run.step);
        self.run.updates += 1;
        let updates = self.run.updates;
        let scale = GradientScale::new(norm, settings.clip_norm, factor);
        self.run.optimizer.step(&mut self.shards, settings, updates, rate, scale)?;
        self.shards.refresh()?;
        self.task.after_step(step, &mut self.shards)?;
        if let Some(average) = &mut self.run.average {
            ema::update(average, &self.shards, settings.ema_decay, updates)?;
        }
        self.run.skipped = 0;
        Ok(())
    }

    /// Handles a loss or gradient that is not finite: lowers the loss scale if there is one, otherwise skips the update.
    ///
    /// # Errors
    /// The weights are not finite, so that no later step can be.
    fn overflow(&mut self, norm: f64) -> Result<()> {
        if let Err(diverged) = self.run.check_finite(&self.shards) {
            self.complete()?;
            return Err(diverged);
        }
        let shrunk = self.run.loss_scale.as_mut().and_then(|scale| scale.shrink().then_some(*scale));
        let Some(scale) = shrunk else {
            let why = if norm.is_finite() { "the loss is not finite" } else { "the gradient is not finite" };
            return self.skip(why);
        };
        if self.shards.group().leads() {
            let (step, factor) = (self.run.step, scale.factor());
            report::warn(format_args!(
                "step {step}: the gradient overflows; its update is skipped, the loss scale is {factor} now"
            ));
        }
        Ok(())
    }

    /// Skips this step's update on all ranks.
    fn skip(&mut self, why: &str) -> Result<()> {
        self.run.skipped += 1;
        let step = self.run.step;
        if self.run.skipped < MAX_SKIPPED {
            if self.shards.group().leads() {
                report::warn(format_args!("step {step}: {why}; its update is skipped"));
            }
            return Ok(());
        }
        self.complete()?;
        let what = format!("step {step}: {why}, the {MAX_SKIPPED}th in a row; its samples: {}", self.samples()?);
        Err(failed(what, "look at these samples, or lower train.learning_rate; the newest checkpoint is from before"))
    }

    /// Returns to the newest checkpoint and continues with the samples after this step.
    fn roll_back(&mut self) -> Result<()> {
        let (step, rollbacks) = (self.run.step, self.run.rollbacks + 1);
        let (what, samples) = (format!("step {step}: its loss or gradient is a spike"), self.samples()?);
        let hint = "look at these samples, or lower train.learning_rate";
        ensure!(rollbacks <= MAX_ROLLBACKS, failed(format!("{what}, the {rollbacks}th; its samples: {samples}"), hint));
        self.complete()?;
        let seen = step + self.run.passed_over;
        let Self { config, task, shards, run, .. } = self;
        ensure!(run.go_back(config, *task, shards, &self.folder.checkpoints())?, "{what}, and there is no checkpoint");
        (run.rollbacks, run.passed_over) = (rollbacks, seen - run.step);
        if shards.group().leads() {
            report::warn(format_args!(
                "{what} (samples: {samples}); resuming from step {} with later samples",
                run.step
            ));
        }
        self.folder.begin(config, run.step)
    }

    /// The names of this step's samples, of all ranks.
    fn samples(&self) -> Result<String> {
        const SHOWN: usize = 40;
        let all = self.shards.group().gather(self.task.samples().join(" ").into_bytes())?;
        let ranks: Vec<_> = all.iter().map(|names| String::from_utf8_lossy(names)).collect();
        let names: Vec<&str> = ranks.iter().flat_map(|names| names.split(' ')).collect();
        Ok(match names.split_at_checked(SHOWN) {
            Some((shown, more)) if !more.is_empty() => format!("{} and {} more", shown.join(" "), more.len()),
            _ => names.join(" "),
        })
    }

    fn save(&mut self, background: bool) -> Result<()> {
        let saved = self.run.save(self.config, self.task, &self.shards, &mut self.saving, background);
        if saved.is_err() {
            // The one before may still be in progress.
            self.complete()?;
        }
        saved
    }

    /// Completes the checkpoint under way, if any, and begins to publish it as the model folder.
    fn complete(&mut self) -> Result<()> {
        let step = self.saving.finish()?;
        match step.filter(|_| self.shards.group().leads()) {
            Some(step) => self.publish(step),
            None => Ok(()),
        }
    }

    /// Begins to write the model folder (or that of an adapter) from the files of a checkpoint, so that no rank needs memory
    /// for the whole model.
    fn publish(&mut self, step: u64) -> Result<()> {
        let checkpoint = checkpoint::at(&self.folder.checkpoints(), step);
        let kind = |name: &str| {
            let averaged = self.config.train.ema_decay > 0.0 && !self.config.train.freezes(name);
            if averaged { "average" } else { "weights" }
        };
        let stored_params = self.task.params().iter().filter(|(_, param)| !param.attributes.base);
        let stored_params: Vec<_> =
            stored_params.map(|(name, param)| (name.clone(), kind(name), param.dims().to_vec())).collect();
        let (publish, output) = (self.task.publisher(), self.folder.output(self.task.output()));
        self.publishing.begin(step, move || {
            let stored = checkpoint::tensors(&checkpoint)?;
            let whole = |(name, kind, dims): &(String, &str, Vec<usize>)| {
                Ok((name.clone(), stored.whole(&format!("{kind}/{name}"), dims, safetensors::Dtype::F32)?))
            };
            publish(stored_params.iter().map(whole).collect::<Result<_>>()?, &output)
        })
    }
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
