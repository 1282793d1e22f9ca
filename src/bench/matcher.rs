//! The benchmarked work of the matcher, on random images and texts.

use super::{
    Work, flops,
    shapes::Shape,
    work::{Step, count, tokens},
};
use crate::{
    error::Result,
    model::{Matcher, Tokens, matcher::Input},
    nn::params::{Params, Scope},
    random::Random,
    train::{
        contrast::{self, Settings},
        shards::Shards,
    },
};
use candle_core::{DType, Device, Tensor};

/// Text tokens, as in the Chinese BERT vocabulary.
const VOCABULARY: usize = 21_128;

/// Training steps on one batch of pairs without padding.
pub fn train(shape: &Shape) -> Result<Work<'static>> {
    let (matcher, params) = matcher(shape)?;
    let inputs = [[images(shape)?, texts(shape)?]];
    let captions: Vec<u64> = (0..shape.batch as u64).collect();
    let shards = Shards::on_one_rank(&params, &contrast::parameter_groups(&matcher))?;
    let settings =
        Settings { loss: shape.config.matcher.loss, activation_checkpointing: 0, loss_scale: 1.0, requires_grad: true };
    let mut step = Step::new(shape, shards)?;
    let run = Box::new(move || {
        step.take(|shards| {
            shards.begin(0);
            contrast::accumulate(&matcher, &inputs, &captions, settings, shards)?;
            shards.finish()
        })
    });
    Ok(work("matcher", shape, run, &params, "pairs", 3.0 * flops::matcher(shape, 1.0)))
}

/// Embeddings of one batch of images.
pub fn embed(shape: &Shape) -> Result<Work<'static>> {
    let (matcher, params) = matcher(shape)?;
    let images = images(shape)?;
    let run = Box::new(move || matcher.embed(&images).map(|_| ()));
    Ok(work("embed", shape, run, &params, "images", flops::matcher(shape, 0.0)))
}

fn work(
    name: &'static str,
    shape: &Shape,
    run: Box<dyn FnMut() -> Result<()>>,
    params: &Params,
    unit: &'static str,
    flops: f64,
) -> Work<'static> {
    let precision = shape.config.train.precision;
    let (parameters, amount) = (count(params), shape.batch);
    Work { name, precision: precision.name(), factors: precision, run, parameters, amount, unit, flops }
}

fn matcher(shape: &Shape) -> Result<(Matcher, Params)> {
    let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
    let text = (VOCABULARY, shape.config.text.max_tokens);
    let matcher = Matcher::new(&scope, &shape.config.matcher, text, shape.config.train.precision)?;
    Ok((matcher, scope.params()))
}

fn images(shape: &Shape) -> Result<Input> {
    let side = shape.config.matcher.image_size;
    let mut random = Random::keyed(1, "pixels", 0, 0);
    let pixels = (0..shape.batch * side * side * 3).map(|_| random.unit() as f32 * 2.0 - 1.0).collect::<Vec<_>>();
    Ok(Input::Images(Tensor::from_vec(pixels, (shape.batch, side, side, 3), &Device::Cpu)?))
}

fn texts(shape: &Shape) -> Result<Input> {
    let length = shape.config.text.max_tokens;
    let ids = Tensor::from_vec(tokens("texts", VOCABULARY, shape.batch * length), (shape.batch, length), &Device::Cpu)?;
    Ok(Input::Texts(Tokens::whole(ids)?))
}
