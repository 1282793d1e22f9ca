//! AdamW, and Muon for the transformer's matrices. The [`Attributes`] of a parameter say which, and whether it decays.
//!
//! Moments are f32, in order of name, for weights of any dtype and device; `train.offload` says where they are. The update
//! is computed there.

use super::{
    owned::Owned,
    shards::{Handling, Shards},
};
use crate::{
    config::{MatrixOptimizer, Train, begins_with},
    error::{Result, bail, ensure, usage},
    nn::{
        gradients::Gradients,
        params::{Attributes, Params},
    },
    ops::{self, Buffer},
    runtime,
};
use candle_core::Tensor;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::{collections::BTreeMap, ops::Range};

/// The optimizer state of one parameter.
pub enum Moments {
    /// First and second moment.
    AdamW { m: Buffer, v: Buffer },
    /// Momentum.
    Muon { momentum: Buffer },
}

/// The optimizer's state of what this rank owns, by parameter name.
pub struct Optimizer {
    pub moments: BTreeMap<String, Moments>,
}

impl Optimizer {
    /// Zero moments for what this rank owns and trains.
    pub fn new(shards: &Shards, config: &Train) -> Result<Self> {
        let fresh = |(name, range): (&String, &Range<usize>)| {
            let zeros = || shards.store().zeros(range.len());
            let moments = if uses_muon(config, shards.params()[name].attributes) {
                Moments::Muon { momentum: zeros()? }
            } else {
                Moments::AdamW { m: zeros()?, v: zeros()? }
            };
            Ok((name.clone(), moments))
        };
        Ok(Self { moments: shards.trained().map(fresh).collect::<Result<_>>()? })
    }

    /// One update of what this rank owns: `scale` multiplies the gradients, `rate` the peak learning rates.
    pub fn step(
        &mut self,
        shards: &mut Shards,
        config: &Train,
        step: u64,
        rate: f64,
        scale: GradientScale,
    ) -> Result<()> {
        let mut updates = Vec::with_capacity(self.moments.len());
        let mut owned = shards.updates().into_iter().peekable();
        // Both are in order of name.
        for (name, moments) in &mut self.moments {
            if let Some(owned) = owned.next_if(|owned| owned.name == name) {
                updates.push((owned, moments));
            }
        }
        if let Some(owned) = owned.next() {
            bail!("there are no moments of `{}`", owned.name);
        }
        let update = |(owned, moments): (Owned, &mut Moments)| {
            let Attributes { weight_decay, block_matrices, .. } = owned.param.attributes;
            let weight_decay = if weight_decay { config.weight_decay } else { 0.0 };
            let scale = scale.of(owned.param.attributes);
            match moments {
                Moments::AdamW { m, v } => {
                    let hyper = ops::AdamW {
                        learning_rate: config.learning_rate * rate,
                        beta1: config.betas[0],
                        beta2: config.betas[1],
                        eps: 1e-8,
                        weight_decay,
                        step,
                    };
                    if owned.is_on_device() {
                        let (m, v) = (m.on_device()?, v.on_device()?);
                        let kernels = runtime::kernels();
                        return owned
                            .update_on_device(|w, g| ops::adamw_step_on_device(w, g, [m, v], &hyper, scale, kernels));
                    }
                    let (m, v) = (m.on_host()?, v.on_host()?);
                    owned.update(|w, rounded, g| ops::adamw_step(w, g, [m, v], rounded, &hyper, scale))
                }
                Moments::Muon { momentum } => {
                    let hyper = ops::Muon {
                        learning_rate: config.muon_learning_rate * rate,
                        weight_decay,
                        parts: block_matrices.unwrap_or(1),
                        precision: config.precision,
                    };
                    let size = owned.param.dims2()?;
                    if owned.is_on_device() {
                        let momentum = momentum.on_device()?;
                        return owned
                            .update_on_device(|w, g| ops::muon_step_on_device(w, g, momentum, size, &hyper, scale));
                    }
                    let momentum = momentum.on_host()?;
                    owned.update(|w, rounded, g| {
                        ops::muon_step(w, g, momentum, size, &hyper, scale)?;
                        rounded.into_iter().for_each(|rounded| rounded.convert_from_f32_slice(w));
                        Ok(())
                    })
                }
            }
        };
        // A device computes one update after the other.
        let alone = |owned: &Owned| owned.elements() >= LARGE || owned.is_on_device();
        let (large, small): (Vec<_>, Vec<_>) = updates.into_iter().partition(|(owned, _)| alone(owned));
        small.into_par_iter().try_for_each(update)?;
        large.into_iter().try_for_each(update)
    }
}

/// Whether Muon updates this parameter, so that one rank must own all of it.
pub fn uses_muon(config: &Train, attributes: Attributes) -> bool {
    config.matrix_optimizer == MatrixOptimizer::Muon && attributes.block_matrices.is_some() && !attributes.base
}

/// What the shards do with a parameter; `rounded`: linear layers round their weights to bf16 on every rank.
pub fn handling(config: &Train, rounded: bool, name: &str, attributes: Attributes) -> Handling {
    Handling {
        whole: uses_muon(config, attributes),
        rounded: rounded && attributes.block_matrices.is_some(),
        frozen: attributes.base || config.freezes(name),
        base: attributes.base,
    }
}

/// # Errors
/// `train.freeze` names a parameter that does not exist, or leaves no trainable parameter.
pub fn check_frozen(config: &Train, params: &Params) -> Result<()> {
    let unknown = config.freeze.iter().find(|part| !params.keys().any(|name| begins_with(name, part)));
    let mut parts: Vec<&str> = params.keys().filter_map(|name| name.split('.').next()).collect();
    parts.dedup();
    let what = || format!("train.freeze: no parameter's name begins with `{}`", unknown.map_or("", String::as_str));
    ensure!(unknown.is_none(), usage(what(), format!("they begin with {}", parts.join(", "))));
    let any_trained = params.iter().any(|(name, param)| !param.attributes.base && !config.freezes(name));
    ensure!(any_trained, usage("train.freeze leaves nothing to learn", "take some names off the list"));
    Ok(())
}

/// What the moments of a parameter are called in a checkpoint.
pub fn kinds(config: &Train, attributes: Attributes) -> &'static [&'static str] {
    if uses_muon(config, attributes) { &["muon"] } else { &["adamw_m", "adamw_v"] }
}

/// Parameters with at least this many elements are updated one after the other, each by all threads; smaller ones are
/// updated in parallel.
const LARGE: usize = 1 << 22;

/// The sum of the squares of all gradients that are clipped: f64 sums of fixed chunks, added in order of name, so that
/// the number of threads changes no bit. On other devices than the CPU sums are in f32, and come to the host together.
/// Gradients that are not clipped count only if they are not finite.
pub fn squares(gradients: &Gradients, params: &Params) -> Result<f64> {
    let (mut sum, mut weights, mut sums) = (0.0, Vec::new(), Vec::new());
    for (name, gradient) in gradients.iter() {
        let weight = if params.get(name).is_none_or(|param| param.attributes.clipped) { 1.0 } else { 0.0 };
        if gradient.device().is_cpu() {
            sum += weight
                * ops::with_slice(gradient, |gradient: &[f32]| {
                    gradient.par_chunks(1 << 14).map(sum_of_squares).collect::<Vec<f64>>().iter().sum::<f64>()
                })?;
        } else {
            let parts = squares_there(gradient)?;
            weights.resize(weights.len() + parts.len(), weight);
            sums.extend(parts);
        }
    }
    if !sums.is_empty() {
        let sums: Vec<f32> = Tensor::stack(&sums, 0)?.to_vec1()?;
        sum += weights.iter().zip(sums).map(|(weight, sum)| weight * f64::from(sum)).sum::<f64>();
    }
    Ok(sum)
}

/// The sum of squares by stock ops, as scalars to be added. Of long gradients rows are summed first: candle's sum over
/// everything keeps a single block of a GPU busy.
fn squares_there(gradient: &Tensor) -> Result<Vec<Tensor>> {
    const ROW: usize = 4096;
    let (flat, rows) = (gradient.flatten_all()?, gradient.elem_count() / ROW);
    let rest = flat.elem_count() - rows * ROW;
    let mut sums = Vec::new();
    if rows > 0 {
        sums.push(flat.narrow(0, 0, rows * ROW)?.reshape((rows, ROW))?.sqr()?.sum(1)?.sum_all()?);
    }
    if rest > 0 {
        sums.push(flat.narrow(0, rows * ROW, rest)?.sqr()?.sum_all()?);
    }
    Ok(sums)
}

fn sum_of_squares(chunk: &[f32]) -> f64 {
    // Eight running sums: one would wait for each addition.
    let mut lanes = [0.0; 8];
    for part in chunk.chunks(8) {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    lanes.iter().sum()
}

/// What gradients are multiplied with before they update weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientScale {
    /// Clips a gradient that is part of the global norm.
    clip: f64,
    /// Takes the loss scale back.
    unscale: f64,
}

impl GradientScale {
    /// For gradients of global norm `norm` (without the loss scale) that are clipped to `clip_norm` (0: never).
    pub fn new(norm: f64, clip_norm: f64, loss_scale: f64) -> Self {
        let clip = if clip_norm > 0.0 && norm > clip_norm { clip_norm / norm } else { 1.0 };
        Self { clip, unscale: 1.0 / loss_scale }
    }

    fn of(self, attributes: Attributes) -> f64 {
        if attributes.clipped { self.clip * self.unscale } else { self.unscale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Architecture, Config, ImageTokenizer, Model, QuantizerKind},
        model::Generator,
        nn::params::{Init, Scope},
        ops::Store,
        tokenizer,
        train::engine::tests as toy,
    };
    use candle_core::{DType, Device};

    #[test]
    fn a_generator_s_matrices_decay_and_muon_takes_those_of_blocks() {
        let mut config =
            Config { model: Model { layers: 1, hidden: 4, heads: 2, ..Model::default() }, ..Config::default() };
        (config.model.qk_norm, config.model.sandwich_norm) = (true, true);
        let scope = Scope::empty_from_seed(1, &Device::Cpu);
        Generator::new(&scope, &config, 5, 7, (2, 2)).unwrap();
        let matrices =
            ["attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"].map(|m| format!("blocks.0.{m}.weight"));
        let heads = ["text_head.weight", "image_head.weight"];
        for (name, param) in scope.params() {
            let in_block = matrices.contains(&name);
            let expected = Attributes {
                weight_decay: in_block || heads.contains(&name.as_str()),
                block_matrices: in_block.then_some(if name.contains("qkv") { 3 } else { 1 }),
                requires_grad: true,
                clipped: true,
                base: false,
            };
            assert_eq!(param.attributes, expected, "{name}");
        }
    }

    #[test]
    fn codebooks_do_not_decay_and_the_discriminator_is_not_clipped() {
        let base = ImageTokenizer {
            image_size: 32,
            channels: 32,
            channel_multipliers: vec![1, 2],
            codebook_size: 4,
            adversarial_weight: 1.0,
            ..ImageTokenizer::default()
        };
        let averaged = ImageTokenizer { codebook_decay: 0.9, ..base.clone() };
        let gumbel = ImageTokenizer { quantizer: QuantizerKind::Gumbel, ..base.clone() };
        let dvae = ImageTokenizer { architecture: Architecture::Dvae, ..gumbel.clone() };
        let codebook = |config: &ImageTokenizer, name: &str| {
            let scope = Scope::empty_from_seed(1, &Device::Cpu);
            tokenizer::ImageTokenizer::in_training(&scope, config).unwrap();
            for (name, param) in scope.params() {
                assert_eq!(param.attributes.clipped, !name.starts_with("discriminator."), "{name}");
                assert!(!param.attributes.weight_decay || param.rank() == 4, "{name} decays");
                assert_eq!(param.attributes.block_matrices, None);
            }
            let attributes = scope.params()[name].attributes;
            (attributes.weight_decay, attributes.requires_grad)
        };
        assert_eq!(codebook(&base, "quantize.embedding.weight"), (false, true));
        assert_eq!(codebook(&averaged, "quantize.embedding.weight"), (false, false));
        assert_eq!(codebook(&averaged, "quantize.embedding.embed_avg"), (false, false));
        assert_eq!(codebook(&gumbel, "quantize.embed.weight"), (false, true));
        assert_eq!(codebook(&dvae, "decoder.blocks.input.w"), (false, true));
        assert_eq!(codebook(&base, "discriminator.main.0.weight"), (true, true));
    }

    #[test]
    fn clipping_leaves_out_what_has_a_loss_of_its_own() {
        let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
        scope.get("clipped", 2, Init::Zeros).unwrap();
        scope.clone().without_clipping().get("free", 2, Init::Zeros).unwrap();
        let params = scope.params();
        let mut gradients = Gradients::default();
        gradients.accumulate_vector("clipped", vec![3.0, 4.0]).unwrap();
        gradients.accumulate_vector("free", vec![30.0, 40.0]).unwrap();
        assert_eq!(squares(&gradients, &params).unwrap(), 25.0);
        let scale = GradientScale::new(5.0, 1.0, 2.0);
        assert_eq!(["clipped", "free"].map(|name| scale.of(params[name].attributes)), [0.1, 0.5]);
        gradients.accumulate_vector("free", vec![f32::NAN, 0.0]).unwrap();
        assert!(squares(&gradients, &params).unwrap().is_nan());
    }

    fn rows(tensor: &Tensor, from: usize, count: usize) -> Vec<f32> {
        tensor.narrow(0, from, count).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_step_moves_every_parameter_by_its_own_rule() {
        let group = crate::dist::Group::alone();
        let kinds = [MatrixOptimizer::Adamw, MatrixOptimizer::Muon];
        let stores = [Store::Memory, Store::Device(Device::Cpu)];
        for (kind, store) in kinds.into_iter().flat_map(|kind| stores.clone().map(|store| (kind, store))) {
            let (params, chain) = toy::chain(1, 2);
            let before: Vec<Vec<f32>> = params.values().map(|v| rows(v, 0, 4)).collect();
            let segments = toy::segments(&chain);
            let (names, handling) = (toy::parameter_groups(&chain), |_: &str, _: Attributes| Handling::default());
            let mut shards = Shards::new(&group, 0, store, &params, &names, handling, |_| Ok(None)).unwrap();
            super::super::engine::accumulate(&segments, &toy::inputs(1), 0, &mut shards).unwrap();
            let config = Train { matrix_optimizer: kind, weight_decay: 0.0, learning_rate: 0.1, ..Train::default() };
            let mut optimizer = Optimizer::new(&shards, &config).unwrap();
            optimizer.step(&mut shards, &config, 1, 0.5, GradientScale::new(1.0, 0.0, 1.0)).unwrap();
            shards.refresh().unwrap();
            for (var, before) in params.values().zip(&before) {
                let moved: Vec<f32> = rows(var, 0, 4).iter().zip(before).map(|(a, b)| (a - b).abs()).collect();
                let (least, most) = moved.iter().fold((1f32, 0f32), |(l, m), x| (l.min(*x), m.max(*x)));
                match kind {
                    // AdamW's first step is the learning rate for any gradient.
                    MatrixOptimizer::Adamw => assert!(least > 0.049 && most < 0.051, "{least} {most}"),
                    // Muon's is a near-rotation of size 0.02 * 0.5.
                    MatrixOptimizer::Muon => assert!(most > 1e-3 && most < 0.0125, "{least} {most}"),
                }
            }
        }
    }

    #[test]
    fn norm_and_clip() {
        let (params, chain) = toy::chain(1, 2);
        let mut shards = Shards::alone(&toy::segments(&chain)).unwrap();
        super::super::engine::accumulate(&toy::segments(&chain), &toy::inputs(1), 0, &mut shards).unwrap();
        let gradients = shards.reduced();
        let sum = |(_, g): (&String, &Tensor)| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let expected = f64::from(gradients.iter().map(sum).sum::<f32>());
        assert!((squares(gradients, &params).unwrap() - expected).abs() < 1e-6 * expected);
        let there = |gradient: &Tensor| -> f32 {
            squares_there(gradient).unwrap().iter().map(|sum| sum.to_scalar::<f32>().unwrap()).sum()
        };
        let sum: f32 = gradients.iter().map(|(_, gradient)| there(gradient)).sum();
        assert!((f64::from(sum) - expected).abs() < 1e-6 * expected);
        assert_eq!(there(&Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap()), 25.0);
        assert_eq!(there(&Tensor::ones(2 * 4096 + 5, DType::F32, &Device::Cpu).unwrap()), 8197.0);
        let clip = |norm, most| GradientScale::new(norm, most, 1.0).clip;
        assert_eq!([clip(8.0, 2.0), clip(1.0, 2.0), clip(8.0, 0.0)], [0.25, 1.0, 1.0]);
    }
}
