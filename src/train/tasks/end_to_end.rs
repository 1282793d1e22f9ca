//! The task `end-to-end`: the generator with a reconstructor that learns from its hidden states (paper §3.1.3). Both
//! directions are trained as for the task `generator`, whose [`GeneratorTask`] this is; text → image has the reconstruction
//! loss in addition.

use super::{
    Fingerprint, InputFile, Sequences, Task, TaskSpec, generator::GeneratorTask, generator_spec, joint, reconstruction,
    sequences_flops,
};
use crate::{
    bundle::Bundle,
    config::{self, Config, HiddenState, Train},
    data::Kind,
    dist::Group,
    error::Result,
    model::{Modality, end_to_end::SCOPE, flops},
    nn::params::Params,
    train::inputs::Inputs,
};

/// Text → image with pixels, and image → text.
#[derive(Debug)]
pub struct Spec;

impl TaskSpec for Spec {
    fn start(&self, config: &Config, group: &Group) -> Result<Box<dyn Task>> {
        Ok(Box::new(GeneratorTask::new(config, group)?))
    }

    /// The reconstructor starts from weights that are whole.
    fn starts_empty(&self, _config: &Config, _world_size: usize) -> bool {
        false
    }

    fn sample_kind(&self, config: &Config, inputs: &Inputs) -> Kind {
        reconstruction::sample_kind(config, &inputs.tokenizer)
    }

    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)> {
        generator_spec::Spec.batch_sizes(train)
    }

    fn parameter_groups(&self, config: &Config, inputs: &Inputs) -> Result<Vec<Params>> {
        generator_spec::Spec.parameter_groups(config, inputs)
    }

    fn parts(&self) -> &'static [(&'static str, &'static [&'static str])] {
        generator_spec::Spec.parts()
    }

    fn sequences(&self, config: &Config, inputs: &Inputs) -> Vec<Sequences> {
        let settings = &config.end_to_end;
        let reads = settings.reconstruction_weight > 0.0 && settings.hidden == HiddenState::Input;
        let arrange = |sequences: Sequences| match sequences.layout.target().modality {
            Modality::Image if reads => Sequences { layout: sequences.layout.reading_last(), ..sequences },
            _ => sequences,
        };
        generator_spec::Spec.sequences(config, inputs).into_iter().map(arrange).collect()
    }

    fn flops(&self, config: &Config, inputs: &Inputs) -> f64 {
        let reconstruction = match config.end_to_end.reconstruction_weight > 0.0 {
            true => flops::reconstructor(&inputs.tokenizer, config.train.batch_size),
            false => 0.0,
        };
        let texts = if joint::is_on(config) { joint::images(&config.train) } else { 0 };
        let joint = flops::tokenizer(&inputs.tokenizer, texts);
        sequences_flops(config, self.sequences(config, inputs)) + reconstruction + joint
    }

    fn files<'a>(&self, config: &'a Config) -> Vec<InputFile<'a>> {
        generator_spec::Spec.files(config)
    }

    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        model.expect(config::Task::Generator)?;
        Ok(model)
    }

    /// A generator of two-stage training has neither map nor reconstructor; the image tokenizer is always that of
    /// `image_tokenizer.path`.
    fn starts_anew(&self, name: &str, model: &Bundle) -> bool {
        !model.config.task.has_reconstructor() && config::begins_with(name, SCOPE)
            || config::begins_with(name, joint::SCOPE)
    }

    fn fingerprint_of(&self, config: &Config, model: &Bundle) -> Result<Fingerprint> {
        generator_spec::Spec.fingerprint_of(config, model)
    }

    fn meaning_keys(&self, config: &Config) -> &'static [&'static str] {
        generator_spec::Spec.meaning_keys(config)
    }
}
