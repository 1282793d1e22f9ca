//! PatchGAN discriminator (arXiv 1611.07004), as in VQGAN: classifies each image patch as real or reconstructed. Names
//! and shapes are those of taming-transformers. It is only used in training and is not part of the published model.

use crate::{
    config::{self, Precision},
    error::{Result, ensure},
    nn::params::{Init, Scope},
    ops::{self, Padding},
};
use candle_core::Tensor;

/// The scope of the discriminator's parameters.
pub const SCOPE: &str = "discriminator";

/// Whether a parameter belongs to the discriminator of a tokenizer in training, or of an end-to-end reconstructor.
pub fn is_ours(name: &str) -> bool {
    name.split('.').any(|part| part == SCOPE)
}

const KERNEL: usize = 4;
/// Slope of the leaky ReLU below 0.
const SLOPE: f64 = 0.2;
const NORM_EPS: f64 = 1e-5;
/// Maximum number of channels, as a multiple of the first layer's.
const MAX_WIDENING: usize = 8;

/// The discriminator network.
pub struct Discriminator {
    layers: Vec<Layer>,
    precision: Precision,
}

struct Layer {
    /// `(out, in, 4, 4)`
    weight: Tensor,
    /// Only the first and the last layer have a bias; the others have a norm.
    bias: Option<Tensor>,
    norm: Option<(Tensor, Tensor)>,
    stride: usize,
}

impl Discriminator {
    /// The discriminator with the parameters of `scope`.
    ///
    /// # Errors
    /// Images of the configured size are too small for the number of layers.
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let (channels, halvings) = (config.discriminator_channels, config.discriminator_layers);
        let side = (0..halvings).fold(config.image_size, |side, _| side / 2);
        ensure!(
            side > 2,
            "images of {} pixels are too small for image_tokenizer.discriminator_layers = {halvings}",
            config.image_size
        );
        let widths = (0..=halvings).map(|i| channels * (1 << i).min(MAX_WIDENING));
        let (mut inputs, mut layers) = (3, Vec::new());
        // In the reference, convolution, norm and activation are numbered separately.
        let mut number = 0;
        for (i, outputs) in widths.chain([1]).enumerate() {
            let (first, last) = (i == 0, i == halvings + 1);
            let conv = scope.at("main").at(number);
            let shape = (outputs, inputs, KERNEL, KERNEL);
            let plain = Init::Uniform(((inputs * KERNEL * KERNEL) as f64).powf(-0.5));
            let weight = conv.get("weight", shape, Init::Normal(0.02))?;
            let bias = (first || last).then(|| conv.get("bias", outputs, plain)).transpose()?;
            let norm = if first || last {
                None
            } else {
                let scope = scope.at("main").at(number + 1);
                Some((scope.get("weight", outputs, Init::Ones)?, scope.get("bias", outputs, Init::Zeros)?))
            };
            number += if first { 2 } else { 3 };
            layers.push(Layer { weight, bias, norm, stride: if i < halvings { 2 } else { 1 } });
            inputs = outputs;
        }
        Ok(Self { layers, precision: scope.precision() })
    }

    /// Pixels `(batch, height, width, 3)` → logits `(batch, h, w, 1)`, above 0 where a patch looks real. `frozen`: no
    /// gradient flows to the network's own parameters.
    pub fn forward(&self, pixels: &Tensor, frozen: bool) -> Result<Tensor> {
        let own = |tensor: &Tensor| if frozen { tensor.detach() } else { tensor.clone() };
        let mut x = pixels.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let (weight, bias) = (own(&layer.weight), layer.bias.as_ref().map(own));
            x = ops::conv2d_in(self.precision, &x, &weight, bias.as_ref(), layer.stride, Padding::same(1))?;
            if let Some((weight, bias)) = &layer.norm {
                x = batch_norm(&x)?.broadcast_mul(&own(weight))?.broadcast_add(&own(bias))?;
            }
            if i + 1 < self.layers.len() {
                x = (x.relu()? - (x.neg()?.relu()? * SLOPE)?)?;
            }
        }
        Ok(x)
    }
}

/// Batch norm with batch statistics. There is no inference mode, because the network is only used in training.
fn batch_norm(x: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let rows = x.reshape((batch * height * width, channels))?;
    let centred = rows.broadcast_sub(&rows.mean_keepdim(0)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(0)? + NORM_EPS)?.sqrt()?;
    Ok(centred.broadcast_div(&deviation)?.reshape(x.shape())?)
}

/// The discriminator's loss, a scalar, for logits of real images and of reconstructions.
pub fn loss(kind: config::AdversarialLoss, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    let wrong = |x: Tensor| match kind {
        config::AdversarialLoss::Hinge => (x + 1.0)?.relu()?.mean_all(),
        config::AdversarialLoss::Vanilla => softplus(&x)?.mean_all(),
    };
    Ok(((wrong(real.neg()?)? + wrong(fake.clone())?)? * 0.5)?)
}

/// ln(1 + eˣ), where eˣ does not overflow.
fn softplus(x: &Tensor) -> candle_core::Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// LeCam regularization (arXiv 2104.03310): keeps logits close to the running means of the other class.
pub fn lecam(real: &Tensor, fake: &Tensor, logit_ema: LogitEma) -> Result<Tensor> {
    let above = (real - logit_ema.fake)?.relu()?.sqr()?.mean_all()?;
    let below = (fake.neg()? + logit_ema.real)?.relu()?.sqr()?.mean_all()?;
    Ok((above + below)?)
}

/// Running statistics of the discriminator over earlier steps.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct LogitEma {
    /// Running mean of the logits of real images.
    pub real: f64,
    /// Running mean of the logits of reconstructions.
    pub fake: f64,
    /// Accuracy of the discriminator in the last step: share of patches classified correctly.
    pub accuracy: f64,
}

impl LogitEma {
    /// Updates the running statistics with those of a step.
    pub fn follow(&mut self, real: f64, fake: f64, accuracy: f64) {
        const DECAY: f64 = 0.99;
        self.real = DECAY * self.real + (1.0 - DECAY) * real;
        self.fake = DECAY * self.fake + (1.0 - DECAY) * fake;
        self.accuracy = accuracy;
    }
}

/// Accuracy: share of patches classified correctly; real and reconstructed patches have equal weight.
pub fn accuracy(real: &Tensor, fake: &Tensor) -> Result<f64> {
    let share = |hits: Tensor| -> Result<f64> {
        let hits = hits.to_dtype(candle_core::DType::F32)?.mean_all()?;
        Ok(f64::from(hits.to_scalar::<f32>()?))
    };
    Ok((share(real.gt(0.0)?)? + share(fake.lt(0.0)?)?) / 2.0)
}
