//! The manual pass through encoder and decoder: forward and backward written by hand over reused buffers.
//!
//! A layer keeps its input and what is dear to compute; norms with SiLU are cheap and made again backwards.

mod layers;
pub(super) mod segments;
#[cfg(test)]
mod tests;

use crate::{
    error::{Context, Result},
    nn::{
        features::{Buffers, Features},
        gradients::Gradients,
    },
    ops::group_norm::Statistics,
};

/// What a layer's backward pass needs of its forward pass.
#[derive(Default)]
pub(super) struct Kept {
    features: Vec<Features>,
    statistics: Vec<Statistics<f32>>,
}

/// A link of the chain of layers.
pub(super) trait Layer {
    /// The output; keeps `x` or gives it back.
    fn forward(&self, x: Features, buffers: &Buffers) -> Result<(Features, Kept)>;

    /// Adds the parameters' gradients and returns the input's.
    fn backward(&self, kept: Kept, dy: Features, buffers: &Buffers, gradients: &mut Gradients) -> Result<Features>;
}

/// Runs the layers one after the other.
fn forward(layers: &[&dyn Layer], mut x: Features, buffers: &Buffers) -> Result<(Features, Vec<Kept>)> {
    let mut all = Vec::with_capacity(layers.len());
    for layer in layers {
        let (y, kept) = layer.forward(x, buffers)?;
        all.push(kept);
        x = y;
    }
    Ok((x, all))
}

/// The same where no backward pass follows: keeps nothing.
fn infer(layers: &[&dyn Layer], mut x: Features, buffers: &Buffers) -> Result<Features> {
    for layer in layers {
        let (y, kept) = layer.forward(x, buffers)?;
        kept.features.into_iter().for_each(|features| buffers.give(features));
        x = y;
    }
    Ok(x)
}

/// Runs them backwards.
fn backward(
    layers: &[&dyn Layer],
    mut kept: Vec<Kept>,
    mut dy: Features,
    buffers: &Buffers,
    gradients: &mut Gradients,
) -> Result<Features> {
    for layer in layers.iter().rev() {
        let kept = kept.pop().context("a layer kept nothing")?;
        dy = layer.backward(kept, dy, buffers, gradients)?;
    }
    Ok(dy)
}
