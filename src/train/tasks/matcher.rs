//! The task `matcher`: images and texts through their encoders, the contrastive loss over the whole batch.

use super::{FileKind, Fingerprint, InputFile, Publisher, Task, TaskSpec, vocabulary};
use crate::{
    bundle::{self, Bundle, Parts},
    config::{self, Config, ContrastiveLoss, ImageEncoder, Train},
    data::{
        self, Kind, Record,
        image::{from_pixels, to_pixels},
        image_file,
    },
    dist::{self, Group},
    error::{Context, Result, ensure, usage},
    model::{Matcher, Tokens, flops, matcher::Input},
    nn::params::{Params, Scope},
    random::Random,
    runtime,
    text::WordPiece,
    train::{
        StepMetrics,
        contrast::{self, Settings},
        data_loader::DataLoader,
        inputs::Inputs,
        shards::Shards,
    },
};
use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage, imageops};
use rayon::prelude::*;
use std::{collections::HashMap, path::Path, time::Duration};

/// Images and their texts.
#[derive(Debug)]
pub struct Spec;

impl TaskSpec for Spec {
    fn start(&self, config: &Config, group: &Group) -> Result<Box<dyn Task>> {
        Ok(Box::new(MatcherTask::new(config, group)?))
    }

    fn sample_kind(&self, _config: &Config, _inputs: &Inputs) -> Kind {
        // The size does not matter here: nothing is read.
        Kind::Resized(1)
    }

    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)> {
        vec![("train.batch_size", train.batch_size)]
    }

    fn parameter_groups(&self, config: &Config, inputs: &Inputs) -> Result<Vec<Params>> {
        let scope = Scope::empty_from_seed(config.seed, &Device::Cpu);
        let model = build(&scope, config, inputs.vocabulary)?;
        let chains = [model.image_segments(), model.text_segments()];
        let encoders = chains.iter().flatten().map(|segment| segment.params().clone());
        Ok(encoders.chain([model.scale().params().clone()]).collect())
    }

    fn parts(&self) -> &'static [(&'static str, &'static [&'static str])] {
        &[("image encoder", &["image."]), ("text encoder", &["text."]), ("logit scale", &["logit_scale", "logit_bias"])]
    }

    fn flops(&self, config: &Config, _inputs: &Inputs) -> f64 {
        let [image, text] = flops::matcher(&config.matcher, config.text.max_tokens);
        3.0 * config.train.batch_size as f64 * (image + text)
    }

    fn files<'a>(&self, config: &'a Config) -> Vec<InputFile<'a>> {
        vec![InputFile { key: "text.vocab", path: &config.text.vocab, kind: FileKind::File, required: true }]
    }

    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        model.expect(config::Task::Matcher)?;
        Ok(model)
    }

    fn fingerprint_of(&self, _config: &Config, model: &Bundle) -> Result<Fingerprint> {
        Ok(fingerprint(&model.text()?))
    }

    fn meaning_keys(&self, _config: &Config) -> &'static [&'static str] {
        &[
            "matcher.image_encoder",
            "matcher.image_heads",
            "matcher.image_activation",
            "matcher.text_heads",
            "matcher.text_activation",
        ]
    }
}

fn build(scope: &Scope, config: &Config, vocabulary: usize) -> Result<Matcher> {
    Matcher::new(scope, &config.matcher, (vocabulary, config.text.max_tokens), config.train.precision)
}

fn fingerprint(text: &WordPiece) -> Fingerprint {
    Fingerprint::from([(vocabulary::NAME.into(), vocabulary::digest(text))])
}

/// The matcher in training.
pub struct MatcherTask {
    config: Config,
    model: Matcher,
    params: Params,
    text: WordPiece,
    data_loader: DataLoader,
}

/// Images of the sample sheet.
const SHEET: usize = 16;

impl MatcherTask {
    /// A fresh matcher over the configuration's vocabulary and pairs.
    ///
    /// # Errors
    /// One of the two is missing, the image encoder is a ResNet that is not frozen, or the loss has no negatives.
    pub fn new(config: &Config, group: &Group) -> Result<Self> {
        let trainable = config.matcher.image_encoder == ImageEncoder::Vit || config.train.freezes("image");
        let hint =
            "train its text encoder alone with train.freeze = [\"image\"], or take matcher.image_encoder = \"vit\"";
        ensure!(trainable, usage("a matcher's ResNet cannot be trained", hint));
        let has_negatives = config.train.batch_size > 1 || config.matcher.loss == ContrastiveLoss::Sigmoid;
        let hint = "make train.batch_size at least 2, or take matcher.loss = \"sigmoid\"";
        ensure!(has_negatives, usage("InfoNCE learns nothing from a single pair", hint));
        let text = vocabulary::load(&config.text)?;
        let side = loaded_side(&config.matcher);
        let data_loader = DataLoader::new(config, Kind::Resized(side), &[config.train.batch_size], group)?;
        let scope = Scope::from_seed(config.seed, DType::F32, &runtime::device()?);
        let model = build(&scope, config, text.vocab_size())?;
        Ok(Self { config: config.clone(), model, params: scope.params(), text, data_loader })
    }

    /// The images of a micro-batch and their texts; the samples start at position `first` of the step.
    fn inputs(&self, matcher: &config::Matcher, records: &[Record], step: u64, first: u64) -> Result<[Input; 2]> {
        let (device, seed) = (runtime::device()?, self.config.seed);
        let images = records.par_iter().enumerate().map(|(i, record)| {
            let image = record.image.as_ref().context("a sample without an image")?;
            let random = Random::keyed(seed, "augmentation", step, first + i as u64);
            Ok(augment(image, matcher, random))
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        let captions = records.iter().map(|record| record.caption.as_str());
        let texts = Tokens::of_texts(&self.text, captions, self.config.text.max_tokens, &device)?;
        Ok([Input::Images(to_pixels(&images)?.to_device(&device)?), Input::Texts(texts)])
    }

    /// The metrics of this rank's samples of step `step`. With `loss_scale`, the gradients of `loss_scale` · loss are added
    /// to those in `shards`.
    fn pass(
        &self,
        matcher: &config::Matcher,
        (first, records): (u64, Vec<Record>),
        step: u64,
        loss_scale: Option<f64>,
        shards: &mut Shards,
    ) -> Result<StepMetrics> {
        let config::Train { accumulation, activation_checkpointing, batch_size, .. } = self.config.train;
        let parts = (0..accumulation).map(|i| dist::part(records.len(), i, accumulation));
        let inputs = parts.map(|part| self.inputs(matcher, &records[part.clone()], step, first + part.start as u64));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let captions: Vec<u64> = records.iter().map(|record| digest(&record.caption)).collect();
        let settings = Settings {
            loss: self.config.matcher.loss,
            activation_checkpointing,
            loss_scale: loss_scale.unwrap_or(1.0),
            requires_grad: loss_scale.is_some(),
        };
        let seen = contrast::accumulate(&self.model, &inputs, &captions, settings, shards)?;
        let flops: f64 = inputs.iter().map(|pair| flops_of(matcher, pair)).sum();
        let sums = shards.group().sum(&[seen.loss, seen.correct as f64, flops])?;
        let figures = vec![("accuracy", sums[1] / (2 * batch_size) as f64), ("scale", seen.scale)];
        Ok(StepMetrics { losses: vec![("loss", sums[0])], figures, amount: batch_size, unit: "pairs", flops: sums[2] })
    }
}

/// FLOPs of a micro-batch, forward and backward; its longest text decides how many positions texts have.
fn flops_of(matcher: &config::Matcher, pair: &[Input; 2]) -> f64 {
    let of_input = |input: &Input| match input {
        Input::Images(pixels) => pixels.dim(0).unwrap_or(0) as f64 * flops::matcher(matcher, 0)[0],
        Input::Texts(texts) => texts.lengths.len() as f64 * flops::matcher(matcher, texts.width())[1],
    };
    3.0 * pair.iter().map(of_input).sum::<f64>()
}

/// Side length of the images that the loader gives: large enough that the smallest crop is not enlarged.
fn loaded_side(matcher: &config::Matcher) -> u32 {
    (matcher.image_size as f64 / matcher.min_crop_area.sqrt()).ceil() as u32
}

/// A random crop (as torchvision's RandomResizedCrop, of the squared image) and flip.
fn augment(image: &RgbImage, matcher: &config::Matcher, mut random: Random) -> RgbImage {
    let side = f64::from(image.width());
    let size = matcher.image_size as u32;
    let area = matcher.min_crop_area + (1.0 - matcher.min_crop_area) * random.unit();
    // Width over height between 3/4 and 4/3, as far as the area allows.
    let bound = (4f64 / 3.0).min(1.0 / area).ln();
    let ratio = (bound * (2.0 * random.unit() - 1.0)).exp();
    let part = |share: f64| (side * share.min(1.0)).round().max(1.0);
    let (width, height) = (part((area * ratio).sqrt()), part((area / ratio).sqrt()));
    let (left, top) = ((side - width) * random.unit(), (side - height) * random.unit());
    let crop = imageops::crop_imm(image, left as u32, top as u32, width as u32, height as u32).to_image();
    let resized = data::resize_bicubic(&crop, size, size);
    if matcher.flip && random.unit() < 0.5 { imageops::flip_horizontal(&resized) } else { resized }
}

/// Equal for equal captions.
fn digest(caption: &str) -> u64 {
    let hash = blake3::hash(caption.as_bytes());
    hash.as_bytes()[..8].iter().fold(0, |digest, byte| digest << 8 | u64::from(*byte))
}

impl Task for MatcherTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        Ok(fingerprint(&self.text))
    }

    fn parameter_groups(&self) -> Vec<Vec<String>> {
        contrast::parameter_groups(&self.model)
    }

    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics> {
        let samples = self.data_loader.next(step)?.swap_remove(0);
        self.pass(&self.config.matcher, samples, step, Some(loss_scale), shards)
    }

    fn validate(&mut self, _step: u64, batch: u64, shards: &mut Shards) -> Result<StepMetrics> {
        let samples = self.data_loader.validation(batch)?.swap_remove(0);
        let whole = config::Matcher { min_crop_area: 1.0, flip: false, ..self.config.matcher.clone() };
        self.pass(&whole, samples, batch, None, shards)
    }

    /// Keeps the scale in bounds, as CLIP does.
    fn after_step(&mut self, _step: u64, shards: &mut Shards) -> Result<()> {
        let unit = self.parameter_groups().len() - 1;
        if shards.is_frozen(unit) {
            return Ok(());
        }
        shards.edit(unit, || self.model.scale().clamp())
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

    /// Images beside a matrix: how well each (row) matches the text of each (column), from black to white. The diagonal
    /// should be white.
    fn sample(&self, weights: HashMap<String, Tensor>, path: &Path) -> Result<()> {
        let records = self.data_loader.fixed(SHEET);
        if records.is_empty() {
            return Ok(());
        }
        let scope = Scope::from_tensors(weights, DType::F32, &runtime::device()?);
        let model = build(&scope, &self.config, self.text.vocab_size())?;
        let [images, texts] = self.inputs(&self.config.matcher, &records, 0, 0)?;
        let Input::Images(pixels) = &images else { return Ok(()) };
        let shown = from_pixels(pixels)?;
        let cosines = model.embed(&images)?.matmul(&model.embed(&texts)?.t()?)?.to_vec2::<f32>()?;
        image_file::write_png(path, &sheet(&shown, &cosines))
    }

    fn publisher(&self) -> Publisher {
        let (config, vocab) = (self.config.clone(), Some(self.text.vocab_text()));
        Box::new(move |weights, folder| {
            let attribution = bundle::attribution_of(&config.data.sources);
            let parts = Parts { config: &config, weights, vocab, attribution, image_tokenizer: None };
            bundle::write(folder, &parts, safetensors::Dtype::F32)
        })
    }
}

/// Side length of a cell of a sample sheet in pixels.
const CELL: u32 = 32;

fn sheet(images: &[RgbImage], cosines: &[Vec<f32>]) -> RgbImage {
    let count = images.len() as u32;
    let mut sheet = RgbImage::new(CELL * (count + 1), CELL * count);
    for ((row, image), cosines) in (0..).zip(images).zip(cosines) {
        let y = i64::from(row * CELL);
        imageops::replace(&mut sheet, &data::resize_bicubic(image, CELL, CELL), 0, y);
        let max = cosines.iter().copied().fold(f32::MIN, f32::max);
        let min = cosines.iter().copied().fold(f32::MAX, f32::min);
        for (column, cosine) in (1..).zip(cosines) {
            let value = (255.0 * (cosine - min) / (max - min).max(1e-6)) as u8;
            let cell = RgbImage::from_pixel(CELL, CELL, Rgb([value; 3]));
            imageops::replace(&mut sheet, &cell, i64::from(column * CELL), y);
        }
    }
    sheet
}
