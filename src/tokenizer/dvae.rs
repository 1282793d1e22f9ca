//! DALL-E's dVAE (arXiv 2102.12092, appendix A), the tokenizer of the paper's ablation, with the names of its published
//! weights. The encoder outputs logits over codes at each position, the decoder mean and scale of a distribution over
//! pixels.

use crate::{
    config::{self, Precision},
    error::{Context, Result},
    nn::{
        conv,
        params::{Init, Scope},
    },
    ops::{self, Padding},
};
use candle_core::{D, Tensor};

/// Pixel values are mapped to \[ε, 1 − ε\], because their logits must be finite.
const EPS: f64 = 0.1;

/// A convolution with a square kernel and "same" padding.
struct Conv {
    w: Tensor,
    b: Tensor,
    precision: Precision,
}

impl Conv {
    fn new(scope: &Scope, inputs: usize, outputs: usize, kernel: usize) -> Result<Self> {
        let init = Init::Normal(((inputs * kernel * kernel) as f64).powf(-0.5));
        Ok(Self {
            w: scope.get("w", (outputs, inputs, kernel, kernel), init)?,
            b: scope.get("b", outputs, Init::Zeros)?,
            precision: scope.precision(),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d_in(self.precision, x, &self.w, Some(&self.b), 1, Padding::same(self.w.dim(2)? / 2))
    }
}

/// `id_path(x) + gain · res_path(x)`; the residual path is four times ReLU and convolution, with a quarter of the
/// channels.
struct Block {
    id_path: Option<Conv>,
    res_path: Vec<Conv>,
    gain: f64,
}

impl Block {
    fn new(scope: &Scope, inputs: usize, outputs: usize, kernels: [usize; 4], gain: f64) -> Result<Self> {
        let hidden = outputs / 4;
        let id_path = (inputs != outputs).then(|| Conv::new(&scope.at("id_path"), inputs, outputs, 1)).transpose()?;
        let widths = [inputs, hidden, hidden, hidden, outputs];
        let conv = |i: usize| {
            let scope = scope.at("res_path").at(format_args!("conv_{}", i + 1));
            Conv::new(&scope, widths[i], widths[i + 1], kernels[i])
        };
        Ok(Self { id_path, res_path: (0..4).map(conv).collect::<Result<_>>()?, gain })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.res_path.iter().try_fold(x.clone(), |h, conv| conv.forward(&h.relu()?))?;
        let x = self.id_path.as_ref().map_or_else(|| Ok(x.clone()), |conv| conv.forward(x))?;
        Ok((x + (h * self.gain)?)?)
    }
}

/// Groups of blocks. All groups but the last are followed by down- or up-sampling.
struct Groups(Vec<Vec<Block>>);

impl Groups {
    fn new(scope: &Scope, mut inputs: usize, widths: &[usize], blocks: usize, kernels: [usize; 4]) -> Result<Self> {
        let gain = 1.0 / ((widths.len() * blocks) as f64).powi(2);
        let mut groups = Vec::new();
        for (i, &width) in widths.iter().enumerate() {
            let scope = scope.at(format_args!("group_{}", i + 1));
            let mut group = Vec::new();
            for j in 0..blocks {
                group.push(Block::new(&scope.at(format_args!("block_{}", j + 1)), inputs, width, kernels, gain)?);
                inputs = width;
            }
            groups.push(group);
        }
        Ok(Self(groups))
    }

    fn forward(&self, mut x: Tensor, resize: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        for (i, group) in self.0.iter().enumerate() {
            x = group.iter().try_fold(x, |x, block| block.forward(&x))?;
            if i + 1 < self.0.len() {
                x = resize(&x)?;
            }
        }
        Ok(x)
    }
}

fn widths(config: &config::ImageTokenizer) -> Vec<usize> {
    config.channel_multipliers.iter().map(|multiplier| multiplier * config.channels).collect()
}

/// Pixels `(batch, side, side, 3)` in \[-1, 1\] → logits `(batch, side / f, side / f, codes)`.
pub struct Encoder {
    input: Conv,
    groups: Groups,
    output: Conv,
}

impl Encoder {
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let (blocks, widths) = (scope.at("blocks"), widths(config));
        let last = widths.last().copied().context("no channel multipliers")?;
        Ok(Self {
            input: Conv::new(&blocks.at("input"), 3, config.channels, 7)?,
            groups: Groups::new(&blocks, config.channels, &widths, config.residual_blocks, [3, 3, 3, 1])?,
            output: Conv::new(&blocks.at("output").at("conv"), last, config.codebook_size, 1)?,
        })
    }

    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.input.forward(&map_pixels(pixels)?)?;
        self.output.forward(&self.groups.forward(x, ops::max_pool2x)?.relu()?)
    }
}

/// Code vectors `(batch, side / f, side / f, code_dim)` → means and logarithmic spreads `(batch, side, side, 6)`.
pub struct Decoder {
    groups: Groups,
    output: Conv,
}

impl Decoder {
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let (blocks, mut widths) = (scope.at("blocks"), widths(config));
        widths.reverse();
        Ok(Self {
            groups: Groups::new(&blocks, config.code_dim, &widths, config.residual_blocks, [1, 3, 3, 3])?,
            output: Conv::new(&blocks.at("output").at("conv"), widths.last().copied().unwrap_or(1), 6, 1)?,
        })
    }

    /// The input of the last convolution, and its output.
    pub fn forward(&self, z_q: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = self.groups.forward(z_q.clone(), ops::upsample_nearest2x)?.relu()?;
        let y = self.output.forward(&x)?;
        Ok((x, y))
    }

    /// Norm of the gradient of the last convolution's weight, from its input and the gradient of its output.
    pub fn last_weight_norm(&self, input: &Tensor, dy: &Tensor) -> Result<f64> {
        conv::weight_gradient_norm(&self.output.w, input, dy, 1, Padding::default())
    }
}

/// φ: pixels in \[-1, 1\] → values in \[ε, 1 − ε\].
fn map_pixels(pixels: &Tensor) -> Result<Tensor> {
    Ok(pixels.affine(0.5 - EPS, 0.5)?)
}

/// The most likely pixels, in \[-1, 1\], from the decoder's output.
pub fn pixels(output: &Tensor) -> Result<Tensor> {
    let values = sigmoid(&output.narrow(D::Minus1, 0, 3)?)?;
    Ok(values.affine(1.0 / (0.5 - EPS), -0.5 / (0.5 - EPS))?.clamp(-1.0, 1.0)?)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

/// Negative log likelihood of pixels under a logit-Laplace distribution (appendix A.3), averaged over values:
/// ln 2b x (1 − x) + |logit x − μ| / b.
pub fn negative_log_likelihood(output: &Tensor, pixels: &Tensor) -> Result<Tensor> {
    let x = map_pixels(pixels)?;
    let (mean, log_spread) = (output.narrow(D::Minus1, 0, 3)?, output.narrow(D::Minus1, 3, 3)?);
    let rest = (1.0 - &x)?;
    let logit = (x.log()? - rest.log()?)?;
    let distance = ((logit - mean)?.abs()? * log_spread.neg()?.exp()?)?;
    let scale = ((log_spread + (x * rest)?.log()?)? + 2f64.ln())?;
    Ok((distance + scale)?.mean_all()?)
}
