//! AdamW, and Muon for the transformer's matrices; parameter groups go by name.
//!
//! Moments are f32 on the host, in order of name, whatever the weights' dtype and device; `train.offload` says where.

use super::{
    owned::Owned,
    shards::{Handling, Shards},
};
use crate::{
    config::{MatrixOptimizer, Train, begins_with},
    error::{Result, bail, ensure, usage},
    nn::{gradients::Gradients, params::Params},
    ops::{self, Floats},
    tokenizer::discriminator,
};
use candle_core::{D, Tensor, Var};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::{collections::BTreeMap, ops::Range};

/// What an optimizer remembers of one parameter.
pub enum Moments {
    /// First and second moment.
    AdamW { m: Floats, v: Floats },
    /// Momentum.
    Muon { momentum: Floats },
}

/// The optimizer's state of what this rank owns, by parameter name.
pub struct Optimizer {
    pub moments: BTreeMap<String, Moments>,
}

impl Optimizer {
    /// Zero moments for what this rank owns.
    pub fn new(shards: &Shards, config: &Train) -> Result<Self> {
        let fresh = |(name, range): (&String, &Range<usize>)| {
            let zeros = || shards.store().zeros(range.len());
            let moments = if is_muons(config, name, &shards.params()[name]) {
                Moments::Muon { momentum: zeros()? }
            } else {
                Moments::AdamW { m: zeros()?, v: zeros()? }
            };
            Ok((name.clone(), moments))
        };
        Ok(Self { moments: shards.owned().iter().map(fresh).collect::<Result<_>>()? })
    }

    /// One update of what this rank owns: `scale` multiplies the gradients (clipping), `rate` the peak learning rates.
    pub fn step(&mut self, shards: &mut Shards, config: &Train, step: u64, rate: f64, scale: f64) -> Result<()> {
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
            let (name, var) = (owned.name, owned.var);
            let weight_decay = if decays(name, var) { config.weight_decay } else { 0.0 };
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
                    owned.update(|w, rounded, g| ops::adamw_step(w, g, [m, v], rounded, &hyper, scale))
                }
                Moments::Muon { momentum } => {
                    let hyper = ops::Muon {
                        learning_rate: config.muon_learning_rate * rate,
                        weight_decay,
                        // The packed query, key and value matrices are three matrices.
                        parts: if name.ends_with(".qkv.weight") { 3 } else { 1 },
                        precision: config.precision,
                    };
                    let size = var.dims2()?;
                    owned.update(|w, rounded, g| {
                        ops::muon_step(w, g, momentum, size, &hyper, scale)?;
                        rounded.into_iter().for_each(|rounded| rounded.convert_from_f32_slice(w));
                        Ok(())
                    })
                }
            }
        };
        let (small, large): (Vec<_>, Vec<_>) = updates.into_iter().partition(|(owned, _)| owned.elements() < LARGE);
        small.into_par_iter().try_for_each(update)?;
        large.into_iter().try_for_each(update)
    }
}

/// Whether Muon updates this parameter, so that it must lie whole on one rank.
pub fn is_muons(config: &Train, name: &str, var: &Var) -> bool {
    is_muons_by_shape(config, name, var.dims())
}

/// The same of a parameter that is not there.
pub fn is_muons_by_shape(config: &Train, name: &str, shape: &[usize]) -> bool {
    config.matrix_optimizer == MatrixOptimizer::Muon && is_block_matrix(name, shape)
}

/// What the shards do with a parameter; `rounded`: linear layers round their weights to bf16 on every rank.
pub fn handling(config: &Train, rounded: bool, name: &str, var: &Var) -> Handling {
    Handling {
        whole: is_muons(config, name, var),
        rounded: rounded && is_block_matrix(name, var.dims()),
        frozen: config.freezes(name),
    }
}

/// # Errors
/// `train.freeze` names what is not there, or leaves nothing to learn.
pub fn check_frozen(config: &Train, params: &Params) -> Result<()> {
    let unknown = config.freeze.iter().find(|part| !params.keys().any(|name| begins_with(name, part)));
    let mut parts: Vec<&str> = params.keys().filter_map(|name| name.split('.').next()).collect();
    parts.dedup();
    let what = || format!("train.freeze: no parameter's name begins with `{}`", unknown.map_or("", String::as_str));
    ensure!(unknown.is_none(), usage(what(), format!("they begin with {}", parts.join(", "))));
    let learns = params.keys().any(|name| !config.freezes(name));
    ensure!(learns, usage("train.freeze leaves nothing to learn", "take some names off the list"));
    Ok(())
}

/// What the moments of a parameter are called in a checkpoint.
pub fn kinds(config: &Train, name: &str, var: &Var) -> &'static [&'static str] {
    if is_muons(config, name, var) { &["muon"] } else { &["adamw_m", "adamw_v"] }
}

/// Elements from which a parameter has all threads for itself; below, parameters are updated side by side.
const LARGE: usize = 1 << 22;

/// A matrix of a transformer block, that of a linear layer: what Muon is for.
fn is_block_matrix(name: &str, shape: &[usize]) -> bool {
    name.starts_with("blocks.") && shape.len() == 2
}

/// Weight decay is for matrices and convolutions: biases, norms, embeddings, positions and the
/// codebook have none.
fn decays(name: &str, var: &Var) -> bool {
    let table = ["embedding", "position", "image_row", "image_column"].iter().any(|part| name.contains(part));
    var.rank() >= 2 && !table
}

/// The sum of the squares of all gradients: f64 sums of fixed chunks, added in order of name, so that the
/// number of threads changes no bit. On other devices than the CPU only one f32 sum a gradient comes to the host.
/// A discriminator has a loss of its own: it is not clipped with the tokenizer, but what is not finite there shows.
pub fn squares(gradients: &Gradients) -> Result<f64> {
    let mut sum = 0.0;
    for (name, gradient) in gradients.iter() {
        let weight = if discriminator::is_ours(name) { 0.0 } else { 1.0 };
        if !gradient.device().is_cpu() {
            sum += weight * squares_there(gradient)?;
            continue;
        }
        sum += weight
            * ops::with_slice(gradient, |gradient: &[f32]| {
                let chunks: Vec<f64> = gradient.par_chunks(1 << 14).map(sum_of_squares).collect();
                chunks.iter().sum::<f64>()
            })?;
    }
    Ok(sum)
}

/// The sum of squares by stock ops. By rows first: candle's sum over everything keeps a single block of a GPU busy.
fn squares_there(gradient: &Tensor) -> Result<f64> {
    Ok(f64::from(gradient.sqr()?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()?))
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

/// The factor that clips a gradient of norm `norm` to `clip` (0: never).
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        nn::params::{Init, Scope},
        train::engine::tests as toy,
    };
    use candle_core::{DType, Device};

    #[test]
    fn groups_go_by_name_and_shape() {
        let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
        let group = |name: &str, shape: &[usize]| {
            let (path, last) = name.rsplit_once('.').unwrap_or(("", name));
            let scope = if path.is_empty() { scope.clone() } else { scope.at(path) };
            scope.get(last, shape, Init::Zeros).unwrap();
            let var = &scope.params()[name];
            (decays(name, var), is_block_matrix(name, var.dims()))
        };
        assert_eq!(group("blocks.0.attention.qkv.weight", &[6, 2]), (true, true));
        assert_eq!(group("blocks.0.attention.qkv.bias", &[6]), (false, false));
        assert_eq!(group("blocks.0.norm1.weight", &[2]), (false, false));
        assert_eq!(group("text_head.weight", &[5, 2]), (true, false));
        assert_eq!(group("encoder.conv_in.weight", &[2, 3, 3, 3]), (true, false));
        for table in ["text_embedding", "text_position", "image_embedding", "image_row", "image_column"] {
            assert_eq!(group(&format!("{table}.weight"), &[5, 2]), (false, false));
        }
        assert_eq!(group("quantize.embedding.weight", &[5, 2]), (false, false));
        assert_eq!(group("image_start", &[2]), (false, false));
    }

    fn rows(tensor: &Tensor, from: usize, count: usize) -> Vec<f32> {
        tensor.narrow(0, from, count).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_step_moves_every_parameter_by_its_own_rule() {
        for kind in [MatrixOptimizer::Adamw, MatrixOptimizer::Muon] {
            let (params, chain) = toy::chain(1, 2);
            let before: Vec<Vec<f32>> = params.values().map(|v| rows(v, 0, 4)).collect();
            let mut shards = Shards::alone(&toy::segments(&chain)).unwrap();
            let segments = toy::segments(&chain);
            super::super::engine::accumulate(&segments, &toy::inputs(1), 0, &mut shards).unwrap();
            let config = Train { matrix_optimizer: kind, weight_decay: 0.0, learning_rate: 0.1, ..Train::default() };
            let mut optimizer = Optimizer::new(&shards, &config).unwrap();
            optimizer.step(&mut shards, &config, 1, 0.5, 1.0).unwrap();
            for (var, before) in params.values().zip(&before) {
                let moved: Vec<f32> = rows(var, 0, 4).iter().zip(before).map(|(a, b)| (a - b).abs()).collect();
                let (least, most) = moved.iter().fold((1f32, 0f32), |(l, m), x| (l.min(*x), m.max(*x)));
                match kind {
                    // AdamW's first step is the learning rate, whatever the gradient.
                    MatrixOptimizer::Adamw => assert!(least > 0.049 && most < 0.051, "{least} {most}"),
                    // Muon's is a near-rotation of size 0.02 * 0.5.
                    MatrixOptimizer::Muon => assert!(most > 1e-3 && most < 0.0125, "{least} {most}"),
                }
            }
        }
    }

    #[test]
    fn norm_and_clip() {
        let (_, chain) = toy::chain(1, 2);
        let mut shards = Shards::alone(&toy::segments(&chain)).unwrap();
        super::super::engine::accumulate(&toy::segments(&chain), &toy::inputs(1), 0, &mut shards).unwrap();
        let gradients = shards.reduced();
        let sum = |(_, g): (&String, &Tensor)| g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        let expected = f64::from(gradients.iter().map(sum).sum::<f32>());
        assert!((squares(gradients).unwrap() - expected).abs() < 1e-6 * expected);
        let there: f64 = gradients.iter().map(|(_, gradient)| squares_there(gradient).unwrap()).sum();
        assert!((there - expected).abs() < 1e-6 * expected);
        assert_eq!(squares_there(&Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap()).unwrap(), 25.0);
        assert_eq!([clip_scale(8.0, 2.0), clip_scale(1.0, 2.0), clip_scale(8.0, 0.0)], [0.25, 1.0, 1.0]);
    }
}
