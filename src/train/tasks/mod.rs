//! The tasks, one file each (the generator, with which others share much, has two). [`spec`] is the only function that lists
//! them all.
//!
//! A [`TaskSpec`] says what is known of a task without running it: what a step reads, how large the model is, and where
//! a run may start. [`TaskSpec::start`] makes the [`Task`] that the training loop drives on a rank.

mod end_to_end;
mod generator;
mod generator_spec;
mod image_tokenizer;
mod joint;
mod matcher;
mod objectives;
mod origins;
mod pixels;
mod reconstruction;
mod samples;
mod vocabulary;

pub use super::inputs::{FileKind, InputFile};
use super::{StepMetrics, inputs::Inputs, shards::Shards};
use crate::{
    bundle::Bundle,
    config::{self, Config, Train},
    data,
    dist::Group,
    error::Result,
    model::{Layout, flops},
    nn::{params::Params, weights::Values},
};
use candle_core::Tensor;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    path::Path,
    time::Duration,
};

#[cfg(test)]
pub(super) use {generator::GeneratorTask, image_tokenizer::ImageTokenizerTask};

/// The task that a configuration names.
pub fn spec(task: config::Task) -> &'static dyn TaskSpec {
    match task {
        config::Task::Generator => &generator_spec::Spec,
        config::Task::EndToEnd => &end_to_end::Spec,
        config::Task::ImageTokenizer => &image_tokenizer::Spec,
        config::Task::Matcher => &matcher::Spec,
    }
}

/// Digests by what they are of: a vocabulary, an image tokenizer.
pub type Fingerprint = BTreeMap<String, String>;

/// What is known of a task without running it.
pub trait TaskSpec: Debug + Sync {
    /// The task on this rank: data opened, parameters made.
    ///
    /// # Errors
    /// Data or another model that the task needs is missing or does not fit.
    fn start(&self, config: &Config, group: &Group) -> Result<Box<dyn Task>>;

    /// Whether ranks make only the weights that they own, and never the whole model.
    fn starts_empty(&self, _config: &Config, _world_size: usize) -> bool {
        false
    }

    /// What the samples of its data are.
    fn sample_kind(&self, config: &Config, inputs: &Inputs) -> data::Kind;

    /// The samples of a step, by the configuration key that says how many.
    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)>;

    /// The parameters of each segment, empty ([`crate::nn::params::Scope::empty_from_seed`]).
    ///
    /// # Errors
    /// The sizes are impossible.
    fn parameter_groups(&self, config: &Config, inputs: &Inputs) -> Result<Vec<Params>>;

    /// The parts of the model in tables, with prefixes of their parameters' names. The longest prefix counts.
    fn parts(&self) -> &'static [(&'static str, &'static [&'static str])] {
        &[("parameters", &[""])]
    }

    /// The sequences of a step, for a model that is a transformer over them.
    fn sequences(&self, _config: &Config, _inputs: &Inputs) -> Vec<Sequences> {
        Vec::new()
    }

    /// Tokens that a step predicts, at most.
    fn predicted_tokens(&self, config: &Config, inputs: &Inputs) -> usize {
        self.sequences(config, inputs).iter().map(|all| all.batch_size * all.layout.predicted()).sum()
    }

    /// FLOPs of a step, forward and backward; recomputation does not count.
    fn flops(&self, config: &Config, inputs: &Inputs) -> f64 {
        sequences_flops(config, self.sequences(config, inputs))
    }

    /// The files and folders that it reads beside its data.
    fn files<'a>(&self, _config: &'a Config) -> Vec<InputFile<'a>> {
        Vec::new()
    }

    /// The part of the model in `train.init_from` that a run starts from.
    ///
    /// # Errors
    /// The model has no such part.
    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        Ok(model)
    }

    /// Whether a parameter starts as in a fresh run, because the model in `train.init_from` is of another task and has none.
    fn starts_anew(&self, _name: &str, _model: &Bundle) -> bool {
        false
    }

    /// Digests of what the weights of a model belong to, to compare with [`Task::fingerprint`] of a run with this
    /// configuration.
    ///
    /// # Errors
    /// A file of the model cannot be read.
    fn fingerprint_of(&self, _config: &Config, _model: &Bundle) -> Result<Fingerprint> {
        Ok(Fingerprint::new())
    }

    /// The keys that change what the weights compute but not their shapes.
    fn meaning_keys(&self, _config: &Config) -> &'static [&'static str] {
        &[]
    }
}

/// FLOPs of sequences in a step, forward and backward.
fn sequences_flops(config: &Config, sequences: Vec<Sequences>) -> f64 {
    let trained = sequences.into_iter().filter(|all| all.weight > 0.0);
    trained.map(|all| all.batch_size as f64 * flops::training(config, &all.layout, all.outputs)).sum()
}

/// Sequences of a step with the same spans.
#[derive(Debug, Clone)]
pub struct Sequences {
    /// As in "text to image".
    pub name: &'static str,
    pub layout: Layout,
    /// Tokens among which each target position chooses.
    pub outputs: usize,
    pub batch_size: usize,
    /// Weight of their loss; 0: they are left out.
    pub weight: f64,
}

/// A task that runs: the part of the training loop that differs between tasks.
pub trait Task {
    /// The trainable parameters.
    fn params(&self) -> &Params;

    /// The names of the parameters of each segment of the chain.
    fn parameter_groups(&self) -> Vec<Vec<String>>;

    /// The initial values of a parameter whose variable is empty, f32.
    fn fresh(&self, _name: &str) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// Whether the first step already gives this parameter a gradient.
    fn gets_gradient(&self, _name: &str) -> bool {
        true
    }

    /// Digests of what the weights belong to beside the configuration.
    fn fingerprint(&self) -> Result<Fingerprint> {
        Ok(Fingerprint::new())
    }

    /// Whether `digest`, from a checkpoint, stands for the same as this task's digest `name`.
    fn has_fingerprint(&self, name: &str, digest: &str) -> Result<bool> {
        Ok(self.fingerprint()?.get(name).is_some_and(|ours| ours == digest))
    }

    /// The number of samples of each data source.
    fn sources(&self) -> Vec<u64> {
        Vec::new()
    }

    /// Adds the gradients of `loss_scale` times the loss of this rank's samples of step `step` (counted from 1) to those
    /// in `shards`. The metrics are of all ranks, and not scaled.
    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics>;

    /// Whether the loss has other terms from step `step` on: only later steps then say what a spike is.
    fn loss_changes_at(&self, _step: u64) -> bool {
        false
    }

    /// The metrics of a batch (counted from 1) of the validation data, of all ranks, with the weights of step `step`.
    ///
    /// # Errors
    /// There is no validation data, or none of it can be used.
    fn validate(&mut self, step: u64, batch: u64, shards: &mut Shards) -> Result<StepMetrics>;

    /// How long this rank waited for the samples of its last step.
    fn data_wait(&self) -> Duration {
        Duration::ZERO
    }

    /// The names of the samples of this rank's last step.
    fn samples(&self) -> Vec<String> {
        Vec::new()
    }

    /// Changes that no gradient makes, after the optimizer's update; the same on all ranks.
    fn after_step(&mut self, _step: u64, _shards: &mut Shards) -> Result<()> {
        Ok(())
    }

    /// The task's own state in a checkpoint, beside its parameters.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Restores what [`Task::state`] gave.
    fn restore(&mut self, _state: &Value) -> Result<()> {
        Ok(())
    }

    /// Writes the sample image of these weights.
    fn sample(&self, _weights: HashMap<String, Tensor>, _path: &Path) -> Result<()> {
        Ok(())
    }

    /// What [`Task::publisher`] writes, which is the name of its folder in the run's: `model`, or `adapter`.
    fn output(&self) -> &'static str {
        "model"
    }

    /// Writes the folder of [`Task::output`], on another thread.
    fn publisher(&self) -> Publisher;
}

/// Writes a folder with these weights: of all parameters but those of a frozen base.
pub type Publisher = Box<dyn FnOnce(BTreeMap<String, Values>, &Path) -> Result<()> + Send>;
