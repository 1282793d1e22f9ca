//! The joint update of the image tokenizer in image → text, an option of the task `end-to-end`: [`JointTokenizer`] has the
//! gradients. What else the task needs for it is here: the tokenizer in training, its batches, its EMA codebook.

use super::pixels::pixels;
use crate::{
    config::{self, Config, Train},
    data::Record,
    dist::Group,
    error::{Context, Result, ensure, usage},
    model::{Batch, Generator, JointTokenizer},
    nn::{params::Scope, segment::Segment, weights::Values},
    tokenizer::{
        ImageTokenizer, PixelBatch, Statistics,
        quantizer::{Quantizer, gumbel::Relaxation},
    },
    train::shards::Shards,
};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// The scope of the tokenizer's parameters, below which they have the names of an image tokenizer's.
pub const SCOPE: &str = "image_tokenizer";
/// Index of the tokenizer's segment in the chain.
pub const SEGMENT: usize = 0;
/// The vectors of nearest codes.
const CODEBOOK: &str = "image_tokenizer.quantize.embedding.weight";

/// Whether a configuration trains the image tokenizer together with the generator.
pub fn is_on(config: &Config) -> bool {
    config.task.has_reconstructor() && config.end_to_end.trains_tokenizer()
}

/// The image tokenizer in training, in its scope below the root `scope`: with the perceptual loss if its folder is given, and
/// without a discriminator. Its own settings are those of `config`.
///
/// # Errors
/// There is no perceptual network.
pub fn image_tokenizer(scope: &Scope, config: &Config) -> Result<ImageTokenizer> {
    let settings = &config.image_tokenizer;
    let perceptual_weight = if settings.perceptual.is_empty() { 0.0 } else { settings.perceptual_weight };
    let settings = config::ImageTokenizer { perceptual_weight, adversarial_weight: 0.0, ..settings.clone() };
    ImageTokenizer::in_training(&scope.at(SCOPE), &settings)
}

/// Checks that there is something to train it with, and starts the averages of an EMA codebook at its vectors.
///
/// # Errors
/// The quantizer has no soft codes, or the configuration has no image → text.
pub fn start(tokenizer: &ImageTokenizer, config: &Config) -> Result<()> {
    let off = "set end_to_end.tokenizer_gradient_scale = 0 to freeze it";
    let soft = tokenizer.quantizer().has_soft_codes();
    ensure!(soft, usage("the image tokenizer cannot be trained with image → text: fsq has no soft codes", off));
    let what = "the image tokenizer is to be trained with image → text, but there is none";
    let hint = "set train.caption_batch_size and train.text_loss_weight, or end_to_end.tokenizer_gradient_scale = 0";
    ensure!(images(&config.train) > 0, usage(what, hint));
    match (tokenizer.quantizer(), tokenizer.average()) {
        (Quantizer::Vector(nearest), Some(average)) => average.start_at(nearest),
        _ => Ok(()),
    }
}

/// Images of a step's image → text sequences.
pub fn images(train: &Train) -> usize {
    let kinds = [(train.text_loss_weight, train.caption_batch_size), (train.answer_loss_weight, train.vqa_batch_size)];
    kinds.into_iter().filter(|(weight, _)| *weight > 0.0).map(|(_, size)| size).sum()
}

/// The chain of the generator, with the image tokenizer first if it is trained too.
pub fn chain<'a>(
    config: &Config,
    model: &'a Generator,
    tokenizer: Option<&'a ImageTokenizer>,
) -> Vec<Box<dyn Segment<Batch> + 'a>> {
    let mut chain = model.segments();
    if let Some(tokenizer) = tokenizer.filter(|_| is_on(config)) {
        chain.insert(SEGMENT, Box::new(JointTokenizer::new(tokenizer, config.end_to_end.tokenizer_temperature)));
    }
    chain
}

/// The images of image → text samples, the first of which has position `first` in the step. A Gumbel softmax has the
/// temperature and the KL weight that the tokenizer's training ended with.
pub fn batch(config: &Config, records: &[Record], (step, first): (u64, u64), loss_scale: f64) -> Result<PixelBatch> {
    let (settings, seed) = (&config.image_tokenizer, config.seed);
    let [_, temperature] = settings.temperature;
    let relaxation = Relaxation { temperature, kl_weight: settings.kl_weight, seed, step, first };
    let share = records.len() as f64 / images(&config.train).max(1) as f64;
    Ok(PixelBatch { loss_scale, step, relaxation, ..PixelBatch::new(pixels(records)?, share) })
}

/// What this rank's micro-batches saw of the tokenizer.
#[derive(Default)]
pub struct Seen {
    /// Squared error as a share of the step's mean.
    squares: f64,
    codes: Vec<u32>,
    /// Values of the latents, where an EMA codebook follows them.
    latents: Vec<f32>,
}

impl Seen {
    /// Adds a micro-batch.
    ///
    /// # Errors
    /// The device fails.
    pub fn add(&mut self, tokenizer: Option<&ImageTokenizer>, batch: &Batch) -> Result<()> {
        let Some(pixels) = &batch.source_pixels else { return Ok(()) };
        let Some(statistics) = pixels.statistics.take() else { return Ok(()) };
        self.squares += pixels.share * statistics.term("l2");
        let averaged = tokenizer.is_some_and(|tokenizer| tokenizer.average().is_some());
        if let Some(latents) = statistics.latents.as_ref().filter(|_| averaged) {
            self.latents.extend(latents.flatten_all()?.to_vec1::<f32>()?);
        }
        self.codes.extend(statistics.codes);
        Ok(())
    }

    /// What all ranks saw.
    ///
    /// # Errors
    /// A rank does not come.
    pub fn gather(self, config: &Config, group: &Group) -> Result<Statistics> {
        let squares = group.sum(&[self.squares])?;
        let codes = group.gather(self.codes)?.iter().flat_map(|codes| codes.iter().copied()).collect();
        let parts = group.gather(self.latents)?;
        let latents: Vec<f32> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let dim = config.image_tokenizer.code_dim;
        let tensor = |latents: Vec<f32>| Tensor::from_vec(latents, ((), dim), &Device::Cpu);
        let latents = if latents.is_empty() { None } else { Some(tensor(latents)?) };
        Ok(Statistics { terms: squares.into_iter().map(|mean| ("l2", mean)).collect(), codes, latents })
    }
}

/// Has an EMA codebook follow the encoder, after the update of the weights.
///
/// # Errors
/// A rank does not come.
pub fn follow(tokenizer: &ImageTokenizer, train: &Train, seen: &Statistics, shards: &mut Shards) -> Result<()> {
    let (Quantizer::Vector(nearest), Some(average)) = (tokenizer.quantizer(), tokenizer.average()) else {
        return Ok(());
    };
    match seen.latents.as_ref().filter(|_| !train.freezes(CODEBOOK)) {
        Some(latents) => shards.edit(SEGMENT, || average.update(nearest, latents, &seen.codes)),
        None => Ok(()),
    }
}

/// Takes the weights of the tokenizer's own model folder out of those of all; none if it is not trained.
///
/// # Errors
/// None that a caller could cause.
pub fn take_weights<'v>(weights: &mut BTreeMap<String, Values<'v>>) -> Result<BTreeMap<String, Values<'v>>> {
    let all = std::mem::take(weights);
    let (ours, rest): (BTreeMap<_, _>, _) = all.into_iter().partition(|(name, _)| config::begins_with(name, SCOPE));
    *weights = rest;
    let inner = |name: String| name.strip_prefix(SCOPE)?.strip_prefix('.').map(str::to_owned);
    ours.into_iter().map(|(name, values)| Ok((inner(name).context("a name without an end")?, values))).collect()
}
