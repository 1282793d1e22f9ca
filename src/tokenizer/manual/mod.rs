//! Encoder and decoder with manual gradients: hand-written forward and backward passes over reused buffers.
//!
//! A layer saves its input and results that are expensive to compute; norms with SiLU are cheap and are recomputed
//! backward.

mod layers;
pub(super) mod segments;
#[cfg(test)]
mod tests;

use crate::{
    config::{self, Architecture},
    error::{Context, Result},
    nn::{
        features::{Buffers, Features},
        gradients::Gradients,
    },
    ops::group_norm::Statistics,
};
use candle_core::{DType, Device};

/// Whether the manual gradients can be used: a VQGAN in f32 on a CPU.
pub(super) fn is_possible(config: &config::ImageTokenizer, device: &Device, dtype: DType) -> bool {
    config.architecture == Architecture::Vqgan && device.is_cpu() && dtype == DType::F32
}

/// Activations that a layer saves for its backward pass.
#[derive(Default)]
pub(super) struct Kept {
    features: Vec<Features>,
    statistics: Vec<Statistics<f32>>,
}

impl Kept {
    /// The same activations for a second backward pass.
    fn copy(&self, buffers: &Buffers) -> Self {
        let features = self.features.iter().map(|x| buffers.copy(x.shape, &x.data)).collect();
        Self { features, statistics: self.statistics.clone() }
    }
}

/// A layer of the chain.
pub(super) trait Layer {
    /// Computes the output; saves `x` or returns its buffer.
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)>;

    /// Accumulates the parameters' gradients and returns the gradient of the input.
    fn backward(&self, kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features>;
}

/// Runs the layers in order.
fn forward(layers: &[&dyn Layer], mut x: Features, buffers: &Buffers) -> Result<(Features, Vec<Kept>)> {
    let mut all = Vec::with_capacity(layers.len());
    for layer in layers {
        let (y, kept) = layer.forward(x, buffers)?;
        all.push(kept);
        x = y;
    }
    Ok((x, all))
}

/// Runs the layers in order without saving activations (inference).
fn infer(layers: &[&dyn Layer], mut x: Features, buffers: &Buffers) -> Result<Features> {
    for layer in layers {
        let (y, kept) = layer.forward(x, buffers)?;
        kept.features.into_iter().for_each(|features| buffers.give(features));
        x = y;
    }
    Ok(x)
}

/// Runs the backward passes in reverse order.
fn backward(
    layers: &[&dyn Layer],
    mut kept: Vec<Kept>,
    mut dy: Features,
    buffers: &Buffers,
    gradients: &mut Gradients,
) -> Result<Features> {
    for layer in layers.iter().rev() {
        let kept = kept.pop().context("a layer saved nothing")?;
        dy = layer.backward(kept, dy, buffers, gradients)?;
    }
    Ok(dy)
}
