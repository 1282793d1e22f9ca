//! What changes from step to step, and its way into a checkpoint and back.

use super::{
    Resume, Task,
    checkpoint::{self, Loaded, State},
    ema::{self, Average},
    optimizer::{self, Moments, Optimizer},
    reshard::{Part, Parts},
    shards::Shards,
};
use crate::{
    config::Config,
    error::{Context, Result, ensure, failed},
    report,
};
use candle_core::Tensor;
use std::{borrow::Cow, collections::HashMap, path::Path};

/// The state of a run beside its parameters: this rank's part of it.
pub struct RunState {
    /// Steps done.
    pub step: u64,
    /// Steps in a row whose update was skipped.
    pub skipped: u64,
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
        let fresh = Self { step: 0, skipped: 0, optimizer: Optimizer::new(shards, &config.train), average };
        let loaded = match resume {
            Resume::Auto => checkpoint::newest(checkpoints)?,
            Resume::From(path) => {
                let loaded = checkpoint::load(path).with_context(|| format!("checkpoint {}", path.display()))?;
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
        let Some(loaded) = loaded else { return Ok(fresh) };
        loaded.check(config, &task.identity()?)?;
        let state = fresh.restored(config, loaded, task, shards)?;
        if shards.group().leads() {
            checkpoint::set_aside_after(checkpoints, state.step)?;
            report::note(format_args!("going on after step {}", state.step));
        }
        Ok(state)
    }

    fn restored(mut self, config: &Config, loaded: Loaded, task: &mut dyn Task, shards: &mut Shards) -> Result<Self> {
        let mut wanted = self.wanted(config, shards);
        loaded.read(&mut wanted)?;
        let mut take = |kind: &str, name: &str| {
            let part = wanted.remove(&format!("{kind}/{name}"));
            part.map(|part| part.values.into_owned()).with_context(|| format!("no part of `{kind}/{name}`"))
        };
        for name in shards.owned().keys().cloned().collect::<Vec<_>>() {
            shards.set_part(&name, &take("weights", &name)?)?;
            match self.optimizer.moments.get_mut(&name) {
                Some(Moments::AdamW { m, v }) => (*m, *v) = (take("adamw_m", &name)?, take("adamw_v", &name)?),
                Some(Moments::Muon { momentum }) => *momentum = take("muon", &name)?,
                None => {}
            }
            if let Some(average) = self.average.as_mut().and_then(|average| average.get_mut(&name)) {
                *average = take("average", &name)?;
            }
        }
        shards.refresh()?;
        task.restore(&loaded.state.task).context("the checkpoint's task state")?;
        Ok(Self { step: loaded.state.step, skipped: loaded.state.skipped, ..self })
    }

    /// Room for what this rank owns of each tensor of the state; of tensors that others own, room for nothing.
    fn wanted(&self, config: &Config, shards: &Shards) -> Parts<'static> {
        let mut wanted = Parts::new();
        for (name, var) in shards.params() {
            let range = shards.owned().get(name).cloned().unwrap_or(0..0);
            let kinds = ["weights"]
                .into_iter()
                .chain(optimizer::kinds(&config.train, name, var).iter().copied())
                .chain(self.average.as_ref().map(|_| "average"));
            for kind in kinds {
                let values = Cow::Owned(vec![0.0; range.len()]);
                wanted.insert(
                    format!("{kind}/{name}"),
                    Part { shape: var.dims().to_vec(), range: range.clone(), values },
                );
            }
        }
        wanted
    }

    /// Writes a checkpoint.
    pub fn save(&self, config: &Config, task: &dyn Task, shards: &Shards, checkpoints: &Path) -> Result<()> {
        let mut parts = Parts::new();
        let owned = shards.owned().iter().filter(|_| shards.group().leads() || !shards.replicated());
        for (name, range) in owned {
            let mut add = |kind: &str, values| {
                let shape = shards.params()[name].dims().to_vec();
                parts.insert(format!("{kind}/{name}"), Part { shape, range: range.clone(), values });
            };
            add("weights", Cow::Owned(shards.part(name)?));
            match self.optimizer.moments.get(name) {
                Some(Moments::AdamW { m, v }) => {
                    add("adamw_m", Cow::Borrowed(m));
                    add("adamw_v", Cow::Borrowed(v));
                }
                Some(Moments::Muon { momentum }) => add("muon", Cow::Borrowed(momentum)),
                None => {}
            }
            if let Some(average) = self.average.as_ref().and_then(|average| average.get(name)) {
                add("average", Cow::Borrowed(average));
            }
        }
        let state = State { step: self.step, skipped: self.skipped, identity: task.identity()?, task: task.state() };
        checkpoint::save(shards.group(), checkpoints, config, &state, &parts, config.train.keep_checkpoints)
    }

    /// The weights to publish, on the leading rank: the average where there is one.
    pub fn published(&self, shards: &Shards) -> Result<Option<HashMap<String, Tensor>>> {
        shards.collect(|shards, name| match self.average.as_ref().and_then(|average| average.get(name)) {
            Some(average) => Ok(average.clone()),
            None => shards.part(name),
        })
    }
}
