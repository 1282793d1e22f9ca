//! Vector quantization (paper §2.1, eq. 1-2; arXiv 1711.00937): each latent becomes its nearest code, with a
//! straight-through gradient.

use super::{Quantized, softmax};
use crate::{
    config,
    error::Result,
    nn::params::{Init, Scope},
    ops,
    random::Random,
};
use candle_core::{D, Tensor};

/// Added to a squared length before the square root.
const NORM_EPS: f64 = 1e-12;

/// Temperature of the entropy loss: the squared distance that lowers a code's likelihood by a factor of e.
const TEMPERATURE: f64 = 0.01;
/// Added to a likelihood before the logarithm.
const LOG_EPS: f64 = 1e-8;

const CODEBOOK: &str = "embedding.weight";

/// The codebook.
pub struct VectorQuantizer {
    codebook: Tensor,
    l2_normalize: bool,
    commitment: f64,
    legacy_beta: bool,
    /// Whether the codebook is updated by EMA instead of gradients.
    averaged: bool,
    entropy_weight: f64,
}

impl VectorQuantizer {
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let (codes, dim) = (config.codebook_size, config.code_dim);
        let init = if config.l2_normalize { Init::Normal(1.0) } else { Init::Uniform(1.0 / codes as f64) };
        let shape = (codes, dim);
        Ok(Self {
            codebook: match config.codebook_is_averaged() {
                true => scope.statistics(CODEBOOK, shape, init)?,
                false => scope.table(CODEBOOK, shape, init)?,
            },
            l2_normalize: config.l2_normalize,
            commitment: config.commitment,
            legacy_beta: config.legacy_beta,
            averaged: config.codebook_is_averaged(),
            entropy_weight: config.entropy_weight,
        })
    }

    /// Number of codes.
    pub fn size(&self) -> Result<usize> {
        Ok(self.codebook.dim(0)?)
    }

    /// The codebook's vectors, `(codes, dim)`.
    pub(super) fn codebook(&self) -> &Tensor {
        &self.codebook
    }

    /// Weights of codebook and commitment loss.
    fn weights(&self) -> (f64, f64) {
        if self.legacy_beta { (self.commitment, 1.0) } else { (1.0, self.commitment) }
    }

    /// Vectors in the form in which they are compared: L2-normalized if configured.
    pub(super) fn normalized(&self, x: &Tensor) -> Result<Tensor> {
        if !self.l2_normalize {
            return Ok(x.clone());
        }
        let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + NORM_EPS)?.sqrt()?;
        Ok(x.broadcast_div(&norm)?)
    }

    /// Codes `(rows)` of latents `(.., dim)`.
    pub fn encode(&self, z: &Tensor) -> Result<Tensor> {
        let z = z.reshape(((), z.dim(D::Minus1)?))?;
        ops::nearest_code(&self.normalized(&z)?, &self.normalized(&self.codebook)?)
    }

    /// Vectors `(rows, dim)` of codes `(rows)`.
    pub fn lookup(&self, codes: &Tensor) -> Result<Tensor> {
        self.normalized(&self.codebook.index_select(codes, 0)?)
    }

    /// Soft codes `(rows, codes)` of latents `(.., dim)`: softmax(−distance² / `temperature`).
    pub fn soft_codes(&self, z: &Tensor, temperature: f64) -> Result<Tensor> {
        let z = self.normalized(&z.reshape(((), z.dim(D::Minus1)?))?)?;
        likelihoods(&z, &self.normalized(&self.codebook.detach())?, temperature)
    }

    /// Quantizes latents `(.., dim)` with gradients and losses.
    pub fn forward(&self, z: &Tensor) -> Result<Quantized> {
        let z = self.normalized(z)?;
        let codes = self.encode(&z)?;
        let z_q = self.lookup(&codes)?.reshape(z.shape())?;
        let (codebook_weight, commitment_weight) = self.weights();
        let mut losses = Vec::new();
        if !self.averaged {
            losses.push(("codebook", ((&z_q - z.detach())?.sqr()?.mean_all()? * codebook_weight)?));
        }
        losses.push(("commitment", ((&z - z_q.detach())?.sqr()?.mean_all()? * commitment_weight)?));
        if self.entropy_weight > 0.0 {
            let codebook = if self.averaged { self.codebook.detach() } else { self.codebook.clone() };
            losses.push(("entropy", (entropy_loss(&z, &self.normalized(&codebook)?)? * self.entropy_weight)?));
        }
        Ok(Quantized { z_q: (&z + (&z_q - &z)?.detach())?, codes, losses })
    }

    /// Replaces `dead` codes by encoder outputs of this step, `z: (.., dim)`. The choice is keyed by (`seed`, `step`).
    pub fn restart(&self, dead: &[usize], z: &Tensor, seed: u64, step: u64) -> Result<()> {
        let dim = z.dim(D::Minus1)?;
        let z = self.normalized(&z.detach())?.flatten_all()?.to_vec1::<f32>()?;
        let rows = (z.len() / dim) as u64;
        Ok(ops::with_slice_mut(&self.codebook, |codebook: &mut [f32]| {
            for &code in dead {
                let row = Random::keyed(seed, "dead code", step, code as u64).below(rows) as usize;
                codebook[code * dim..(code + 1) * dim].copy_from_slice(&z[row * dim..(row + 1) * dim]);
            }
        })?)
    }
}

/// Codes that were not used for `after` steps (0: none), given the step of each code's last use and the codes used in
/// this step. They count as used from now on.
pub fn dead_codes(last_used: &mut [u64], chosen: &[u32], after: u64, step: u64) -> Vec<usize> {
    for code in chosen {
        if let Some(last) = last_used.get_mut(*code as usize) {
            *last = step;
        }
    }
    let dead = |code: &usize| after > 0 && step >= last_used[*code] + after;
    let dead: Vec<usize> = (0..last_used.len()).filter(dead).collect();
    dead.iter().for_each(|code| last_used[*code] = step);
    dead
}

/// Likelihoods `(rows, codes)` of codes `(codes, dim)` for latents `(rows, dim)`: softmax(−distance² / `temperature`).
fn likelihoods(z: &Tensor, codes: &Tensor, temperature: f64) -> Result<Tensor> {
    // |z|² is the same for all codes and cancels in the softmax.
    let near = ((z.matmul(&codes.t()?)? * 2.0)?.broadcast_sub(&codes.sqr()?.sum(D::Minus1)?)? / temperature)?;
    softmax(&near)
}

/// Entropy loss of latents `(.., dim)` over codes `(codes, dim)`, in nats: the mean entropy of each latent's code
/// distribution minus the entropy of the mean distribution (arXiv 2310.05737, eq. 4). Likelihoods fall with the squared
/// distance.
fn entropy_loss(z: &Tensor, codes: &Tensor) -> Result<Tensor> {
    let likely = likelihoods(&z.reshape(((), z.dim(D::Minus1)?))?, codes, TEMPERATURE)?;
    let negative = |p: &Tensor| -> Result<Tensor> { Ok((p * (p + LOG_EPS)?.log()?)?.sum(D::Minus1)?) };
    Ok((negative(&likely.mean(0)?)? - negative(&likely)?.mean_all()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients, normal, values};
    use candle_core::DType;

    #[test]
    fn entropy_and_its_gradients_equal_the_formula() -> Result<()> {
        let (z, codes) = (normal("z", &[2, 3, 4], DType::F64), normal("codes", &[5, 4], DType::F64));
        let small = |x: &Tensor| x * 0.05;
        let loss = values(&entropy_loss(&small(&z)?, &small(&codes)?)?)[0];
        let (z_values, code_values) = (values(&z), values(&codes));
        let likelihoods = z_values.chunks(4).map(|z| {
            let weight = |code: &[f64]| {
                let distance: f64 = z.iter().zip(code).map(|(z, c)| (0.05 * (z - c)).powi(2)).sum();
                (-distance / 0.01).exp()
            };
            let weights: Vec<f64> = code_values.chunks(4).map(weight).collect();
            weights.iter().map(|weight| weight / weights.iter().sum::<f64>()).collect::<Vec<f64>>()
        });
        let likelihoods: Vec<Vec<f64>> = likelihoods.collect();
        let entropy = |p: &[f64]| -p.iter().map(|p| p * p.ln()).sum::<f64>();
        let mean: Vec<f64> = (0..5).map(|code| likelihoods.iter().map(|p| p[code]).sum::<f64>() / 6.0).collect();
        let expected = likelihoods.iter().map(|p| entropy(p)).sum::<f64>() / 6.0 - entropy(&mean);
        assert!((loss - expected).abs() < 1e-6 && expected < -0.05, "{loss} instead of {expected}");
        assert_gradients(&[z, codes], &|x| entropy_loss(&small(&x[0])?, &small(&x[1])?))
    }
}
