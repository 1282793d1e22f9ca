//! A transformer layer of an encoder. All positions attend to all, except padding.

use super::Input;
use crate::{
    config::{self, Activation, Precision},
    error::{Context, Result},
    nn::{
        block::Block,
        block_manual,
        gradients::Gradients,
        params::{Params, Scope},
        post_norm_block::{self, PostNormBlock},
        segment::{Autograd, Saved, Segment},
    },
    ops::{
        attention::{KeyLists, KeyRanges, Sizes},
        slices::view,
    },
};
use candle_core::Tensor;
use std::sync::Arc;

/// The ViT's block, or BERT's.
enum EncoderBlock {
    PreNorm(Block),
    PostNorm(PostNormBlock),
}

/// One layer of an encoder.
pub struct Layer {
    block: EncoderBlock,
    name: String,
    params: Params,
}

impl Layer {
    /// The ViT's layers.
    pub fn pre_norm(scope: &Scope, model: &config::Model, activation: Activation) -> Result<Vec<Self>> {
        let block = |scope: &Scope| {
            Ok(EncoderBlock::PreNorm(Block::with_std(scope, model, std(model))?.with_activation(activation)))
        };
        Self::stack(scope, model.layers, block)
    }

    /// BERT's layers.
    pub fn post_norm(scope: &Scope, model: &config::Model, activation: Activation) -> Result<Vec<Self>> {
        let block =
            |scope: &Scope| Ok(EncoderBlock::PostNorm(PostNormBlock::new(scope, model, activation, std(model))?));
        Self::stack(scope, model.layers, block)
    }

    fn stack(scope: &Scope, layers: usize, block: impl Fn(&Scope) -> Result<EncoderBlock>) -> Result<Vec<Self>> {
        let layer = |i: usize| {
            let scope = scope.at("blocks").at(i);
            Ok(Self { block: block(&scope)?, name: scope.name().to_owned(), params: scope.params() })
        };
        (0..layers).map(layer).collect()
    }

    fn sizes(&self, x: &Tensor) -> Result<Sizes> {
        let (samples, positions, hidden) = x.dims3()?;
        let heads = match &self.block {
            EncoderBlock::PreNorm(block) => block.heads(),
            EncoderBlock::PostNorm(block) => block.heads(),
        };
        Ok(Sizes { samples, positions, heads, d: hidden / heads })
    }
}

/// Of fresh weights, as CLIP's: small encoders would hardly see their input with BERT's constant of 0.02.
fn std(model: &config::Model) -> f64 {
    (model.hidden as f64).powf(-0.5)
}

fn keys(positions: usize, batch: &Input) -> Arc<KeyRanges> {
    let text_lengths = match batch {
        Input::Images(_) => None,
        Input::Texts(texts) => Some(texts.lengths.clone()),
    };
    Arc::new(KeyRanges::new(Arc::new(KeyLists::dense(positions)), text_lengths))
}

/// A layer with autograd, computed in `precision`.
pub struct AutogradLayer<'a> {
    pub layer: &'a Layer,
    pub precision: Precision,
}

impl Autograd<Input> for AutogradLayer<'_> {
    fn name(&self) -> &str {
        &self.layer.name
    }

    fn params(&self) -> &Params {
        &self.layer.params
    }

    /// (b, positions, hidden) → (b, positions, hidden).
    fn autograd(&self, x: &Tensor, batch: &Input) -> Result<Tensor> {
        let keys = keys(x.dim(1)?, batch);
        match &self.layer.block {
            EncoderBlock::PreNorm(block) => block.forward(self.precision, x, &keys),
            EncoderBlock::PostNorm(block) => block.forward(self.precision, x, &keys),
        }
    }
}

/// A layer with hand-written gradients, computed in `precision`.
pub struct ManualLayer<'a> {
    pub layer: &'a Layer,
    pub precision: Precision,
}

enum Activations {
    PreNorm(block_manual::Activations),
    PostNorm(post_norm_block::Activations),
}

impl Segment<Input> for ManualLayer<'_> {
    fn name(&self) -> &str {
        &self.layer.name
    }

    fn params(&self) -> &Params {
        &self.layer.params
    }

    fn forward(&self, x: &Tensor, batch: &Input) -> Result<(Tensor, Saved)> {
        let (sizes, values) = (self.layer.sizes(x)?, view(x)?);
        let keys = keys(sizes.positions, batch);
        keys.check(sizes.samples, sizes.positions)?;
        let (y, saved) = match &self.layer.block {
            EncoderBlock::PreNorm(block) => {
                let (y, saved) = block.manual(self.precision, &values, &keys, sizes)?;
                (y, Activations::PreNorm(saved))
            }
            EncoderBlock::PostNorm(block) => {
                let (y, saved) = block.manual(self.precision, &values, &keys, sizes)?;
                (y, Activations::PostNorm(saved))
            }
        };
        Ok((Tensor::from_vec(y, x.shape(), x.device())?, Box::new(saved)))
    }

    fn backward(
        &self,
        x: &Tensor,
        batch: &Input,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let saved = *saved.downcast::<Activations>().ok().context("the saved state belongs to another segment")?;
        let (sizes, dy) = (self.layer.sizes(x)?, dy.context("a block is not the last segment")?);
        let (keys, values, dy) = (keys(sizes.positions, batch), view(x)?, view(&dy)?);
        let dx = match (&self.layer.block, saved) {
            (EncoderBlock::PreNorm(block), Activations::PreNorm(saved)) => {
                block.manual_backward(self.precision, &values, (&keys, sizes), saved, &dy, gradients)?
            }
            (EncoderBlock::PostNorm(block), Activations::PostNorm(saved)) => {
                block.manual_backward(self.precision, &values, (&keys, sizes), saved, &dy, gradients)?
            }
            _ => None.context("the saved state belongs to another block")?,
        };
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
