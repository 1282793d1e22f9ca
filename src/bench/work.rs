//! The benchmarked work: the calls of training and generation, on random tokens and pixels.

use super::{Work, flops, shapes::Shape};
use crate::{
    config::{self, Precision},
    error::{Result, ensure, usage},
    generate::Sampling,
    model::{Batch, Decoder, Generator, Source, Tokens},
    nn::{
        params::{Params, Scope},
        segment::Chain,
    },
    ops::packed::Format,
    random::Random,
    runtime,
    tokenizer::{ImageTokenizer, PixelBatch},
    train::{
        engine,
        optimizer::{self, GradientScale, Optimizer},
        shards::Shards,
    },
};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Training steps on one batch of text→image sequences without padding.
pub fn train(shape: &Shape) -> Result<Work<'static>> {
    let (generator, params) = generator(shape)?;
    let batch = batch(shape)?;
    let (amount, flops) = (batch.targets(), flops::train(shape));
    let parameters = count(&params);
    let mut step = Step::new(shape, Shards::alone(&generator.segments())?)?;
    let run = Box::new(move || step.take(|shards| forward_backward(&generator.segments(), &batch, shards)));
    Ok(Work {
        name: "train",
        precision: shape.config.train.precision.name(),
        factors: shape.config.train.precision,
        run,
        parameters,
        amount,
        unit: "tokens",
        flops,
    })
}

/// Training steps on one batch of images.
pub fn tokenizer(shape: &Shape) -> Result<Work<'static>> {
    let config = &shape.config.image_tokenizer;
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu).in_precision(shape.config.train.precision);
    let (model, params) = (ImageTokenizer::new(&scope, config)?, scope.params());
    let side = config.image_size;
    let mut random = Random::keyed(1, "pixels", 0, 0);
    let pixels = (0..shape.batch * side * side * 3).map(|_| random.unit() as f32 * 2.0 - 1.0).collect();
    let pixels = Tensor::from_vec(pixels, (shape.batch, side, side, 3), &Device::Cpu)?;
    let parameters = count(&params);
    let mut step = Step::new(shape, Shards::alone(&model.segments())?)?;
    let run = Box::new(move || {
        let batch = PixelBatch::new(pixels.clone(), 1.0);
        step.take(|shards| forward_backward(&model.segments(), &batch, shards))
    });
    let flops = crate::model::flops::tokenizer(config, shape.batch);
    Ok(Work {
        name: "tokenizer",
        precision: shape.config.train.precision.name(),
        factors: shape.config.train.precision,
        run,
        parameters,
        amount: shape.batch,
        unit: "images",
        flops,
    })
}

/// One step of `vilg train`, without reading and logging.
pub(super) struct Step {
    shards: Shards<'static>,
    optimizer: Optimizer,
    settings: config::Train,
    number: u64,
}

impl Step {
    pub(super) fn new(shape: &Shape, shards: Shards<'static>) -> Result<Self> {
        let settings = shape.config.train.clone();
        let optimizer = Optimizer::new(&shards, &settings)?;
        Ok(Self { shards, optimizer, settings, number: 0 })
    }

    /// `gradients`: forward and backward passes.
    pub(super) fn take(&mut self, gradients: impl FnOnce(&mut Shards) -> Result<()>) -> Result<()> {
        let Self { shards, optimizer, settings, number } = self;
        *number += 1;
        gradients(shards)?;
        let norm = optimizer::squares(shards.reduced(), shards.params())?.sqrt();
        let scale = GradientScale::new(norm, settings.clip_norm, 1.0);
        optimizer.step(shards, settings, *number, 1.0, scale)
    }
}

/// Forward and backward through a chain, reusing the gradient buffers of the last pass.
pub fn forward_backward<B>(chain: &Chain<B>, batch: &B, shards: &mut Shards) -> Result<()> {
    shards.begin(0);
    engine::accumulate(chain, batch, 0, shards)?;
    shards.finish()
}

/// Generates all codes of one image for each text.
///
/// # Errors
/// `format` is not f32 on a GPU, where decoding computes in f32.
pub fn decode(shape: &Shape, format: Format) -> Result<Work<'static>> {
    let packs = runtime::device()?.is_cpu() || format == Format::F32;
    ensure!(packs, usage("on a GPU decoding computes in f32", "leave out --precision, or use --device cpu"));
    let (generator, params) = generator(shape)?;
    let decoder = Decoder::new(Arc::new(generator), format);
    let texts = texts(shape);
    let codes = shape.grid.0 * shape.grid.1;
    let run = Box::new(move || generate(&decoder, &texts, codes));
    let (parameters, amount) = (count(&params), shape.batch * codes);
    Ok(Work {
        name: "decode",
        precision: format.name(),
        // The packed weights are converted to f32 for the products.
        factors: Precision::F32,
        run,
        parameters,
        amount,
        unit: "tokens",
        flops: flops::decode(shape),
    })
}

fn generate(decoder: &Decoder, texts: &[Vec<u32>], codes: usize) -> Result<()> {
    let draw = |logits: &[f32]| -> Result<Vec<u32>> {
        let rows = logits.par_chunks(logits.len() / texts.len());
        rows.map(|row| Sampling::GREEDY.draw(row, 0.0)).collect()
    };
    let (mut state, logits) = decoder.start(&Source::text_to_image(texts))?;
    let mut next = draw(&logits)?;
    for _ in 1..codes {
        next = draw(state.logits_next(&next)?)?;
    }
    Ok(())
}

/// A new generator and its parameters.
pub fn generator(shape: &Shape) -> Result<(Generator, Params)> {
    let device = runtime::device()?;
    // As in training: on a CPU, products round f32 weights themselves.
    let kept = if device.is_cpu() { Precision::F32 } else { shape.config.train.precision };
    let scope = Scope::from_seed(1, DType::F32, &device).in_precision(kept);
    let generator = Generator::new(&scope, &shape.config, shape.vocabulary, shape.codebook, shape.grid)?;
    Ok((generator, scope.params()))
}

/// Random text→image sequences.
pub fn batch(shape: &Shape) -> Result<Batch> {
    let device = runtime::device()?;
    let (texts, length, codes) = (texts(shape), shape.config.text.max_tokens, shape.grid.0 * shape.grid.1);
    let text = Tensor::from_vec(texts.concat(), (shape.batch, length), &device)?;
    let codes = Tensor::from_vec(tokens("codes", shape.codebook, shape.batch * codes), (shape.batch, codes), &device)?;
    let mut batch = Batch::text_to_image(Tokens::whole(text)?, codes)?;
    batch.loss_scale = 1.0 / batch.targets() as f64;
    Ok(batch)
}

fn texts(shape: &Shape) -> Vec<Vec<u32>> {
    let length = shape.config.text.max_tokens;
    tokens("texts", shape.vocabulary, shape.batch * length).chunks(length).map(<[u32]>::to_vec).collect()
}

pub(super) fn tokens(purpose: &str, vocabulary: usize, count: usize) -> Vec<u32> {
    let mut random = Random::keyed(1, purpose, 0, 0);
    (0..count).map(|_| random.below(vocabulary as u64) as u32).collect()
}

pub(super) fn count(params: &Params) -> usize {
    params.values().map(|var| var.elem_count()).sum()
}
