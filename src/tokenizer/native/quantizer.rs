//! The quantiser's gradients by hand (paper eq. 1-2): straight through to the latents, and those of its two losses.

use crate::{
    error::Result,
    nn::gradients::Gradients,
    ops::{gemm::Onto, slices::view, with_slice},
    tokenizer::quantizer::{NORM_EPS, Quantized, Quantizer},
};
use candle_core::Tensor;

/// What backward needs of a quantised batch.
pub(super) struct Kept {
    /// Latents as they came, `(rows, dim)`.
    z: Vec<f32>,
    /// As they were compared, normalised or not.
    compared: Vec<f32>,
    z_q: Vec<f32>,
    codes: Vec<u32>,
    dim: usize,
}

impl Kept {
    pub(super) fn new(quantizer: &Quantizer, z: &Tensor, quantized: &Quantized) -> Result<Self> {
        let flat = |t: &Tensor| -> Result<Vec<f32>> { Ok(with_slice(t, |t: &[f32]| t.to_vec())?) };
        Ok(Self {
            z: flat(z)?,
            compared: flat(&quantizer.normalized(z)?)?,
            // Not the one of the straight-through sum, which rounds.
            z_q: flat(&quantizer.lookup(&quantized.codes)?)?,
            codes: quantized.codes.to_vec1()?,
            dim: z.dim(candle_core::D::Minus1)?,
        })
    }
}

/// Turns the gradient of the code vectors, in `d`, into that of the latents, and adds the codebook's. `scale` is the
/// weight of the losses in the step's.
pub(super) fn backward(
    quantizer: &Quantizer,
    kept: &Kept,
    d: &mut [f32],
    scale: f64,
    gradients: &mut Gradients,
) -> Result<()> {
    let (codebook_weight, commitment_weight) = quantizer.weights();
    let factor = |weight: f64| (2.0 * weight * scale / kept.z.len() as f64) as f32;
    let (of_codebook, of_commitment) = (factor(codebook_weight), factor(commitment_weight));
    for ((d, z), z_q) in d.iter_mut().zip(&kept.compared).zip(&kept.z_q) {
        *d += of_commitment * (z - z_q);
    }
    let dim = kept.dim;
    if quantizer.l2_normalize() {
        d.chunks_exact_mut(dim).zip(kept.z.chunks_exact(dim)).for_each(|(d, z)| through_norm(d, z));
    }
    let codebook = view::<f32>(quantizer.codebook())?;
    gradients.accumulate(quantizer.name(), quantizer.codebook().shape(), |sum, onto| {
        if onto == Onto::Nothing {
            sum.fill(0.0);
        }
        // Chosen codes only: the others have no gradient.
        let mut own = vec![0.0; dim];
        for (i, &code) in kept.codes.iter().enumerate() {
            let (row, at) = (i * dim..(i + 1) * dim, code as usize * dim..(code as usize + 1) * dim);
            for ((own, z), z_q) in own.iter_mut().zip(&kept.compared[row.clone()]).zip(&kept.z_q[row]) {
                *own = of_codebook * (z_q - z);
            }
            if quantizer.l2_normalize() {
                through_norm(&mut own, &codebook[at.clone()]);
            }
            sum[at].iter_mut().zip(&own).for_each(|(sum, own)| *sum += own);
        }
    })
}

/// The gradient of `x / ‖x‖` becomes that of `x`.
fn through_norm(d: &mut [f32], x: &[f32]) {
    let norm = (x.iter().map(|x| x * x).sum::<f32>() + NORM_EPS as f32).sqrt();
    let along = d.iter().zip(x).map(|(d, x)| d * x).sum::<f32>() / (norm * norm);
    d.iter_mut().zip(x).for_each(|(d, x)| *d = (*d - x * along) / norm);
}
