//! AdamW, and Muon for the transformer's matrices; parameter groups go by name.
//!
//! Moments are plain f32 vectors in order of name, whatever the weights' dtype and device.

use super::engine::Gradients;
use crate::{
    config::{MatrixOptimizer, Train},
    error::{Context, Result},
    nn::params::Params,
    ops,
};
use candle_core::{Tensor, Var};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// What an optimizer remembers of one parameter.
pub enum Moments {
    /// First and second moment.
    AdamW { m: Vec<f32>, v: Vec<f32> },
    /// Momentum.
    Muon { momentum: Vec<f32> },
}

/// The optimizer's state by parameter name.
pub struct Optimizer {
    pub moments: BTreeMap<String, Moments>,
}

/// Muon's momentum (Jordan et al. 2024; nesterov).
const MOMENTUM: f64 = 0.95;

impl Optimizer {
    /// Zero moments for every parameter.
    pub fn new(params: &Params, config: &Train) -> Self {
        let fresh = |(name, var): (&String, &Var)| {
            let zeros = || vec![0.0; var.elem_count()];
            let moments = if config.matrix_optimizer == MatrixOptimizer::Muon && is_block_matrix(name, var) {
                Moments::Muon { momentum: zeros() }
            } else {
                Moments::AdamW { m: zeros(), v: zeros() }
            };
            (name.clone(), moments)
        };
        Self { moments: params.iter().map(fresh).collect() }
    }

    /// One update: `scale` multiplies the gradients (clipping), `rate` the peak learning rates.
    pub fn step(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        config: &Train,
        step: u64,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        for (name, var) in params {
            let Some(gradient) = gradients.get(name) else { continue };
            let moments = self.moments.get_mut(name).with_context(|| format!("`{name}` has no moments"))?;
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
                    ops::adamw_step(var, gradient, m, v, &hyper, scale)?;
                }
                Moments::Muon { momentum } => {
                    let update = muon_update(name, gradient, momentum, scale)?;
                    let learning_rate = config.muon_learning_rate * rate;
                    let kept = (var.as_tensor() * (1.0 - learning_rate * weight_decay))?;
                    var.set(&(kept - (update * learning_rate)?)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Muon's direction for one matrix (rows, columns): the orthogonalised nesterov momentum, scaled by
/// `sqrt(max(1, rows / columns))`. The packed query, key and value matrices are three matrices.
fn muon_update(name: &str, gradient: &Tensor, momentum: &mut [f32], scale: f64) -> Result<Tensor> {
    let (rows, columns) = gradient.dims2()?;
    let (scale, beta) = (scale as f32, MOMENTUM as f32);
    let mut direction = vec![0.0; momentum.len()];
    ops::with_slice(gradient, |gradient: &[f32]| {
        for ((d, m), g) in direction.iter_mut().zip(momentum).zip(gradient) {
            let g = g * scale;
            *m = beta * *m + (1.0 - beta) * g;
            *d = beta * *m + (1.0 - beta) * g;
        }
    })?;
    let parts = if name.ends_with(".qkv.weight") { 3 } else { 1 };
    let direction = Tensor::from_vec(direction, (rows, columns), gradient.device())?;
    let orthogonal: Vec<_> = direction.chunk(parts, 0)?.iter().map(ops::newton_schulz).collect::<Result<_>>()?;
    let ratio = (rows / parts) as f64 / columns as f64;
    Ok((Tensor::cat(&orthogonal, 0)? * ratio.max(1.0).sqrt())?)
}

/// A matrix of a transformer block: what Muon is for.
fn is_block_matrix(name: &str, var: &Var) -> bool {
    name.starts_with("blocks.") && var.rank() == 2
}

/// Weight decay is for matrices and convolutions: biases, norms, embeddings, positions and the
/// codebook have none.
fn decays(name: &str, var: &Var) -> bool {
    let table = ["embedding", "position", "image_row", "image_column"].iter().any(|part| name.contains(part));
    var.rank() >= 2 && !table
}

/// The global norm of all gradients: f64 sums of fixed chunks, added in order of name, so that the
/// number of threads changes no bit.
pub fn global_norm(gradients: &Gradients) -> Result<f64> {
    let mut sum = 0.0;
    for (_, gradient) in gradients.iter() {
        sum += ops::with_slice(gradient, |gradient: &[f32]| {
            let chunks: Vec<f64> = gradient.par_chunks(1 << 14).map(sum_of_squares).collect();
            chunks.iter().sum::<f64>()
        })?;
    }
    Ok(sum.sqrt())
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
