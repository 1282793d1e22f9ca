//! Forward and backward passes of a matcher over the micro-batches of a step (gradient caching, arXiv 2101.06983).
//!
//! The loss compares each image with all texts of all micro-batches and ranks. So all embeddings are computed first, then
//! the loss and its gradients with respect to them, then the backward pass of each micro-batch. The activations of several
//! micro-batches would not fit into memory: they are computed again.

use super::{
    engine::{Activations, Pass},
    shards::{self, Shards},
};
use crate::{
    config::ContrastiveLoss,
    error::Result,
    model::{
        Matcher,
        matcher::{
            Input,
            contrastive::{Pairs, contrastive},
        },
    },
    nn::segment::Segment,
};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// How gradients are computed.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub loss: ContrastiveLoss,
    /// As [`Pass::activation_checkpointing`].
    pub activation_checkpointing: usize,
    /// The gradients are those of this times the loss.
    pub loss_scale: f64,
    /// Whether there are gradients; otherwise only the loss is computed.
    pub requires_grad: bool,
}

/// Results of a step on this rank.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// This rank's part of the loss; the parts of all ranks add up to it.
    pub loss: f64,
    /// This rank's number of images and texts that are closest to their partner.
    pub correct: usize,
    /// Scale of the logits.
    pub scale: f64,
}

/// The parameter names of each parameter group of the shards: the image encoder's segments, the text encoder's, and the scale of the
/// logits.
pub fn parameter_groups(model: &Matcher) -> Vec<Vec<String>> {
    let mut groups = shards::names(&model.image_segments());
    groups.extend(shards::names(&model.text_segments()));
    groups.push(model.scale().params().keys().cloned().collect());
    groups
}

/// Adds the gradients of this rank's micro-batches (images and texts) to those in `shards`, which has the
/// [`parameter_groups`] of the matcher. `captions`: equal for equal texts, of all micro-batches.
///
/// # Errors
/// A segment fails, an embedding is not finite, or a rank does not come.
pub fn accumulate(
    model: &Matcher,
    micro_batches: &[[Input; 2]],
    captions: &[u64],
    settings: Settings,
    shards: &mut Shards,
) -> Result<Seen> {
    let Settings { loss, activation_checkpointing, loss_scale, requires_grad } = settings;
    let chains = [model.image_segments(), model.text_segments()];
    let first_units = [0, chains[0].len()];
    let (mut embeddings, mut branches) = ([Vec::<f32>::new(), Vec::new()], Vec::new());
    for inputs in micro_batches {
        for (encoder, batch) in inputs.iter().enumerate() {
            let (chain, first_unit) = (&chains[encoder], first_units[encoder]);
            let pass = Pass { chain, batch, first_unit, activation_checkpointing };
            let (embedding, activations) = pass.forward(shards)?;
            let first = embeddings[encoder].len();
            embeddings[encoder].extend(embedding.flatten_all()?.to_vec1::<f32>()?);
            let (range, shape) = (first..embeddings[encoder].len(), embedding.dims2()?);
            let activations = (requires_grad && micro_batches.len() == 1).then_some(activations);
            branches.push(Branch { pass, activations, encoder, range, shape });
        }
    }
    let scale: [Box<dyn Segment<()>>; 1] = [Box::new(model.scale())];
    let scale =
        Pass { chain: &scale, batch: &(), first_unit: chains[0].len() + chains[1].len(), activation_checkpointing: 0 };
    let (values, scale_activations) = scale.forward(shards)?;
    let device = values.device().clone();
    let values = <[f32; 2]>::try_from(values.to_vec1::<f32>()?.as_slice())?.map(f64::from);

    let pairs = Pairs { images: &embeddings[0], texts: &embeddings[1], captions };
    let found = contrastive(loss, &pairs, values, shards.group())?;

    let seen = Seen { loss: found.loss, correct: found.correct, scale: values[0].exp() };
    if !requires_grad {
        return Ok(seen);
    }
    let gradients = [&found.images, &found.texts];
    let last = branches.len().saturating_sub(chains.len());
    for (i, branch) in branches.into_iter().enumerate() {
        if i == last {
            shards.last_micro_batch();
        }
        branch.backward(gradients, loss_scale, &device, shards)?;
    }
    let dscale = found.scale.map(|gradient| (gradient * loss_scale) as f32);
    scale.backward(scale_activations, Some(Tensor::new(&dscale, &device)?), shards)?;
    Ok(seen)
}

/// A micro-batch of one encoder.
struct Branch<'a> {
    pass: Pass<'a, Input>,
    /// What its backward pass needs; `None`: run forward again.
    activations: Option<Activations>,
    encoder: usize,
    /// Its embeddings among those of the encoder, and their shape.
    range: Range<usize>,
    shape: (usize, usize),
}

impl Branch<'_> {
    /// `gradients`: of all embeddings of each encoder.
    fn backward(self, gradients: [&Vec<f32>; 2], loss_scale: f64, device: &Device, shards: &mut Shards) -> Result<()> {
        if self.pass.is_frozen(shards) {
            return Ok(());
        }
        let activations = match self.activations {
            Some(activations) => activations,
            None => self.pass.forward(shards)?.1,
        };
        let gradient = gradients[self.encoder][self.range].iter().map(|value| value * loss_scale as f32).collect();
        let gradient = Tensor::from_vec::<_, f32>(gradient, self.shape, device)?;
        self.pass.backward(activations, Some(gradient), shards)
    }
}
