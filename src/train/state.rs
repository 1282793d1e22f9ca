//! What changes from step to step, and its way into a checkpoint and back.

use super::{
    Resume, Task,
    checkpoint::{self, Loaded, State},
    ema::{self, Average},
    optimizer::{Moments, Optimizer},
};
use crate::{
    config::Config,
    error::{Context, Result, ensure, failed},
    nn::{params::Params, weights::Values},
    report,
};
use candle_core::{Device, Tensor};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// The state of a run beside its parameters.
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
    pub fn start(config: &Config, task: &mut dyn Task, checkpoints: &Path, resume: &Resume) -> Result<Self> {
        let params = task.params();
        let average = if config.train.ema_decay > 0.0 { Some(ema::start(params)?) } else { None };
        let fresh = Self { step: 0, skipped: 0, optimizer: Optimizer::new(params, &config.train), average };
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
        let Some(loaded) = loaded else { return Ok(fresh) };
        loaded.check(config, &task.identity()?)?;
        checkpoint::set_aside_after(checkpoints, loaded.state.step)?;
        let state = fresh.restored(loaded, task)?;
        report::note(format_args!("going on after step {}", state.step));
        Ok(state)
    }

    fn restored(mut self, loaded: Loaded, task: &mut dyn Task) -> Result<Self> {
        let Loaded { state, mut tensors, .. } = loaded;
        for (name, var) in task.params() {
            let tensor = take(&mut tensors, "weights", name)?;
            var.set(&tensor.to_dtype(var.dtype())?.to_device(var.device())?)
                .with_context(|| format!("the checkpoint's `{name}`"))?;
            match self.optimizer.moments.get_mut(name) {
                Some(Moments::AdamW { m, v }) => {
                    fill(m, &mut tensors, "adamw_m", name)?;
                    fill(v, &mut tensors, "adamw_v", name)?;
                }
                Some(Moments::Muon { momentum }) => fill(momentum, &mut tensors, "muon", name)?,
                None => {}
            }
            if let Some(average) = self.average.as_mut().and_then(|average| average.get_mut(name)) {
                fill(average, &mut tensors, "average", name)?;
            }
        }
        if let Some(name) = tensors.keys().min() {
            return Err(failed(
                format_args!("the checkpoint holds an unknown tensor `{name}`"),
                "it is of another model",
            ));
        }
        task.restore(&state.task).context("the checkpoint's task state")?;
        Ok(Self { step: state.step, skipped: state.skipped, ..self })
    }

    /// Writes a checkpoint.
    pub fn save(&self, config: &Config, task: &dyn Task, checkpoints: &Path) -> Result<()> {
        let mut tensors = BTreeMap::new();
        for (name, var) in task.params() {
            let mut add = |kind: &str, values| {
                let dtype = safetensors::Dtype::F32;
                tensors.insert(format!("{kind}/{name}"), Values { shape: var.dims().to_vec(), values, dtype });
            };
            add("weights", Cow::Owned(var.flatten_all()?.to_vec1::<f32>()?));
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
        checkpoint::save(checkpoints, config, &state, &tensors, config.train.keep_checkpoints)
    }

    /// The weights to publish: the average where there is one.
    pub fn published(&self, params: &Params) -> Result<HashMap<String, Tensor>> {
        let weight = |(name, var): (&String, &candle_core::Var)| {
            let values = match self.average.as_ref().and_then(|average| average.get(name)) {
                Some(average) => average.clone(),
                None => var.flatten_all()?.to_vec1::<f32>()?,
            };
            Ok((name.clone(), Tensor::from_vec(values, var.shape(), &Device::Cpu)?))
        };
        params.iter().map(weight).collect()
    }
}

fn take(tensors: &mut HashMap<String, Tensor>, kind: &str, name: &str) -> Result<Tensor> {
    tensors.remove(&format!("{kind}/{name}")).with_context(|| format!("the checkpoint lacks `{kind}/{name}`"))
}

fn fill(values: &mut Vec<f32>, tensors: &mut HashMap<String, Tensor>, kind: &str, name: &str) -> Result<()> {
    let stored = take(tensors, kind, name)?.flatten_all()?.to_vec1::<f32>()?;
    ensure!(stored.len() == values.len(), "the checkpoint's `{kind}/{name}` has another size");
    *values = stored;
    Ok(())
}
