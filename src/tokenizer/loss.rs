//! Training loss of an image tokenizer (paper §2.1; arXiv 2012.09841, eq. 5-7): pixel, perceptual and adversarial
//! terms.

use super::{
    batch::PixelBatch,
    discriminator::{self, Discriminator, LogitEma},
    dvae,
    perceptual::Perceptual,
};
use crate::{
    config::{self, Architecture},
    error::{Context, Result, ensure, usage},
    nn::params::{Params, Scope},
};
use candle_core::{DType, Tensor, Var};
use std::path::Path;

/// The terms that a GAN loss adds to the log, none of which is a loss to sum up.
pub const ADVERSARIAL_TERMS: [&str; 6] =
    ["generator", "discriminator", "discriminator_accuracy", "logits_real", "logits_fake", "adaptive_weight"];

/// Maximum adaptive weight of the adversarial loss.
const MAX_ADAPTION: f64 = 1e4;

/// The loss terms of a configuration.
pub struct Loss {
    l1_weight: f64,
    l2_weight: f64,
    /// Whether the decoder outputs a distribution over pixels: then its negative log likelihood is added.
    distribution: bool,
    /// The network, its weight, and the step after which the term is added.
    perceptual: Option<(Perceptual, f64, u64)>,
    gan_loss: Option<GanLoss>,
}

struct GanLoss {
    discriminator: Discriminator,
    params: Params,
    weight: f64,
    loss: config::AdversarialLoss,
    lecam_weight: f64,
    ceiling: f64,
}

/// The loss of a batch, with its gradients.
pub struct LossOutput {
    /// Mean values by name, for the log.
    pub terms: Vec<(&'static str, f64)>,
    /// Weighted sum of pixel and perceptual terms.
    pub loss: f64,
    /// Gradient of all terms with respect to the decoder's output, times the batch's loss scale.
    pub gradient: Tensor,
    /// Adaptive weight of the adversarial gradient in `gradient`; 0 without a discriminator.
    pub adaptive_weight: f64,
    /// Gradients of the discriminator's own loss with respect to its parameters, times the loss scale.
    pub own: Vec<(String, Tensor)>,
}

/// The adversarial terms; all gradients are scaled.
struct Adversarial {
    /// Gradient of −mean D(x̂) with respect to the decoder's output.
    gradient: Tensor,
    own: Vec<(String, Tensor)>,
}

impl Loss {
    /// Pixel terms only.
    pub fn pixels(config: &config::ImageTokenizer) -> Self {
        let distribution = config.architecture == Architecture::Dvae;
        let (l1_weight, l2_weight) = (config.l1_weight, config.l2_weight);
        Self { l1_weight, l2_weight, distribution, perceptual: None, gan_loss: None }
    }

    /// All terms of the configuration. The discriminator's parameters are in `scope`.
    ///
    /// # Errors
    /// The perceptual network cannot be opened, or images are too small for the discriminator.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let mut all = Self::pixels(config);
        if config.perceptual_weight > 0.0 {
            let hint = "set it to a folder written by `vilg import lpips SRC DIR`, or set image_tokenizer.perceptual_weight to 0";
            ensure!(!config.perceptual.is_empty(), usage("image_tokenizer.perceptual is empty", hint));
            let network = Perceptual::open(Path::new(&config.perceptual), scope.precision(), &scope.device());
            let network = network.context("image_tokenizer.perceptual")?;
            all.perceptual = Some((network, config.perceptual_weight, config.perceptual_start));
        }
        if config.adversarial_weight > 0.0 {
            let scope = scope.at(discriminator::SCOPE).without_clipping();
            all.gan_loss = Some(GanLoss {
                discriminator: Discriminator::new(&scope, config)?,
                params: scope.params(),
                weight: config.adversarial_weight,
                loss: config.adversarial_loss,
                lecam_weight: config.lecam_weight,
                ceiling: config.discriminator_ceiling,
            });
        }
        Ok(all)
    }

    /// Whether the loss of this batch has an adversarial term.
    pub fn is_adversarial(&self, batch: &PixelBatch) -> bool {
        self.gan_loss.is_some() && batch.logit_ema.is_some()
    }

    /// Computes the loss of the decoder's output: pixels `(batch, side, side, 3)`, or a distribution over them
    /// `(batch, side, side, 6)`. `layer_norm` returns the norm of the gradient of the layer at which the adaptive weight is
    /// measured, for a gradient of the decoder's output. It is called only with a discriminator: for the gradient of the
    /// pixel and perceptual terms, then for that of the adversarial term.
    pub fn compute(
        &self,
        output: &Tensor,
        batch: &PixelBatch,
        mut layer_norm: impl FnMut(&Tensor) -> Result<f64>,
    ) -> Result<LossOutput> {
        let y = Var::from_tensor(output)?;
        let pixels = if self.distribution { dvae::pixels(&y)? } else { y.as_tensor().clone() };
        let error = (&pixels - &batch.pixels)?;
        let (l1, l2) = (error.abs()?.mean_all()?, error.sqr()?.mean_all()?);
        let mut terms = vec![("l1", number(&l1)?), ("l2", number(&l2)?)];
        let mut loss = ((l1 * self.l1_weight)? + (l2 * self.l2_weight)?)?;
        if self.distribution {
            let likelihood = dvae::negative_log_likelihood(&y, &batch.pixels)?;
            terms.push(("nll", number(&likelihood)?));
            loss = (loss + likelihood)?;
        }
        if let Some((network, weight, start)) = &self.perceptual
            && batch.step > *start
        {
            let distance = network.distance(&pixels, &batch.pixels)?.mean_all()?;
            terms.push(("lpips", number(&distance)?));
            loss = (loss + (distance * *weight)?)?;
        }
        let mut store = (&loss * batch.loss_scale)?.backward()?;
        let mut gradient = store.remove(&y).context("the loss does not depend on the reconstruction")?;
        let (mut adaptive_weight, mut own) = (0.0, Vec::new());
        if let (Some(gan_loss), Some(logit_ema)) = (&self.gan_loss, batch.logit_ema) {
            let adversarial = gan_loss.compute(&y, &pixels, batch, logit_ema, &mut terms)?;
            // λ (eq. 7): the adversarial gradient at the measured layer gets the norm of the other terms' gradient.
            let mut norm = |gradient: &Tensor| -> Result<f64> { Ok(layer_norm(gradient)? / batch.loss_scale) };
            let ratio = norm(&gradient)? / (norm(&adversarial.gradient)? + 1e-4);
            adaptive_weight = ratio.clamp(0.0, MAX_ADAPTION) * gan_loss.weight;
            terms.push(("adaptive_weight", adaptive_weight));
            gradient = (gradient + (adversarial.gradient * adaptive_weight)?)?;
            own = adversarial.own;
        }
        Ok(LossOutput { terms, loss: number(&loss)?, gradient, adaptive_weight, own })
    }
}

impl GanLoss {
    fn compute(
        &self,
        y: &Var,
        reconstructed: &Tensor,
        batch: &PixelBatch,
        logit_ema: LogitEma,
        terms: &mut Vec<(&'static str, f64)>,
    ) -> Result<Adversarial> {
        let generator = self.discriminator.forward(reconstructed, true)?.mean_all()?.neg()?;
        let mut store = (&generator * batch.loss_scale)?.backward()?;
        let gradient = store.remove(y).context("the adversarial loss does not depend on the reconstruction")?;

        let real = self.discriminator.forward(&batch.pixels, false)?;
        let fake = self.discriminator.forward(&reconstructed.detach(), false)?;
        let mut loss = discriminator::loss(self.loss, &real, &fake)?;
        terms.extend([
            ("generator", number(&generator)?),
            ("discriminator", number(&loss)?),
            ("discriminator_accuracy", discriminator::accuracy(&real, &fake)?),
            ("logits_real", number(&real.mean_all()?)?),
            ("logits_fake", number(&fake.mean_all()?)?),
        ]);
        if logit_ema.accuracy > self.ceiling {
            return Ok(Adversarial { gradient, own: Vec::new() });
        }
        if self.lecam_weight > 0.0 {
            loss = (loss + (discriminator::lecam(&real, &fake, logit_ema)? * self.lecam_weight)?)?;
        }
        let mut store = (loss * batch.loss_scale)?.backward()?;
        let own = self.params.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var)?))).collect();
        Ok(Adversarial { gradient, own })
    }
}

pub(super) fn number(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}
