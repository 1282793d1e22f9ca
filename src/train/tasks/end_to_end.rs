//! The task `end-to-end`: the generator with a reconstructor that learns from its hidden states (paper §3.1.3). Both
//! directions are trained as for the task `generator`, whose [`GeneratorTask`] this is; text → image has the reconstruction
//! loss in addition.

use super::{Fingerprint, InputFile, Sequences, Task, TaskSpec, generator, generator::GeneratorTask, sequences_flops};
pub use crate::model::end_to_end::SCOPE;
use crate::{
    bundle::Bundle,
    config::{self, Config, HiddenState, ReconstructorInit, Train},
    data::{self, Kind},
    dist::Group,
    error::{Context, Result, ensure, failed},
    model::{Modality, end_to_end::RECONSTRUCTOR, flops},
    nn::params::Params,
    train::{data_loader::DataLoader, inputs::Inputs},
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
        sample_kind(config, &inputs.tokenizer)
    }

    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)> {
        generator::Spec.batch_sizes(train)
    }

    fn parameter_groups(&self, config: &Config, inputs: &Inputs) -> Result<Vec<Params>> {
        generator::Spec.parameter_groups(config, inputs)
    }

    fn parts(&self) -> &'static [(&'static str, &'static [&'static str])] {
        const OURS: [(&str, &[&str]); 2] =
            [("map to code vectors", &["end_to_end.map."]), ("reconstructor", &["end_to_end.reconstructor."])];
        const PARTS: [(&str, &[&str]); generator::PARTS.len() + OURS.len()] = {
            let mut parts = [OURS[0]; generator::PARTS.len() + OURS.len()];
            let mut i = 0;
            while i < generator::PARTS.len() {
                parts[i] = generator::PARTS[i];
                i += 1;
            }
            parts[i] = OURS[0];
            parts[i + 1] = OURS[1];
            parts
        };
        &PARTS
    }

    fn sequences(&self, config: &Config, inputs: &Inputs) -> Vec<Sequences> {
        let settings = &config.end_to_end;
        let reads = settings.reconstruction_weight > 0.0 && settings.hidden == HiddenState::Input;
        let arrange = |sequences: Sequences| match sequences.layout.target().modality {
            Modality::Image if reads => Sequences { layout: sequences.layout.reading_last(), ..sequences },
            _ => sequences,
        };
        generator::Spec.sequences(config, inputs).into_iter().map(arrange).collect()
    }

    fn flops(&self, config: &Config, inputs: &Inputs) -> f64 {
        let reconstruction = match config.end_to_end.reconstruction_weight > 0.0 {
            true => flops::reconstructor(&inputs.tokenizer, config.train.batch_size),
            false => 0.0,
        };
        sequences_flops(config, self.sequences(config, inputs)) + reconstruction
    }

    fn files<'a>(&self, config: &'a Config) -> Vec<InputFile<'a>> {
        generator::Spec.files(config)
    }

    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        model.expect(config::Task::Generator)?;
        Ok(model)
    }

    /// A generator of two-stage training has neither map nor reconstructor.
    fn starts_anew(&self, name: &str, model: &Bundle) -> bool {
        model.config.task == config::Task::Generator && config::begins_with(name, SCOPE)
    }

    fn fingerprint_of(&self, model: &Bundle) -> Result<Fingerprint> {
        generator::Spec.fingerprint_of(model)
    }

    fn meaning_keys(&self, config: &Config) -> &'static [&'static str] {
        generator::Spec.meaning_keys(config)
    }
}

/// Shards of codes with their images, or images that are encoded when they are read.
pub fn sample_kind(config: &Config, tokenizer: &config::ImageTokenizer) -> Kind {
    let side = u32::try_from(tokenizer.image_size).unwrap_or(u32::MAX);
    match config.data.sources.iter().all(|source| data::are_codes(&source.path)) {
        true => Kind::CodesAndImages(side),
        false => Kind::Pairs(side),
    }
}

/// Checks that shards of codes hold images too, by their first samples.
pub fn check_images(data_loader: &DataLoader, kind: Kind) -> Result<()> {
    if !kind.has_codes() {
        return Ok(());
    }
    let dataset = data_loader.dataset();
    for (i, source) in dataset.sources.iter().enumerate() {
        let without = matches!(dataset.read(i, 0), Err(bad) if bad.cause == data::Cause::NoImage);
        let what = format!("the shards of codes in {} hold no images", source.path);
        ensure!(!without, failed(what, "encode them again with `vilg data encode --keep-images`"));
    }
    Ok(())
}

/// Sets the reconstructor to the image tokenizer's decoder, if it is to start from that.
pub fn start_reconstructor(config: &Config, params: &Params, image_tokenizer: &Bundle) -> Result<()> {
    if config.end_to_end.reconstructor_init == ReconstructorInit::Random {
        return Ok(());
    }
    let weights = image_tokenizer.weights()?;
    for (name, var) in params {
        let Some(theirs) = name.strip_prefix(RECONSTRUCTOR).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let weight = weights.get(theirs).with_context(|| format!("the image tokenizer lacks `{theirs}`"))?;
        var.set(&weight.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}
