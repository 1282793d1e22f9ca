//! The task `matcher`: images and texts through their encoders, the contrastive loss over the whole batch.

use super::{FileKind, Fingerprint, InputFile, Task, TaskSpec};
use crate::{
    bundle::{self, Bundle, Parts},
    config::{self, Config, ImageEncoder, Train},
    data::{
        self, Kind, Record,
        image::{from_pixels, to_pixels},
        image_file,
    },
    dist::{self, Group},
    error::{Context, Result, ensure, usage},
    model::{
        Matcher, Tokens, flops,
        matcher::{
            Input,
            contrastive::{Pairs, contrastive},
        },
    },
    nn::{
        params::{Params, Scope},
        segment::Segment,
        weights::Values,
    },
    random::Random,
    runtime,
    text::WordPiece,
    train::{
        StepMetrics,
        data_loader::DataLoader,
        engine::{Activations, Pass},
        inputs::Inputs,
        shards::{Shards, names},
    },
};
use candle_core::{DType, Device, Tensor};
use image::{Rgb, RgbImage, imageops};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
};

/// Images and their texts.
#[derive(Debug)]
pub struct Spec;

impl TaskSpec for Spec {
    fn start(&self, config: &Config, group: &Group) -> Result<Box<dyn Task>> {
        Ok(Box::new(MatcherTask::new(config, group)?))
    }

    fn sample_kind(&self, _inputs: &Inputs) -> Kind {
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
        3.0 * config.train.batch_size as f64 * flops::matcher(&config.matcher, config.text.max_tokens)
    }

    fn files<'a>(&self, config: &'a Config) -> Vec<InputFile<'a>> {
        vec![InputFile { key: "text.vocab", path: &config.text.vocab, kind: FileKind::File, required: true }]
    }

    fn initial_model(&self, model: Bundle) -> Result<Bundle> {
        model.expect(config::Task::Matcher)?;
        Ok(model)
    }

    fn fingerprint_of(&self, model: &Bundle) -> Result<Fingerprint> {
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
    let vocabulary = blake3::hash(text.vocab_text().as_bytes()).to_hex().to_string();
    Fingerprint::from([("vocabulary".into(), vocabulary)])
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
    /// One of the two is missing, or the image encoder is a ResNet that is not frozen.
    pub fn new(config: &Config, group: &Group) -> Result<Self> {
        let trainable = config.matcher.image_encoder == ImageEncoder::Vit || config.train.freezes("image");
        let hint =
            "train its text encoder alone with train.freeze = [\"image\"], or take matcher.image_encoder = \"vit\"";
        ensure!(trainable, usage("a matcher's ResNet cannot be trained", hint));
        let text = match config.text.vocab.as_str() {
            "demo" => Bundle::open("demo")?.text()?,
            path => WordPiece::load(path)?,
        };
        let text = text.with_normalization(config.text.normalize);
        let side = loaded_side(&config.matcher);
        let data_loader = DataLoader::new(config, Kind::Resized(side), &[config.train.batch_size], group)?;
        let scope = Scope::from_seed(config.seed, DType::F32, &runtime::device()?);
        let model = build(&scope, config, text.vocab_size())?;
        Ok(Self { config: config.clone(), model, params: scope.params(), text, data_loader })
    }

    /// The images of a micro-batch and their texts; the samples start at position `first` of the step.
    fn inputs(&self, records: &[Record], step: u64, first: u64) -> Result<[Input; 2]> {
        let device = runtime::device()?;
        let images = records.iter().zip(first..).map(|(record, index)| {
            let image = record.image.as_ref().context("a sample without an image")?;
            Ok(augment(image, &self.config.matcher, Random::keyed(self.config.seed, "augmentation", step, index)))
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        let captions = records.iter().map(|record| record.caption.as_str());
        let texts = Tokens::of_texts(&self.text, captions, self.config.text.max_tokens, &device)?;
        Ok([Input::Images(to_pixels(&images)?.to_device(&device)?), Input::Texts(texts)])
    }
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
    // Width over height between 3/4 and 4/3, as far as the area leaves room.
    let bound = (4f64 / 3.0).min(1.0 / area).ln();
    let ratio = (bound * (2.0 * random.unit() - 1.0)).exp();
    let part = |share: f64| (side * share.min(1.0)).round().max(1.0);
    let (width, height) = (part((area * ratio).sqrt()), part((area / ratio).sqrt()));
    let (left, top) = ((side - width) * random.unit(), (side - height) * random.unit());
    let crop = imageops::crop_imm(image, left as u32, top as u32, width as u32, height as u32).to_image();
    let resized = data::resize_bicubic(&crop, size, size);
    if matcher.flip && random.unit() < 0.5 { imageops::flip_horizontal(&resized) } else { resized }
}

/// A micro-batch of one encoder.
struct Branch<'a> {
    pass: Pass<'a, Input>,
    /// What its backward pass needs; `None`: run forward again (gradient caching, arXiv 2101.06983).
    activations: Option<Activations>,
    /// Its rows of the embeddings.
    rows: Range<usize>,
}

impl Branch<'_> {
    /// Adds the parameters' gradients, from the `gradient` of all embeddings of the encoder.
    fn backward(self, gradient: &[f32], loss_scale: f64, samples: usize, shards: &mut Shards) -> Result<()> {
        if self.pass.is_frozen(shards) {
            return Ok(());
        }
        let activations = match self.activations {
            Some(activations) => activations,
            None => self.pass.forward(shards)?.1,
        };
        let width = gradient.len() / samples;
        let gradient = &gradient[self.rows.start * width..self.rows.end * width];
        let gradient: Vec<f32> = gradient.iter().map(|value| value * loss_scale as f32).collect();
        let gradient = Tensor::from_vec(gradient, (self.rows.len(), width), &runtime::device()?)?;
        self.pass.backward(activations, Some(gradient), shards)
    }
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
        let mut groups = names(&self.model.image_segments());
        groups.extend(names(&self.model.text_segments()));
        groups.push(self.model.scale().params().keys().cloned().collect());
        groups
    }

    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics> {
        let (first, records) = self.data_loader.next(step)?.swap_remove(0);
        let settings = &self.config.train;
        let chains = [self.model.image_segments(), self.model.text_segments()];
        let scale: [Box<dyn Segment<()>>; 1] = [Box::new(self.model.scale())];
        let first_units = [0, chains[0].len()];
        let parts = (0..settings.accumulation).map(|i| dist::part(records.len(), i, settings.accumulation));
        let inputs = parts.clone().map(|part| self.inputs(&records[part.clone()], step, first + part.start as u64));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;

        // All embeddings first: the loss compares each image with all texts of the step.
        let (mut embeddings, mut branches) = ([Vec::<f32>::new(), Vec::new()], Vec::new());
        for (rows, inputs) in parts.zip(&inputs) {
            for (encoder, batch) in inputs.iter().enumerate() {
                let (chain, first_unit) = (&chains[encoder], first_units[encoder]);
                let activation_checkpointing = settings.activation_checkpointing;
                let pass = Pass { chain, batch, first_unit, activation_checkpointing };
                let (embedding, activations) = pass.forward(shards)?;
                embeddings[encoder].extend(embedding.flatten_all()?.to_vec1::<f32>()?);
                let activations = (settings.accumulation == 1).then_some(activations);
                branches.push((encoder, Branch { pass, activations, rows: rows.clone() }));
            }
        }
        let first_unit = chains[0].len() + chains[1].len();
        let scale_pass = Pass { chain: &scale, batch: &(), first_unit, activation_checkpointing: 0 };
        let (scale, scale_activations) = scale_pass.forward(shards)?;
        let scale = <[f32; 2]>::try_from(scale.to_vec1::<f32>()?.as_slice())?.map(f64::from);

        let captions: Vec<u64> = records.iter().map(|record| digest(&record.caption)).collect();
        let pairs = Pairs { images: &embeddings[0], texts: &embeddings[1], captions: &captions };
        let found = contrastive(self.config.matcher.loss, &pairs, scale, shards.group())?;

        let gradients = [&found.images, &found.texts];
        let last = branches.len() - chains.len();
        for (i, (encoder, branch)) in branches.into_iter().enumerate() {
            if i == last {
                shards.last_micro_batch();
            }
            branch.backward(gradients[encoder], loss_scale, records.len(), shards)?;
        }
        let dscale = found.scale.map(|gradient| (gradient * loss_scale) as f32);
        scale_pass.backward(scale_activations, Some(Tensor::new(&dscale, &runtime::device()?)?), shards)?;

        let seen = shards.group().sum(&[found.loss, found.correct as f64])?;
        let amount = settings.batch_size;
        let figures = vec![("accuracy", seen[1] / (2 * amount) as f64), ("scale", scale[0].exp())];
        Ok(StepMetrics { losses: vec![("loss", seen[0])], figures, amount, unit: "pairs" })
    }

    /// Keeps the scale in bounds, as CLIP does.
    fn after_step(&mut self, _step: u64, shards: &mut Shards) -> Result<()> {
        let scale = self.model.scale();
        let unit = self.model.image_segments().len() + self.model.text_segments().len();
        if shards.is_frozen(unit) {
            return Ok(());
        }
        shards.edit(unit, || scale.clamp())
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
        let [images, texts] = self.inputs(&records, 0, 0)?;
        let Input::Images(pixels) = &images else { return Ok(()) };
        let pictures = from_pixels(pixels)?;
        let cosines = model.embed(&images)?.matmul(&model.embed(&texts)?.t()?)?.to_vec2::<f32>()?;
        image_file::write_png(path, &sheet(&pictures, &cosines))
    }

    fn publish(&self, weights: BTreeMap<String, Values>, folder: &Path) -> Result<()> {
        let attribution = bundle::attribution_of(&self.config.data.sources);
        let vocab = Some(self.text.vocab_text());
        let parts = Parts { config: &self.config, weights, vocab, attribution, image_tokenizer: None };
        bundle::write(folder, &parts, safetensors::Dtype::F32)
    }
}

/// Side length of a cell of a sample sheet in pixels.
const CELL: u32 = 32;

fn sheet(pictures: &[RgbImage], cosines: &[Vec<f32>]) -> RgbImage {
    let count = pictures.len() as u32;
    let mut sheet = RgbImage::new(CELL * (count + 1), CELL * count);
    for ((row, picture), cosines) in (0..).zip(pictures).zip(cosines) {
        let y = i64::from(row * CELL);
        imageops::replace(&mut sheet, &data::resize_bicubic(picture, CELL, CELL), 0, y);
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
