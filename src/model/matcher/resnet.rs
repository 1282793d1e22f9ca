//! CLIP's ResNet (arXiv 2103.00020, §2.3), for imported weights, with the names of CLIP's: a stem of three convolutions,
//! average pooling before each convolution that would have stride 2, and attention pooling. Batch norms use their stored
//! statistics.

use super::{Input, head::l2_normalized, image_embedding};
use crate::{
    config::{self, Precision},
    error::{Result, ensure},
    nn::{
        linear::Linear,
        params::{Init, Params, Scope},
        segment::{Autograd, Segment},
    },
    ops::{self, Padding},
};
use candle_core::{D, Tensor};

/// PyTorch's default of batch norms.
const NORM_EPS: f64 = 1e-5;
/// Channels of a bottleneck's output, as a multiple of those inside.
const EXPANSION: usize = 4;

/// The image encoder.
pub struct ResNet {
    stem: Stem,
    blocks: Vec<Bottleneck>,
    pool: AttentionPool,
}

impl ResNet {
    /// # Errors
    /// The sizes are impossible, or a checkpoint lacks a parameter.
    pub fn new(scope: &Scope, config: &config::Matcher, precision: Precision) -> Result<Self> {
        let width = config.image_hidden;
        let stem = Stem::new(scope, config.image_size, width, precision)?;
        let (mut blocks, mut inputs) = (Vec::new(), width);
        for (stage, count) in config.resnet_blocks.iter().enumerate() {
            let inner = width << stage;
            for block in 0..*count {
                let scope = scope.at(format_args!("layer{}", stage + 1)).at(block);
                let halves = stage > 0 && block == 0;
                blocks.push(Bottleneck::new(&scope, [inputs, inner], halves, precision)?);
                inputs = inner * EXPANSION;
            }
        }
        let side = (config.image_size / 2) >> config.resnet_blocks.len();
        let sizes = [side, inputs, config.embedding];
        let pool = AttentionPool::new(&scope.at("attnpool"), sizes, config.image_heads, precision)?;
        Ok(Self { stem, blocks, pool })
    }

    /// Images → embeddings (b, embedding) of length 1.
    pub fn segments(&self) -> Vec<Box<dyn Segment<Input> + '_>> {
        let blocks = self.blocks.iter().map(|block| Box::new(block) as Box<_>);
        let stem: Box<dyn Segment<Input>> = Box::new(&self.stem);
        std::iter::once(stem).chain(blocks).chain([Box::new(&self.pool) as Box<_>]).collect()
    }
}

/// A convolution without bias, then a batch norm.
struct ConvNorm {
    /// (outputs, inputs, kernel, kernel)
    weight: Tensor,
    /// (outputs) each
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    stride: usize,
    precision: Precision,
}

impl ConvNorm {
    /// `names`: those of the convolution and of the norm.
    fn new(
        scope: &Scope,
        names: [&str; 2],
        [inputs, outputs, kernel]: [usize; 3],
        stride: usize,
        precision: Precision,
    ) -> Result<Self> {
        let init = Init::Uniform(((inputs * kernel * kernel) as f64).powf(-0.5));
        let norm = scope.at(names[1]);
        Ok(Self {
            weight: scope.at(names[0]).get("weight", (outputs, inputs, kernel, kernel), init)?,
            gain: norm.get("weight", outputs, Init::Ones)?,
            shift: norm.get("bias", outputs, Init::Zeros)?,
            mean: norm.statistics("running_mean", outputs, Init::Zeros)?,
            variance: norm.statistics("running_var", outputs, Init::Ones)?,
            stride,
            precision,
        })
    }

    /// (b, height, width, inputs) → (b, height / stride, width / stride, outputs).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, _, kernel, _) = self.weight.dims4()?;
        // With fixed statistics the norm is a factor and a bias of each channel.
        let scale = (&self.gain / (&self.variance + NORM_EPS)?.sqrt()?)?;
        let bias = (&self.shift - (&self.mean * &scale)?)?;
        let weight = self.weight.broadcast_mul(&scale.reshape((outputs, 1, 1, 1))?)?;
        let pad = kernel / 2;
        let padding = Padding { top: pad, bottom: pad, left: pad, right: pad };
        ops::conv2d_in(self.precision, x, &weight, Some(&bias), self.stride, padding)
    }
}

/// Mean of each 2 × 2 pixels: (b, height, width, c) → (b, height / 2, width / 2, c).
fn average_pool(x: &Tensor) -> Result<Tensor> {
    let (b, height, width, channels) = x.dims4()?;
    ensure!(height % 2 == 0 && width % 2 == 0, "{height} x {width} positions cannot be halved");
    let pairs = |x: &Tensor, shape: (usize, usize, usize)| -> Result<Tensor> {
        let x = x.contiguous()?.reshape(shape)?;
        Ok((x.narrow(1, 0, 1)? + x.narrow(1, 1, 1)?)?)
    };
    let rows = pairs(x, (b * height / 2, 2, width * channels))?;
    let sums = pairs(&rows, (b * height / 2 * (width / 2), 2, channels))?;
    Ok((sums.reshape((b, height / 2, width / 2, channels))? * 0.25)?)
}

/// The first segment: pixels to features with a quarter of the side length.
struct Stem {
    convs: [ConvNorm; 3],
    side: usize,
    name: String,
    params: Params,
}

impl Stem {
    fn new(scope: &Scope, side: usize, width: usize, precision: Precision) -> Result<Self> {
        let half = width / 2;
        let convs = [
            ConvNorm::new(scope, ["conv1", "bn1"], [3, half, 3], 2, precision)?,
            ConvNorm::new(scope, ["conv2", "bn2"], [half, half, 3], 1, precision)?,
            ConvNorm::new(scope, ["conv3", "bn3"], [half, width, 3], 1, precision)?,
        ];
        Ok(Self { convs, side, name: format!("{}.stem", scope.name()), params: scope.params() })
    }
}

impl Autograd<Input> for Stem {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// pixels (b, side, side, 3) → (b, side / 4, side / 4, width).
    fn autograd(&self, _: &Tensor, input: &Input) -> Result<Tensor> {
        let (pixels, _) = image_embedding::pixels(input, self.side)?;
        let weight = &self.convs[0].weight;
        let mut x = image_embedding::normalize(pixels, weight.device())?.to_dtype(weight.dtype())?;
        for conv in &self.convs {
            x = conv.forward(&x)?.relu()?;
        }
        average_pool(&x)
    }
}

/// A residual block of a 1×1, a 3×3 and a 1×1 convolution.
struct Bottleneck {
    convs: [ConvNorm; 3],
    /// Where the shape of the residual changes.
    downsample: Option<ConvNorm>,
    halves: bool,
    name: String,
    params: Params,
}

impl Bottleneck {
    fn new(scope: &Scope, [inputs, inner]: [usize; 2], halves: bool, precision: Precision) -> Result<Self> {
        let outputs = inner * EXPANSION;
        let convs = [
            ConvNorm::new(scope, ["conv1", "bn1"], [inputs, inner, 1], 1, precision)?,
            ConvNorm::new(scope, ["conv2", "bn2"], [inner, inner, 3], 1, precision)?,
            ConvNorm::new(scope, ["conv3", "bn3"], [inner, outputs, 1], 1, precision)?,
        ];
        let downsample = (halves || inputs != outputs)
            .then(|| ConvNorm::new(&scope.at("downsample"), ["0", "1"], [inputs, outputs, 1], 1, precision))
            .transpose()?;
        Ok(Self { convs, downsample, halves, name: scope.name().to_owned(), params: scope.params() })
    }
}

impl Autograd<Input> for Bottleneck {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// (b, height, width, inputs) → (b, height, width, 4 · inner), or with half the height and width.
    fn autograd(&self, x: &Tensor, _: &Input) -> Result<Tensor> {
        let [first, second, third] = &self.convs;
        let pool = |x: Tensor| if self.halves { average_pool(&x) } else { Ok(x) };
        let inner = pool(second.forward(&first.forward(x)?.relu()?)?.relu()?)?;
        let residual = match &self.downsample {
            Some(conv) => conv.forward(&pool(x.clone())?)?,
            None => x.clone(),
        };
        Ok((third.forward(&inner)? + residual)?.relu()?)
    }
}

/// The last segment: attention whose query is the mean of all positions.
struct AttentionPool {
    /// (1 + positions, channels)
    position: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    proj: Linear,
    heads: usize,
    precision: Precision,
    name: String,
    params: Params,
}

impl AttentionPool {
    fn new(scope: &Scope, [side, channels, embedding]: [usize; 3], heads: usize, precision: Precision) -> Result<Self> {
        ensure!(heads > 0 && channels % heads == 0, "{channels} channels are not a multiple of {heads} heads");
        let std = (channels as f64).powf(-0.5);
        let linear = |name: &str, outputs: usize| Linear::new(&scope.at(name), channels, outputs, std);
        Ok(Self {
            position: scope.table("positional_embedding", (1 + side * side, channels), Init::Normal(std))?,
            q: linear("q_proj", channels)?,
            k: linear("k_proj", channels)?,
            v: linear("v_proj", channels)?,
            proj: linear("c_proj", embedding)?,
            heads,
            precision,
            name: scope.name().to_owned(),
            params: scope.params(),
        })
    }
}

impl Autograd<Input> for AttentionPool {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// (b, height, width, channels) → (b, embedding) of length 1.
    fn autograd(&self, x: &Tensor, _: &Input) -> Result<Tensor> {
        let (b, height, width, channels) = x.dims4()?;
        let x = x.reshape((b, height * width, channels))?;
        let x = Tensor::cat(&[x.mean_keepdim(1)?, x], 1)?.broadcast_add(&self.position)?;
        let heads = |x: Tensor| -> Result<Tensor> {
            let positions = x.dim(1)?;
            Ok(x.reshape((b, positions, self.heads, channels / self.heads))?.transpose(1, 2)?.contiguous()?)
        };
        let q = heads(self.q.forward_in(self.precision, &x.narrow(1, 0, 1)?.contiguous()?)?)?;
        let k = heads(self.k.forward_in(self.precision, &x)?)?;
        let v = heads(self.v.forward_in(self.precision, &x)?)?;
        let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * ((channels / self.heads) as f64).powf(-0.5))?;
        let terms = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = terms.broadcast_div(&terms.sum_keepdim(D::Minus1)?)?;
        let pooled = weights.matmul(&v)?.reshape((b, channels))?;
        l2_normalized(&self.proj.forward_in(self.precision, &pooled)?)
    }
}
