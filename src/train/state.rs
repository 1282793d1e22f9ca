//! The state of a run that changes from step to step: saved in checkpoints and restored from them.

use super::{
    Resume, Task,
    checkpoint::{self, Loaded, State},
    ema::{self, Average},
    loss_scale::LossScale,
    optimizer::{self, Moments, Optimizer},
    reshard::{Part, Parts},
    saving::Saving,
    shards::Shards,
    spikes::Spikes,
};
use crate::{
    config::Config,
    error::{Context, Result, ensure, failed},
    ops::Buffer,
    report,
};
use candle_core::Tensor;
use rayon::prelude::*;
use std::{borrow::Cow, collections::HashMap, path::Path};

/// The state of a run beside its parameters: this rank's part of it.
pub struct RunState {
    /// Steps done.
    pub step: u64,
    /// Updates of the weights done.
    pub updates: u64,
    /// Steps in a row whose update was skipped.
    pub skipped: u64,
    /// Steps whose samples were left out because of spikes.
    pub passed_over: u64,
    /// How often the run went back to a checkpoint because of a spike.
    pub rollbacks: u64,
    pub spikes: Spikes,
    /// Where the loss is scaled.
    pub loss_scale: Option<LossScale>,
    pub optimizer: Optimizer,
    /// The moving average of the weights, unless it is turned off.
    pub average: Option<Average>,
}

impl RunState {
    /// The state to start from, as `resume` says; the parameters and the task are set to it.
    pub fn start(
        config: &Config,
        task: &mut dyn Task,
        shards: &mut Shards,
        checkpoints: &Path,
        resume: &Resume,
    ) -> Result<Self> {
        let average = if config.train.ema_decay > 0.0 { Some(ema::start(shards)?) } else { None };
        let optimizer = Optimizer::new(shards, &config.train)?;
        let (spikes, loss_scale) = (Spikes::default(), LossScale::of(config));
        let mut run = Self {
            step: 0,
            updates: 0,
            skipped: 0,
            passed_over: 0,
            rollbacks: 0,
            spikes,
            loss_scale,
            optimizer,
            average,
        };
        let loaded = match resume {
            Resume::Auto => checkpoint::newest(shards.group(), checkpoints)?,
            Resume::From(path) => {
                let loaded =
                    checkpoint::load(shards.group(), path).with_context(|| format!("checkpoint {}", path.display()))?;
                Some(loaded)
            }
            Resume::Never => {
                let hint = "`--resume auto` goes on; another `name`, or deleting the folder, starts again";
                let held = format!("{} holds checkpoints", checkpoints.display());
                ensure!(!checkpoint::any(checkpoints)?, failed(held, hint));
                None
            }
        };
        let step = loaded.as_ref().map(|loaded| loaded.state.step);
        shards.group().same("newest checkpoint", &format!("{step:?}"))?;
        if let Some(loaded) = loaded {
            loaded.check(config, task)?;
            run.restore(config, &loaded, task, shards)?;
            if shards.group().leads() {
                checkpoint::set_aside_after(checkpoints, run.step)?;
                report::note(format_args!("resuming after step {}", run.step));
            }
        }
        Ok(run)
    }

    /// Sets parameters, task and everything here to the newest checkpoint; `false` where there is none.
    pub fn go_back(
        &mut self,
        config: &Config,
        task: &mut dyn Task,
        shards: &mut Shards,
        checkpoints: &Path,
    ) -> Result<bool> {
        match checkpoint::newest(shards.group(), checkpoints)? {
            Some(loaded) => self.restore(config, &loaded, task, shards).map(|()| true),
            None => Ok(false),
        }
    }

    fn restore(&mut self, config: &Config, loaded: &Loaded, task: &mut dyn Task, shards: &mut Shards) -> Result<()> {
        let stored = loaded.tensors()?;
        stored.only(|stored| {
            let Some((kind, name)) = stored.split_once('/') else { return false };
            shards.params().get(name).filter(|param| !param.attributes.base).is_some_and(|param| {
                let averaged = self.average.is_some() && kind == "average";
                kind == "weights" || averaged || optimizer::kinds(&config.train, param.attributes).contains(&kind)
            })
        })?;
        for (name, range) in shards.owned().clone() {
            if shards.params()[&name].attributes.base {
                continue;
            }
            let len = shards.params()[&name].elem_count();
            let numbers = |kind: &str, into: &mut [f32]| stored.read(&format!("{kind}/{name}"), len, &range, into);
            let read = |kind: &str, into: &mut Buffer| into.fill(|into| numbers(kind, into));
            let mut weights = vec![0.0; range.len()];
            numbers("weights", &mut weights)?;
            shards.set_part(&name, &weights)?;
            match self.optimizer.moments.get_mut(&name) {
                Some(Moments::AdamW { m, v }) => read("adamw_m", m).and_then(|()| read("adamw_v", v))?,
                Some(Moments::Muon { momentum }) => read("muon", momentum)?,
                None => {}
            }
            if let Some(average) = self.average.as_mut().and_then(|average| average.get_mut(&name)) {
                read("average", average)?;
            }
        }
        shards.refresh()?;
        let state = &loaded.state;
        task.restore(&state.task).context("the checkpoint's task state")?;
        (self.step, self.skipped) = (state.step, state.skipped);
        self.updates = state.updates.unwrap_or(state.step);
        (self.passed_over, self.rollbacks, self.spikes) = (state.passed_over, state.rollbacks, state.spikes.clone());
        self.loss_scale = state.loss_scale;
        Ok(())
    }

    /// Checks that all weights, moments and averages of all ranks are finite.
    ///
    /// # Errors
    /// On all ranks: names a tensor that is not.
    pub fn check_finite(&self, shards: &Shards) -> Result<()> {
        self.check_parts(shards, &self.parts(shards)?)
    }

    fn check_parts(&self, shards: &Shards, parts: &Parts<'_>) -> Result<()> {
        let bad = parts.iter().find(|(_, part)| !is_finite(&part.values)).map_or("", |(name, _)| name.as_str());
        let all = shards.group().gather(bad.as_bytes().to_vec())?;
        let Some(bad) = all.iter().find(|name| !name.is_empty()) else { return Ok(()) };
        let what = format!("step {}: `{}` is not finite", self.step, String::from_utf8_lossy(bad));
        Err(failed(what, "lower train.learning_rate; the older checkpoints and the model folder are kept as they were"))
    }

    /// This rank's part of every tensor of a checkpoint. A frozen base is not in it: the run reads that model again.
    fn parts(&self, shards: &Shards) -> Result<Parts<'_>> {
        let mut parts = Parts::new();
        let kept = |name: &String| shards.writes() && !shards.params()[name].attributes.base;
        let owned = shards.owned().iter().filter(|(name, _)| kept(name));
        for (name, range) in owned {
            let mut add = |kind: &str, values| {
                let shape = shards.params()[name].dims().to_vec();
                parts.insert(format!("{kind}/{name}"), Part { shape, range: range.clone(), values });
            };
            add("weights", Cow::Owned(shards.part(name)?));
            match self.optimizer.moments.get(name) {
                Some(Moments::AdamW { m, v }) => {
                    add("adamw_m", m.values()?);
                    add("adamw_v", v.values()?);
                }
                Some(Moments::Muon { momentum }) => add("muon", momentum.values()?),
                None => {}
            }
            if let Some(average) = self.average.as_ref().and_then(|average| average.get(name)) {
                add("average", average.values()?);
            }
        }
        Ok(parts)
    }

    /// Starts a checkpoint; see [`Saving::begin`].
    ///
    /// # Errors
    /// A tensor is not finite ([`RunState::check_finite`]): nothing is written then.
    pub fn save(
        &self,
        config: &Config,
        task: &dyn Task,
        shards: &Shards,
        saving: &mut Saving,
        background: bool,
    ) -> Result<()> {
        let parts = self.parts(shards)?;
        self.check_parts(shards, &parts)?;
        let state = State {
            step: self.step,
            updates: Some(self.updates),
            skipped: self.skipped,
            passed_over: self.passed_over,
            rollbacks: self.rollbacks,
            spikes: self.spikes.clone(),
            loss_scale: self.loss_scale,
            fingerprint: task.fingerprint()?,
            sources: task.sources(),
            task: task.state(),
        };
        saving.begin(config, &state, parts, background)
    }

    /// The weights for sample images, on the leading rank: the moving average where there is one.
    pub fn shown(&self, shards: &Shards) -> Result<Option<HashMap<String, Tensor>>> {
        shards.collect(|shards, name| match self.average.as_ref().and_then(|average| average.get(name)) {
            Some(average) => Ok(average.values()?.into_owned()),
            None => shards.part(name),
        })
    }
}

fn is_finite(values: &[f32]) -> bool {
    values.par_chunks(1 << 14).all(|chunk| chunk.iter().all(|value| value.is_finite()))
}
