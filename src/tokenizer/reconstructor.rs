//! The reconstructor (paper §2.1): code vectors to pixels, and the loss of the pixels. It is the decoder of an image
//! tokenizer; in end-to-end training (paper §3.1.3) it is a network of its own, over vectors that are no codes.

use super::{
    NO_MANUAL_PASS, PixelBatch, Statistics, check_finite,
    decoder_body::{DecoderBody, Terms},
    loss::{Loss, number},
    manual::{self, segments::Decoded},
    two_passes::{self, DecoderGradients},
};
use crate::{
    config,
    error::{Context, Result, ensure},
    nn::{
        features::Buffers,
        gradients::Gradients,
        params::{Param, Params, Scope},
    },
};
use candle_core::{Tensor, Var};

/// The name of the weighted sum of all terms.
pub const RECONSTRUCTION: &str = "reconstruction";

/// The reconstructor of end-to-end training.
pub struct Reconstructor {
    body: DecoderBody,
    loss: Loss,
    params: Params,
    buffers: Buffers,
    /// As [`manual::is_possible`].
    manual: bool,
}

impl Reconstructor {
    /// A reconstructor with the architecture and the pixel losses of an image tokenizer's decoder, for inference. Its
    /// parameters have the names that they have in the tokenizer.
    ///
    /// # Errors
    /// The architecture is impossible, or a checkpoint's tensor is missing or has another shape.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        Self::with_loss(scope, config, Loss::pixels(config))
    }

    /// A reconstructor for training: with the perceptual loss if its folder is given, and with the GAN loss if that has a
    /// weight.
    ///
    /// # Errors
    /// As [`Reconstructor::new`], or there is no perceptual network, or images are too small for the discriminator.
    pub fn in_training(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let perceptual_weight = if config.perceptual.is_empty() { 0.0 } else { config.perceptual_weight };
        let config = &config::ImageTokenizer { perceptual_weight, ..config.clone() };
        Self::with_loss(scope, config, Loss::new(scope, config)?)
    }

    fn with_loss(scope: &Scope, config: &config::ImageTokenizer, loss: Loss) -> Result<Self> {
        let body = DecoderBody::new(scope, config)?;
        let params = scope.params();
        let manual = params.values().all(|var| manual::is_possible(config, var.device(), var.dtype()));
        Ok(Self { body, loss, params, buffers: Buffers::default(), manual })
    }

    /// Whether it has hand-written gradients.
    pub fn is_manual(&self) -> bool {
        self.manual
    }

    /// Vectors `(batch, h, w, code_dim)` → pixels `(batch, side, side, 3)`, about in \[-1, 1\].
    ///
    /// # Errors
    /// The shape is another, or the pixels are not finite (damaged weights).
    pub fn decode(&self, z_emb: &Tensor) -> Result<Tensor> {
        let pixels = if self.manual { self.body.infer(z_emb)? } else { self.body.decode(z_emb)? };
        check_finite(&pixels, "pixels")?;
        Ok(pixels)
    }

    /// The loss of the decoded vectors, times the batch's share and loss scale: a scalar with its gradients by autograd.
    /// Leaves the batch's statistics. `map_norm` returns the norm of the gradient of the last layer before the
    /// reconstructor for a gradient of `z_emb`: the adaptive weight of the GAN loss (arXiv 2012.09841, eq. 7) is measured
    /// there, so that behind it the adversarial gradient is never larger than `adversarial_weight` times that of the other
    /// terms.
    ///
    /// # Errors
    /// The shape is another.
    pub fn loss(
        &self,
        z_emb: &Tensor,
        batch: &PixelBatch,
        map_norm: impl Fn(&Tensor) -> Result<f64>,
    ) -> Result<Tensor> {
        let (loss, mut terms) = match self.loss.is_adversarial(batch) {
            true => self.adversarial_loss(z_emb, batch, map_norm)?,
            false => self.body.loss(z_emb, batch, &self.loss, &self.params)?,
        };
        terms.push((RECONSTRUCTION, number(&loss)? / batch.loss_scale));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes: Vec::new(), latents: None });
        Ok((loss * batch.share)?)
    }

    /// As [`DecoderBody::loss`], with two backward passes at once.
    fn adversarial_loss(
        &self,
        z_emb: &Tensor,
        batch: &PixelBatch,
        map_norm: impl Fn(&Tensor) -> Result<f64>,
    ) -> Result<(Tensor, Terms)> {
        let z = Var::from_tensor(&z_emb.detach())?;
        let (_, y) = self.body.decode_to_last(&z)?;
        let backward = |dy: &Tensor| {
            let mut store = (&y * dy)?.sum_all()?.backward()?;
            let input = store.remove(&z).context("the reconstruction does not depend on the code vectors")?;
            let gradient = |(name, param): (&String, &Param)| Some((name.clone(), store.remove(param)?));
            Ok(DecoderGradients { input, params: self.params.iter().filter_map(gradient).collect() })
        };
        let output = (&y.detach(), batch);
        let (computed, gradients) = two_passes::with_weight_before(&self.loss, output, backward, map_norm)?;
        // Linear in code vectors and parameters, so that their gradients are the computed ones.
        let mut linear = (z_emb * gradients.input.detach())?.sum_all()?;
        for (name, gradient) in gradients.params {
            if let Some(var) = self.params.get(&name) {
                linear = (linear + (var.as_tensor() * gradient.detach())?.sum_all()?)?;
            }
        }
        let value = (linear.detach().neg()? + computed.loss * batch.loss_scale)?;
        Ok(((linear + value)?, computed.terms))
    }

    /// The same as [`Reconstructor::loss`] by hand, with what [`Reconstructor::manual_backward`] needs.
    ///
    /// # Errors
    /// The shape is another, or there are no hand-written gradients.
    pub fn manual_loss(
        &self,
        z_emb: &Tensor,
        batch: &PixelBatch,
        map_norm: impl Fn(&Tensor) -> Result<f64>,
    ) -> Result<(f64, Decoded)> {
        ensure!(self.manual, "{NO_MANUAL_PASS}");
        let (loss, mut terms, decoded) = match self.loss.is_adversarial(batch) {
            true => self.body.manual_adversarial_loss(z_emb, batch, &self.loss, &self.buffers, map_norm)?,
            false => self.body.manual_loss(z_emb, batch, &self.loss, &self.buffers)?,
        };
        terms.push((RECONSTRUCTION, loss));
        *batch.statistics.borrow_mut() = Some(Statistics { terms, codes: Vec::new(), latents: None });
        Ok((loss * batch.share * batch.loss_scale, decoded))
    }

    /// Adds the gradients of the parameters to `gradients`, and returns that of `z_emb`.
    ///
    /// # Errors
    /// There are no hand-written gradients.
    pub fn manual_backward(&self, decoded: Decoded, batch: &PixelBatch, gradients: &mut Gradients) -> Result<Tensor> {
        self.body.manual_backward(decoded, batch.share, &self.buffers, gradients)
    }
}
