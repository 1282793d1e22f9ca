//! The gradients of a loss with a discriminator whose adaptive weight λ (arXiv 2012.09841, eq. 7) is measured in front of
//! the decoder: one backward pass for the gradient of pixel and perceptual terms and one for that of the adversarial term,
//! whose results are then added with λ. λ is known after both passes, and gradients are linear in that of the output, so
//! that a third pass is not needed.

use super::{
    batch::PixelBatch,
    loss::{Loss, LossOutput},
};
use crate::error::{Result, bail, ensure};
use candle_core::Tensor;

/// Gradients of a decoder, with the batch's loss scale and without its share.
pub struct DecoderGradients {
    /// With respect to its input, code vectors `(batch, h, w, code_dim)`.
    pub input: Tensor,
    /// With respect to parameters, by their names.
    pub params: Vec<(String, Tensor)>,
}

impl DecoderGradients {
    /// Adds `weight` · `other`, the gradients of the same parameters.
    fn add(&mut self, other: &Self, weight: f64) -> Result<()> {
        self.input = (&self.input + (&other.input * weight)?)?;
        ensure!(self.params.len() == other.params.len(), "two passes give gradients of other parameters");
        for ((name, sum), (other_name, gradient)) in self.params.iter_mut().zip(&other.params) {
            ensure!(name == other_name, "two passes give gradients of other parameters: `{name}`, `{other_name}`");
            *sum = (&*sum + (gradient * weight)?)?;
        }
        Ok(())
    }
}

/// The loss of a decoder's `output`, and the gradients of all its terms; those of the discriminator's own loss are among
/// the parameters' gradients. `backward` is the decoder's backward pass from the gradient of its output, called twice;
/// `input_norm` returns the norm of the gradient of the layer before the decoder for a gradient of the decoder's input.
///
/// # Errors
/// A pass fails, or the loss has no discriminator.
pub fn with_weight_before(
    loss: &Loss,
    (output, batch): (&Tensor, &PixelBatch),
    mut backward: impl FnMut(&Tensor) -> Result<DecoderGradients>,
    input_norm: impl Fn(&Tensor) -> Result<f64>,
) -> Result<(LossOutput, DecoderGradients)> {
    let mut passes = Vec::with_capacity(2);
    let mut computed = loss.compute(output, batch, |dy| {
        let gradients = backward(dy)?;
        let norm = input_norm(&gradients.input)?;
        passes.push(gradients);
        Ok(norm)
    })?;
    let (Some(adversarial), Some(mut sum)) = (passes.pop(), passes.pop()) else {
        bail!("a loss without a discriminator")
    };
    sum.add(&adversarial, computed.adaptive_weight)?;
    sum.params.append(&mut computed.own);
    Ok((computed, sum))
}
