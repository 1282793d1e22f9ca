//! The image–text matcher, a dual encoder (CLIP, arXiv 2103.00020; Chinese-CLIP, arXiv 2211.01335). The paper filters its
//! data (§3.2.1) and ranks generated images with such a model.
//!
//! Each encoder is a chain of segments whose output is L2-normalized embeddings `(batch, embedding)`: the cosine of an
//! image and a text is a dot product. [`contrastive`] is the loss between the two chains.

pub mod contrastive;
mod head;
mod image_embedding;
mod layer;
mod resnet;
mod text_embedding;

use super::Tokens;
use crate::{
    config::{self, ContrastiveLoss, ImageEncoder, Precision},
    error::Result,
    nn::{
        params::{Init, Params, Scope},
        segment::{Autograd, Chain, Segment},
    },
    ops,
};
use candle_core::{DType, Device, Tensor};
pub use head::unnormalized;
use head::{Head, ManualHead};
use image_embedding::{ImageEmbedding, ManualImageEmbedding};
use layer::{AutogradLayer, Layer, ManualLayer};
use resnet::ResNet;
use text_embedding::{ManualTextEmbedding, TextEmbedding};

/// Both encoders and the scale of their logits.
pub struct Matcher {
    image: ImageTower,
    text: Encoder<TextEmbedding>,
    scale: LogitScale,
    /// Whether the segments with hand-written gradients can be used: f32 on a CPU.
    manual: bool,
    precision: Precision,
}

/// A batch of one of the encoders.
#[derive(Debug, Clone)]
pub enum Input {
    /// Pixels (b, side, side, 3) in [-1, 1].
    Images(Tensor),
    /// Tokens (b, length).
    Texts(Tokens),
}

/// The image encoder.
enum ImageTower {
    Vit(Box<Encoder<ImageEmbedding>>),
    Resnet(Box<ResNet>),
}

/// A transformer from an embedding of its input to embeddings of a whole image or text.
struct Encoder<E> {
    embedding: E,
    layers: Vec<Layer>,
    head: Head,
}

impl Matcher {
    /// A matcher over `vocab_size` text tokens with texts of at most `max_tokens`; `scope` is the root scope.
    ///
    /// # Errors
    /// The sizes are impossible, or a checkpoint lacks a parameter.
    pub fn new(
        scope: &Scope,
        config: &config::Matcher,
        (vocab_size, max_tokens): (usize, usize),
        precision: Precision,
    ) -> Result<Self> {
        let image = scope.at("image");
        let image = match config.image_encoder {
            ImageEncoder::Vit => ImageTower::Vit(Box::new(Encoder {
                embedding: ImageEmbedding::new(&image, config)?,
                layers: Layer::pre_norm(&image, &config.image_model(), config.image_activation)?,
                head: Head::new(&image, config.image_hidden, config.embedding, true)?,
            })),
            ImageEncoder::Resnet => ImageTower::Resnet(Box::new(ResNet::new(&image, config, precision)?)),
        };
        let positions = if config.text_positions == 0 { max_tokens } else { config.text_positions };
        let text = scope.at("text");
        let text = Encoder {
            embedding: TextEmbedding::new(&text, config.text_hidden, vocab_size, positions)?,
            layers: Layer::post_norm(&text, &config.text_model(), config.text_activation)?,
            head: Head::new(&text, config.text_hidden, config.embedding, false)?,
        };
        let scale = LogitScale::new(scope, config.loss)?;
        let manual = scope.device().is_cpu()
            && scope.precision() == Precision::F32
            && scope.params().values().all(|param| param.dtype() == DType::F32);
        Ok(Self { image, text, scale, manual, precision })
    }

    /// The chain of the image encoder: [`Input::Images`] → embeddings `(b, embedding)`.
    pub fn image_segments(&self) -> Vec<Box<dyn Segment<Input> + '_>> {
        let encoder = match &self.image {
            ImageTower::Vit(encoder) => encoder.as_ref(),
            ImageTower::Resnet(resnet) => return resnet.segments(),
        };
        let embedding = &encoder.embedding;
        match self.manual {
            true => self.chain(encoder, Box::new(ManualImageEmbedding { embedding, precision: self.precision })),
            false => self.chain(encoder, Box::new(embedding)),
        }
    }

    /// The chain of the text encoder: [`Input::Texts`] → embeddings `(b, embedding)`.
    pub fn text_segments(&self) -> Vec<Box<dyn Segment<Input> + '_>> {
        let embedding = &self.text.embedding;
        match self.manual {
            true => self.chain(&self.text, Box::new(ManualTextEmbedding(embedding))),
            false => self.chain(&self.text, Box::new(embedding)),
        }
    }

    /// Scale and bias of the logits.
    pub fn scale(&self) -> &LogitScale {
        &self.scale
    }

    /// The segment of an encoder's embedding, then those of its layers and its head.
    fn chain<'a, E>(
        &'a self,
        Encoder { layers, head, .. }: &'a Encoder<E>,
        embedding: Box<dyn Segment<Input> + 'a>,
    ) -> Vec<Box<dyn Segment<Input> + 'a>> {
        let precision = self.precision;
        let layer = |layer| -> Box<dyn Segment<Input> + 'a> {
            match self.manual {
                true => Box::new(ManualLayer { layer, precision }),
                false => Box::new(AutogradLayer { layer, precision }),
            }
        };
        let head: Box<dyn Segment<Input> + 'a> = match self.manual {
            true => Box::new(ManualHead { head, precision }),
            false => Box::new(head),
        };
        std::iter::once(embedding).chain(layers.iter().map(layer)).chain([head]).collect()
    }

    /// Embeds images or texts: → `(b, embedding)` of length 1.
    ///
    /// # Errors
    /// The images have another size, a text is too long, or a token is outside the vocabulary.
    pub fn embed(&self, input: &Input) -> Result<Tensor> {
        match input {
            Input::Images(_) => run(&self.image_segments(), input),
            Input::Texts(_) => run(&self.text_segments(), input),
        }
    }
}

/// The output of a chain; nothing is kept for a backward pass.
fn run(chain: &Chain<Input>, batch: &Input) -> Result<Tensor> {
    let mut x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    for segment in chain {
        x = segment.forward(&x, batch)?.0;
    }
    Ok(x)
}

/// The learned scale (as its logarithm) and bias of the logits: logit = exp(scale) · cosine + bias. A chain of its own,
/// whose output is the pair.
pub struct LogitScale {
    params: Params,
    scale: Tensor,
    bias: Option<Tensor>,
}

impl LogitScale {
    /// CLIP's bound on the logarithm of the scale: logits stay below 100.
    pub const MAX: f32 = 4.605_170_2;

    /// InfoNCE starts with a temperature of 0.07 and has no bias; the sigmoid loss starts with a scale of 10 and a bias of
    /// -10 (SigLIP, arXiv 2303.15343).
    fn new(scope: &Scope, loss: ContrastiveLoss) -> Result<Self> {
        let before = scope.params();
        let (scale, bias) = match loss {
            ContrastiveLoss::Infonce => (scope.get("logit_scale", 1, Init::Constant((1f64 / 0.07).ln()))?, None),
            ContrastiveLoss::Sigmoid => {
                let scale = scope.get("logit_scale", 1, Init::Constant(10f64.ln()))?;
                (scale, Some(scope.get("logit_bias", 1, Init::Constant(-10.0))?))
            }
        };
        let mut params = scope.params();
        params.retain(|name, _| !before.contains_key(name));
        Ok(Self { params, scale, bias })
    }

    /// Its parameters by full name.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Keeps the scale below [`Self::MAX`].
    ///
    /// # Errors
    /// The device fails.
    pub fn clamp(&self) -> Result<()> {
        ops::with_slice_mut(&self.scale, |scale: &mut [f32]| scale.iter_mut().for_each(|s| *s = s.min(Self::MAX)))?;
        Ok(())
    }
}

impl Autograd<()> for LogitScale {
    fn name(&self) -> &str {
        "logit_scale"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// → (2): the logarithm of the scale, and the bias.
    fn autograd(&self, _: &Tensor, (): &()) -> Result<Tensor> {
        let bias = match &self.bias {
            Some(bias) => bias.clone(),
            None => self.scale.zeros_like()?,
        };
        Ok(Tensor::cat(&[&self.scale, &bias], 0)?)
    }
}

#[cfg(test)]
mod tests;
