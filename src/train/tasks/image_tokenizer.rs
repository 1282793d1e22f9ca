//! The task `image-tokenizer`: images through encoder, quantiser and decoder (paper §2.1).

use super::{
    FileKind, InputFile, Publisher, Task, TaskSpec,
    pixels::{permute_channels, pixels},
};
use crate::{
    bundle::{self, Bundle, Parts},
    config::{self, Config, Train},
    data::{self, Kind, image::from_pixels, image_file},
    dist::{self, Group},
    error::{Context, Result, ensure},
    model::flops,
    nn::params::{Params, Scope},
    random::Random,
    runtime,
    tokenizer::{
        self, ImageTokenizer, PixelBatch, Statistics,
        discriminator::{self, LogitEma},
        quantizer::{Quantizer, gumbel::Relaxation, vector_quantizer},
    },
    train::{
        StepMetrics,
        data_loader::DataLoader,
        engine,
        inputs::Inputs,
        shards::{Shards, names},
    },
};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::{collections::HashMap, path::Path, time::Duration};

/// Images of a sample sheet, and how many stand side by side.
const SHEET: (usize, usize) = (16, 8);

/// The terms that count as the loss of a step. GAN losses do not show progress, and the entropy is negative.
const LOSSES: [&str; 7] = ["l1", "l2", "nll", "lpips", "codebook", "commitment", "kl"];

/// The vectors of nearest codes.
const CODEBOOK: &str = "quantize.embedding.weight";

/// The segment that quantises.
const WITH_CODEBOOK: usize = 1;

/// Pixels to codes and back.
#[derive(Debug)]
pub struct Spec;

impl TaskSpec for Spec {
    fn start(&self, config: &Config, group: &Group) -> Result<Box<dyn Task>> {
        Ok(Box::new(ImageTokenizerTask::new(config, group)?))
    }

    fn sample_kind(&self, _config: &Config, inputs: &Inputs) -> Kind {
        Kind::Images(u32::try_from(inputs.tokenizer.image_size).unwrap_or(u32::MAX))
    }

    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)> {
        vec![("train.batch_size", train.batch_size)]
    }

    fn parameter_groups(&self, config: &Config, inputs: &Inputs) -> Result<Vec<Params>> {
        // The perceptual network is not trained, and its folder may be on another machine.
        let settings = config::ImageTokenizer { perceptual_weight: 0.0, ..inputs.tokenizer.clone() };
        let scope = Scope::empty_from_seed(config.seed, &Device::Cpu);
        let model = ImageTokenizer::in_training(&scope, &settings)?;
        Ok(model.segments().iter().map(|segment| segment.params().clone()).collect())
    }

    fn parts(&self) -> &'static [(&'static str, &'static [&'static str])] {
        &[
            ("encoder", &["encoder."]),
            ("quantizer", &["quant_conv.", "quantize.", "post_quant_conv.", "decoder.blocks.input."]),
            ("decoder", &["decoder."]),
            ("discriminator", &["discriminator."]),
            ("EMA codebook", &["quantize.embedding.cluster_size", "quantize.embedding.embed_avg"]),
        ]
    }

    fn predicted_tokens(&self, config: &Config, inputs: &Inputs) -> usize {
        let (height, width) = inputs.tokenizer.grid();
        config.train.batch_size * height * width
    }

    fn flops(&self, config: &Config, inputs: &Inputs) -> f64 {
        flops::tokenizer(&inputs.tokenizer, config.train.batch_size)
    }

    fn files<'a>(&self, config: &'a Config) -> Vec<InputFile<'a>> {
        let (key, path) = ("image_tokenizer.perceptual", &config.image_tokenizer.perceptual);
        vec![InputFile { key, path, kind: FileKind::Folder, required: false }]
    }

    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        model.image_tokenizer_folder()
    }

    fn meaning_keys(&self, _config: &Config) -> &'static [&'static str] {
        &[
            "image_tokenizer.architecture",
            "image_tokenizer.quantizer",
            "image_tokenizer.l2_normalize",
            "image_tokenizer.fsq_levels",
        ]
    }
}

/// The image tokenizer in training.
pub struct ImageTokenizerTask {
    config: Config,
    model: ImageTokenizer,
    params: Params,
    data_loader: DataLoader,
    /// The step at which each code was last chosen, for the restart of dead codes.
    last_used: Vec<u64>,
    /// Where the discriminator's logits were lately.
    logit_ema: LogitEma,
    /// What the current step saw.
    seen: Option<Statistics>,
    /// Whether the codebook's moving average has begun.
    averaging: bool,
}

impl ImageTokenizerTask {
    /// A fresh tokenizer over the configuration's images.
    pub fn new(config: &Config, group: &Group) -> Result<Self> {
        let settings = &config.image_tokenizer;
        let kind = Kind::Images(u32::try_from(settings.image_size)?);
        let data_loader = DataLoader::new(config, kind, &[config.train.batch_size], group)?;
        let scope = Scope::from_seed(config.seed, DType::F32, &runtime::device()?).in_precision(config.train.precision);
        let model = ImageTokenizer::in_training(&scope, settings)?;
        let last_used = vec![0; settings.codebook_size];
        Ok(Self {
            config: config.clone(),
            model,
            params: scope.params(),
            data_loader,
            last_used,
            logit_ema: LogitEma::default(),
            seen: None,
            averaging: false,
        })
    }

    /// How the codes of images from position `first` of the step are drawn.
    fn relaxation(&self, step: u64, first: u64) -> Relaxation {
        let settings = &self.config.image_tokenizer;
        let ([begin, end], steps) = (settings.temperature, settings.temperature_steps);
        let done = step.saturating_sub(1).min(steps) as f64 / steps as f64;
        let temperature = end + (begin - end) * (1.0 + (done * std::f64::consts::PI).cos()) / 2.0;
        let kl_steps = if settings.kl_steps == 0 { steps } else { settings.kl_steps };
        let kl_weight = settings.kl_weight * (step.saturating_sub(1).min(kl_steps) as f64 / kl_steps as f64);
        Relaxation { temperature, kl_weight, seed: self.config.seed, step, first }
    }

    /// What all ranks saw of their samples, as in step `step`. With `loss_scale`, the gradients of `loss_scale` · loss
    /// are added to those in `shards`.
    fn pass(
        &self,
        (first, records): (u64, Vec<data::Record>),
        step: u64,
        loss_scale: Option<f64>,
        shards: &mut Shards,
    ) -> Result<Statistics> {
        let segments = self.model.segments();
        let (settings, mut seen) = (&self.config.train, Vec::new());
        let parts = settings.accumulation.min(records.len());
        for i in 0..parts {
            let range = dist::part(records.len(), i, parts);
            let part = &records[range.clone()];
            let share = part.len() as f64 / settings.batch_size as f64;
            let mut batch = PixelBatch::new(pixels(part)?, share);
            batch.loss_scale = loss_scale.unwrap_or(1.0);
            batch.step = step;
            batch.logit_ema = (step > self.config.image_tokenizer.adversarial_start).then_some(self.logit_ema);
            batch.relaxation = self.relaxation(step, first + range.start as u64);
            if loss_scale.is_some() {
                if i + 1 == parts {
                    shards.last_micro_batch();
                }
                engine::accumulate(&segments, &batch, settings.activation_checkpointing, shards)?;
            } else {
                engine::loss(&segments, &batch, shards)?;
            }
            seen.push((share, batch.statistics.into_inner().context("the tokenizer left no statistics")?));
        }
        gather(shards.group(), merge(seen)?)
    }

    fn metrics(&self, seen: &Statistics) -> StepMetrics {
        let (losses, mut figures) = seen.terms.iter().partition::<Vec<_>, _>(|(name, _)| LOSSES.contains(name));
        figures.extend([("psnr", seen.psnr()), ("perplexity", seen.perplexity())]);
        let amount = self.config.train.batch_size;
        let flops = flops::tokenizer(&self.config.image_tokenizer, amount);
        StepMetrics { losses, figures, amount, unit: "images", flops }
    }
}

/// What the parts of a step saw, as if they had been one: their means weighed by their images.
fn merge(parts: Vec<(f64, Statistics)>) -> Result<Statistics> {
    let (_, first) = parts.first().context("a step without images")?;
    let mean = |name| parts.iter().map(|(share, part)| share * part.term(name)).sum();
    let terms = first.terms.iter().map(|(name, _)| (*name, mean(name))).collect();
    let latents: Option<Vec<&Tensor>> = parts.iter().map(|(_, part)| part.latents.as_ref()).collect();
    let latents = latents.map(|latents| Tensor::cat(&latents, 0)).transpose()?;
    let codes = parts.iter().flat_map(|(_, part)| part.codes.iter().copied()).collect();
    Ok(Statistics { terms, codes, latents })
}

/// What all ranks saw, from what each saw: its means are its share of the step's.
fn gather(group: &Group, ours: Statistics) -> Result<Statistics> {
    let means = group.sum(&ours.terms.iter().map(|(_, mean)| *mean).collect::<Vec<_>>())?;
    let terms = ours.terms.iter().zip(means).map(|((name, _), mean)| (*name, mean)).collect();
    let codes = group.gather(ours.codes)?.iter().flat_map(|codes| codes.iter().copied()).collect();
    let all = |ours: Tensor| -> Result<Tensor> {
        let (_, height, width, dim) = ours.dims4()?;
        let parts = group.gather(ours.flatten_all()?.to_vec1()?)?;
        let values: Vec<f32> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        Ok(Tensor::from_vec(values, ((), height, width, dim), ours.device())?)
    };
    let latents = ours.latents.map(all).transpose()?;
    Ok(Statistics { terms, codes, latents })
}

impl Task for ImageTokenizerTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn gets_gradient(&self, name: &str) -> bool {
        !discriminator::is_ours(name) || self.config.image_tokenizer.adversarial_start == 0
    }

    fn parameter_groups(&self) -> Vec<Vec<String>> {
        names(&self.model.segments())
    }

    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics> {
        let (first, mut records) = self.data_loader.next(step)?.swap_remove(0);
        let (seed, share) = (self.config.seed, self.config.image_tokenizer.channel_permutation);
        for (position, record) in (first..).zip(&mut records) {
            permute_channels(record, share, Random::keyed(seed, "channels", step, position));
        }
        let seen = self.pass((first, records), step, Some(loss_scale), shards)?;
        let metrics = self.metrics(&seen);
        self.seen = Some(seen);
        Ok(metrics)
    }

    fn loss_changes_at(&self, step: u64) -> bool {
        self.config.image_tokenizer.loss_changes_at(step)
    }

    fn validate(&mut self, step: u64, batch: u64, shards: &mut Shards) -> Result<StepMetrics> {
        let samples = self.data_loader.validation(batch)?.swap_remove(0);
        let seen = self.pass(samples, step, None, shards)?;
        Ok(self.metrics(&seen))
    }

    fn data_wait(&self) -> Duration {
        self.data_loader.waited()
    }

    fn sources(&self) -> Vec<u64> {
        self.data_loader.dataset().sources.iter().map(data::Source::len).collect()
    }

    fn samples(&self) -> Vec<String> {
        self.data_loader.names().to_vec()
    }

    fn after_step(&mut self, step: u64, shards: &mut Shards) -> Result<()> {
        let Some(seen) = self.seen.take() else { return Ok(()) };
        if seen.terms.iter().any(|(name, _)| *name == "logits_real") {
            let term = |name| seen.term(name);
            self.logit_ema.follow(term("logits_real"), term("logits_fake"), term("discriminator_accuracy"));
        }
        let (Quantizer::Vector(nearest), Some(latents)) = (self.model.quantizer(), &seen.latents) else {
            return Ok(());
        };
        let (after, seed) = (self.config.image_tokenizer.restart_after, self.config.seed);
        let dead = vector_quantizer::dead_codes(&mut self.last_used, &seen.codes, after, step);
        let average = self.model.average();
        if self.config.train.freezes(CODEBOOK) || (average.is_none() && dead.is_empty()) {
            return Ok(());
        }
        shards.edit(WITH_CODEBOOK, || {
            if let Some(average) = average {
                // The first update, which need not be the first step: its gradients may have overflowed.
                if !self.averaging && !self.config.train.init_from.is_empty() {
                    average.start_at(nearest)?;
                }
                average.update(nearest, latents, &seen.codes)?;
                self.averaging = true;
            }
            if dead.is_empty() {
                return Ok(());
            }
            average.map_or(Ok(()), |average| average.forget(&dead))?;
            nearest.restart(&dead, latents, seed, step)
        })
    }

    fn state(&self) -> Value {
        json!({ "code_last_used": self.last_used, "logits": self.logit_ema, "averaging": self.averaging })
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        let last_used: Vec<u64> = serde_json::from_value(state["code_last_used"].clone())?;
        ensure!(last_used.len() == self.last_used.len(), "code_last_used is of another codebook");
        self.last_used = last_used;
        // Older checkpoints don't say: all but that of step 0 are from after the first update.
        self.averaging = state["averaging"].as_bool().unwrap_or(true);
        // Checkpoints from before there were adversaries have none.
        self.logit_ema = serde_json::from_value(state["logits"].clone()).unwrap_or_default();
        Ok(())
    }

    /// Rows of originals, each above their reconstructions.
    fn sample(&self, weights: HashMap<String, Tensor>, path: &Path) -> Result<()> {
        let records = self.data_loader.fixed(SHEET.0);
        let scope = Scope::from_tensors(weights, DType::F32, &runtime::device()?);
        let model = ImageTokenizer::new(&scope, &self.config.image_tokenizer)?;
        let mut images = Vec::new();
        for row in records.chunks(SHEET.1) {
            let original = pixels(row)?;
            images.extend(from_pixels(&original)?);
            images.extend(from_pixels(&model.decode(&model.encode(&original)?)?)?);
        }
        image_file::write_png(path, &image_file::grid(&images, records.len().min(SHEET.1)))
    }

    fn publisher(&self) -> Publisher {
        let config = self.config.clone();
        Box::new(move |mut weights, folder| {
            weights.retain(|name, _| !tokenizer::is_of_training(name));
            let attribution = bundle::attribution_of(&config.data.sources);
            let parts = Parts { config: &config, weights, vocab: None, attribution, image_tokenizer: None };
            bundle::write(folder, &parts, safetensors::Dtype::F32)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::task_tests::tokenizer_config;

    #[test]
    fn the_divergence_may_have_a_ramp_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = tokenizer_config(folder.path());
        let settings = &mut config.image_tokenizer;
        (settings.kl_weight, settings.temperature_steps) = (1.0, 100);
        let mut task = ImageTokenizerTask::new(&config, &Group::alone()).unwrap();
        let mut at = |kl_steps, step| {
            task.config.image_tokenizer.kl_steps = kl_steps;
            let relaxation = task.relaxation(step, 0);
            (relaxation.kl_weight, relaxation.temperature)
        };
        // 0: that of the temperature, as before there was a key.
        assert_eq!([1, 51, 101, 500].map(|step| at(0, step).0), [0.0, 0.5, 1.0, 1.0]);
        assert_eq!([1, 6, 11, 500].map(|step| at(10, step).0), [0.0, 0.5, 1.0, 1.0]);
        assert_eq!(at(0, 51).1, at(10, 51).1);
    }
}
