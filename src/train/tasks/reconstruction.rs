//! What end-to-end training needs beside a generator's samples and weights: images, and a reconstructor to start from.

use super::joint;
use crate::{
    bundle::Bundle,
    config::{self, Config, ReconstructorInit},
    data::{self, Kind},
    error::{Context, Result, ensure, failed},
    model::end_to_end::RECONSTRUCTOR,
    nn::params::Params,
    tokenizer::{
        self,
        discriminator::{self, LogitEma},
    },
    train::data_loader::DataLoader,
};
use serde_json::{Value, json};

/// Shards of codes with their images, or images that are encoded when they are read.
pub fn sample_kind(config: &Config, settings: &config::ImageTokenizer) -> Kind {
    let side = u32::try_from(settings.image_size).unwrap_or(u32::MAX);
    match config.data.sources.iter().all(|source| data::are_codes(&source.path, &config.data)) {
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

/// Whether a parameter begins with the value that it has in the image tokenizer.
fn starts_from_tokenizer(config: &Config, name: &str) -> bool {
    let decoder = config.end_to_end.reconstructor_init == ReconstructorInit::Tokenizer
        && config::begins_with(name, RECONSTRUCTOR);
    (decoder || config::begins_with(name, joint::SCOPE)) && !tokenizer::is_of_training(name)
}

/// Whether a parameter has its first value already, and no random one.
pub fn is_started(config: &Config, name: &str) -> bool {
    starts_from_tokenizer(config, name) || config::begins_with(name, joint::SCOPE)
}

/// Sets the reconstructor to the image tokenizer's decoder, if it is to start from that, and the tokenizer that is trained
/// too to the image tokenizer.
pub fn start(config: &Config, params: &Params, image_tokenizer: &Bundle) -> Result<()> {
    let weights = image_tokenizer.weights()?;
    for (name, var) in params.iter().filter(|(name, _)| starts_from_tokenizer(config, name)) {
        let scopes = [RECONSTRUCTOR, joint::SCOPE];
        let theirs = scopes.iter().find_map(|scope| name.strip_prefix(*scope)?.strip_prefix('.')).unwrap_or_default();
        let weight = weights.get(theirs).with_context(|| format!("the image tokenizer lacks `{theirs}`"))?;
        var.set(&weight.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}

/// Whether a parameter of map, reconstructor or discriminator has a gradient in the first step.
pub fn gets_gradient(config: &Config, name: &str) -> bool {
    let begins = !discriminator::is_ours(name) || config.image_tokenizer.adversarial_start == 0;
    begins && config.end_to_end.reconstruction_weight > 0.0
}

/// `config` with the sizes of its image tokenizer, for a reconstructor without the perceptual network, which is not trained
/// and whose folder may be on another machine.
pub fn of_sizes(config: &Config, settings: &config::ImageTokenizer) -> Config {
    let image_tokenizer = settings.clone().with_losses_of(&config.image_tokenizer);
    let image_tokenizer = config::ImageTokenizer { perceptual: String::new(), ..image_tokenizer };
    Config { image_tokenizer, ..config.clone() }
}

/// Running statistics of the discriminator of a run.
#[derive(Default)]
pub struct Discriminated {
    logit_ema: LogitEma,
    /// Mean logits of real images and reconstructions, and the accuracy, in the current step.
    seen: Option<[f64; 3]>,
}

impl Discriminated {
    /// The statistics, if the discriminator is trained at this step.
    pub fn at(&self, config: &Config, step: u64) -> Option<LogitEma> {
        let settings = &config.image_tokenizer;
        let on = config.task.has_reconstructor() && settings.adversarial_weight > 0.0;
        (on && step > settings.adversarial_start).then_some(self.logit_ema)
    }

    /// Keeps what a step measured for [`Discriminated::follow`].
    pub fn see(&mut self, figures: &[(&'static str, f64)]) {
        let figure = |name| figures.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
        let [real, fake, accuracy] = ["logits_real", "logits_fake", "discriminator_accuracy"].map(figure);
        self.seen = real.zip(fake).zip(accuracy).map(|((real, fake), accuracy)| [real, fake, accuracy]);
    }

    /// Updates the statistics after the update of the weights.
    pub fn follow(&mut self) {
        if let Some([real, fake, accuracy]) = self.seen.take() {
            self.logit_ema.follow(real, fake, accuracy);
        }
    }

    /// The statistics in a checkpoint; null before the first step with a discriminator.
    pub fn state(&self) -> Value {
        if self.logit_ema == LogitEma::default() { Value::Null } else { json!({ "logits": self.logit_ema }) }
    }

    /// Restores what [`Discriminated::state`] gave. Checkpoints of runs without a discriminator have none.
    pub fn restore(&mut self, state: &Value) {
        self.logit_ema = serde_json::from_value(state["logits"].clone()).unwrap_or_default();
    }
}
