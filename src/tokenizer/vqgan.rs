//! VQGAN's encoder and decoder (arXiv 2012.09841), with the names and shapes of taming-transformers, so
//! that its checkpoints load. Activations are `(batch, height, width, channels)`.

use super::manual::Layer;
use crate::{
    config,
    error::Result,
    nn::{
        conv::{Conv2d, Upsample},
        group_norm::GroupNorm,
        params::Scope,
    },
};
use candle_core::{D, Tensor};

/// `x + conv(swish(norm(conv(swish(norm(x))))))`, with a 1×1 shortcut where the channels change.
pub(super) struct ResnetBlock {
    pub(super) norm1: GroupNorm,
    pub(super) conv1: Conv2d,
    pub(super) norm2: GroupNorm,
    pub(super) conv2: Conv2d,
    pub(super) nin_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    fn new(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::new(&scope.at("norm1"), inputs)?,
            conv1: Conv2d::same(&scope.at("conv1"), inputs, outputs, 3)?,
            norm2: GroupNorm::new(&scope.at("norm2"), outputs)?,
            conv2: Conv2d::same(&scope.at("conv2"), outputs, outputs, 3)?,
            nin_shortcut: (inputs != outputs)
                .then(|| Conv2d::same(&scope.at("nin_shortcut"), inputs, outputs, 1))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.silu(x)?)?;
        let h = self.conv2.forward(&self.norm2.silu(&h)?)?;
        match &self.nin_shortcut {
            Some(shortcut) => Ok((shortcut.forward(x)? + h)?),
            None => Ok((x + h)?),
        }
    }
}

/// Single-head self-attention over all positions.
pub(super) struct AttnBlock {
    pub(super) norm: GroupNorm,
    pub(super) q: Conv2d,
    pub(super) k: Conv2d,
    pub(super) v: Conv2d,
    pub(super) proj_out: Conv2d,
}

impl AttnBlock {
    fn new(scope: &Scope, channels: usize) -> Result<Self> {
        let conv = |name| Conv2d::same(&scope.at(name), channels, channels, 1);
        Ok(Self {
            norm: GroupNorm::new(&scope.at("norm"), channels)?,
            q: conv("q")?,
            k: conv("k")?,
            v: conv("v")?,
            proj_out: conv("proj_out")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let h = self.norm.forward(x)?;
        let flat =
            |conv: &Conv2d| -> Result<Tensor> { Ok(conv.forward(&h)?.reshape((batch, height * width, channels))?) };
        let (q, k, v) = (flat(&self.q)?, flat(&self.k)?, flat(&self.v)?);
        let scores = (q.matmul(&k.t()?)? * (channels as f64).powf(-0.5))?;
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let p = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        let h = p.matmul(&v)?.reshape(x.shape())?;
        Ok((x + self.proj_out.forward(&h)?)?)
    }
}

/// `conv(swish(norm(x)))`, the last layer of encoder and decoder.
pub(super) struct Head {
    pub(super) norm: GroupNorm,
    pub(super) conv: Conv2d,
}

impl Head {
    fn new(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        let norm = GroupNorm::new(&scope.at("norm_out"), inputs)?;
        Ok(Self { norm, conv: Conv2d::same(&scope.at("conv_out"), inputs, outputs, 3)? })
    }

    /// The input of the convolution, and its output.
    fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = self.norm.silu(x)?;
        let y = self.conv.forward(&x)?;
        Ok((x, y))
    }
}

/// The residual blocks of one resolution, each followed by attention if the configuration asks for it.
struct Level {
    blocks: Vec<(ResnetBlock, Option<AttnBlock>)>,
}

impl Level {
    fn new(scope: &Scope, mut inputs: usize, outputs: usize, count: usize, attention: bool) -> Result<Self> {
        let mut blocks = Vec::with_capacity(count);
        for j in 0..count {
            let block = ResnetBlock::new(&scope.at("block").at(j), inputs, outputs)?;
            let attn = attention.then(|| AttnBlock::new(&scope.at("attn").at(j), outputs)).transpose()?;
            blocks.push((block, attn));
            inputs = outputs;
        }
        Ok(Self { blocks })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.clone();
        for (block, attn) in &self.blocks {
            h = block.forward(&h)?;
            if let Some(attn) = attn {
                h = attn.forward(&h)?;
            }
        }
        Ok(h)
    }

    fn layers(&self) -> impl Iterator<Item = &dyn Layer> {
        self.blocks.iter().flat_map(|(block, attn)| {
            let attn = attn.as_ref().map(|attn| attn as &dyn Layer);
            std::iter::once(block as &dyn Layer).chain(attn)
        })
    }
}

/// Residual block, attention, residual block at the lowest resolution.
struct Middle {
    block_1: ResnetBlock,
    attn_1: AttnBlock,
    block_2: ResnetBlock,
}

impl Middle {
    fn new(scope: &Scope, channels: usize) -> Result<Self> {
        Ok(Self {
            block_1: ResnetBlock::new(&scope.at("block_1"), channels, channels)?,
            attn_1: AttnBlock::new(&scope.at("attn_1"), channels)?,
            block_2: ResnetBlock::new(&scope.at("block_2"), channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.block_2.forward(&self.attn_1.forward(&self.block_1.forward(x)?)?)
    }

    fn layers(&self) -> [&dyn Layer; 3] {
        [&self.block_1, &self.attn_1, &self.block_2]
    }
}

/// Pixels `(batch, side, side, 3)` → latents `(batch, side / f, side / f, latent_channels)`.
pub struct Encoder {
    conv_in: Conv2d,
    /// Each resolution, with the downsampling to the next one.
    down: Vec<(Level, Option<Conv2d>)>,
    mid: Middle,
    out: Head,
}

impl Encoder {
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let widths: Vec<usize> = config.channel_multipliers.iter().map(|m| m * config.channels).collect();
        let conv_in = Conv2d::same(&scope.at("conv_in"), 3, config.channels, 3)?;
        let (mut inputs, mut side, mut down) = (config.channels, config.image_size, Vec::new());
        for (i, &outputs) in widths.iter().enumerate() {
            let scope = scope.at("down").at(i);
            let attention = config.attention_sides.contains(&side);
            let level = Level::new(&scope, inputs, outputs, config.residual_blocks, attention)?;
            let downsample = i + 1 < widths.len();
            let downsample = downsample.then(|| Conv2d::down(&scope.at("downsample.conv"), outputs)).transpose()?;
            side /= 2;
            down.push((level, downsample));
            inputs = outputs;
        }
        Ok(Self {
            conv_in,
            down,
            mid: Middle::new(&scope.at("mid"), inputs)?,
            out: Head::new(scope, inputs, config.latent_channels)?,
        })
    }

    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(pixels)?;
        for (level, downsample) in &self.down {
            h = level.forward(&h)?;
            if let Some(downsample) = downsample {
                h = downsample.forward(&h)?;
            }
        }
        Ok(self.out.forward(&self.mid.forward(&h)?)?.1)
    }

    /// The first convolution, whose input are the pixels, and all layers after it.
    pub(super) fn layers(&self) -> (&Conv2d, Vec<&dyn Layer>) {
        let down = self.down.iter().flat_map(|(level, downsample)| {
            level.layers().chain(downsample.as_ref().map(|downsample| downsample as &dyn Layer))
        });
        let end: [&dyn Layer; 1] = [&self.out];
        (&self.conv_in, down.chain(self.mid.layers()).chain(end).collect())
    }
}

/// Latents `(batch, side / f, side / f, latent_channels)` → pixels `(batch, side, side, 3)`.
pub struct Decoder {
    conv_in: Conv2d,
    mid: Middle,
    /// Each resolution, with the upsampling to the previous one. Indexed as in taming: the last one runs first.
    up: Vec<(Level, Option<Upsample>)>,
    out: Head,
}

impl Decoder {
    pub fn new(scope: &Scope, config: &config::ImageTokenizer) -> Result<Self> {
        let widths: Vec<usize> = config.channel_multipliers.iter().map(|m| m * config.channels).collect();
        let mut inputs = widths.last().copied().unwrap_or(config.channels);
        let conv_in = Conv2d::same(&scope.at("conv_in"), config.latent_channels, inputs, 3)?;
        let mid = Middle::new(&scope.at("mid"), inputs)?;
        let mut side = config.image_size >> widths.len().saturating_sub(1);
        let mut up = Vec::new();
        for (i, &outputs) in widths.iter().enumerate().rev() {
            let scope = scope.at("up").at(i);
            let attention = config.attention_sides.contains(&side);
            let level = Level::new(&scope, inputs, outputs, config.residual_blocks + 1, attention)?;
            let upsample = (i > 0).then(|| Upsample::new(&scope.at("upsample"), outputs)).transpose()?;
            side *= 2;
            up.insert(0, (level, upsample));
            inputs = outputs;
        }
        Ok(Self { conv_in, mid, up, out: Head::new(scope, inputs, 3)? })
    }

    /// The input of the last convolution, and the pixels.
    pub fn forward(&self, latents: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut h = self.mid.forward(&self.conv_in.forward(latents)?)?;
        for (level, upsample) in self.up.iter().rev() {
            h = level.forward(&h)?;
            if let Some(upsample) = upsample {
                h = upsample.forward(&h)?;
            }
        }
        self.out.forward(&h)
    }

    /// The last layer.
    pub(super) fn head(&self) -> &Head {
        &self.out
    }

    /// Norm of the gradient of the last convolution's weight, from its input and the gradient of the pixels.
    pub fn last_weight_norm(&self, input: &Tensor, dy: &Tensor) -> Result<f64> {
        self.out.conv.weight_gradient_norm(input, dy)
    }

    /// All layers in order.
    pub(super) fn layers(&self) -> Vec<&dyn Layer> {
        let start: [&dyn Layer; 1] = [&self.conv_in];
        let up = self.up.iter().rev().flat_map(|(level, upsample)| {
            level.layers().chain(upsample.as_ref().map(|upsample| upsample as &dyn Layer))
        });
        let end: [&dyn Layer; 1] = [&self.out];
        start.into_iter().chain(self.mid.layers()).chain(up).chain(end).collect()
    }
}
