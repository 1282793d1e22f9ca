//! The output head: hidden states to logits, and the loss.

use super::{batch::Batch, sequence::Modality};
use crate::{
    config::Precision,
    error::{Context, Result},
    nn::{
        gradients::Gradients,
        linear::Linear,
        norm::LayerNorm,
        params::{Params, Scope},
        segment::{Saved, Segment, unpack},
    },
    ops,
};
use candle_core::{Tensor, Var};

/// The head segment, last in the chain: final norm, one linear layer per modality, cross-entropy over the target.
pub struct Head {
    pub(super) norm: LayerNorm,
    text: Linear,
    image: Linear,
    pub(super) params: Params,
}

impl Head {
    pub fn new(scope: &Scope, hidden: usize, vocab_size: usize, codebook_size: usize) -> Result<Self> {
        let before = scope.params();
        let norm = LayerNorm::new(&scope.at("norm"), hidden)?;
        let text = Linear::new(&scope.at("text_head"), hidden, vocab_size, 0.02)?;
        let image = Linear::new(&scope.at("image_head"), hidden, codebook_size, 0.02)?;
        let mut params = scope.params();
        params.retain(|name, _| !before.contains_key(name));
        Ok(Self { norm, text, image, params })
    }

    /// `x` (.., hidden) at positions of a target of this modality → logits (.., vocabulary of the modality).
    pub fn logits(&self, x: &Tensor, target: Modality) -> Result<Tensor> {
        self.linear(target).forward(&self.norm.forward(x)?)
    }

    /// The output layer of a modality: (.., hidden) → (.., vocabulary of the modality).
    pub(super) fn linear(&self, target: Modality) -> &Linear {
        match target {
            Modality::Text => &self.text,
            Modality::Image => &self.image,
        }
    }

    /// `x` (b, positions, hidden) → logits (b, predicted, vocabulary). The target is the last span.
    pub fn target_logits(&self, precision: Precision, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let target = x.narrow(1, batch.source_positions(), batch.target().0.predicted())?.contiguous()?;
        self.linear(batch.target().0.modality).forward_in(precision, &self.norm.forward(&target)?)
    }
}

/// Rows of logits that autograd computes together: of 8,192 codes they take 134 MB in f32.
pub(super) const ROWS: usize = 4096;

/// The head with autograd, computed in `precision`. It is the last segment, so the gradient of the loss is known as soon as
/// the logits are: the forward pass also computes the gradients, some rows at a time.
pub(super) struct AutogradHead<'a> {
    pub head: &'a Head,
    pub precision: Precision,
}

/// What the forward pass has computed.
pub(super) struct Found {
    gradients: Gradients,
    /// (b, positions, hidden)
    dx: Tensor,
}

impl AutogradHead<'_> {
    /// `x` (b, positions, hidden) → the loss, a scalar, with the logits of all targets at once.
    pub fn loss(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.loss_of(&states(x, batch)?, batch.target().0.modality, &batch.outputs()?)
    }

    /// The loss of states (rows, hidden) whose targets are of this modality; `outputs` as [`Batch::outputs`].
    fn loss_of(&self, states: &Tensor, target: Modality, (targets, weights): &(Tensor, Tensor)) -> Result<Tensor> {
        let logits = self.head.linear(target).forward_in(self.precision, &self.head.norm.forward(states)?)?;
        ops::cross_entropy(&logits, targets, weights)
    }

    /// [`Segment::forward`] with at most `most` rows at a time.
    pub(super) fn find(&self, x: &Tensor, batch: &Batch, most: usize) -> Result<(Tensor, Found)> {
        let (states, (targets, weights)) = (states(x, batch)?, batch.outputs()?);
        let (rows, mut losses, mut dstates, mut gradients) =
            (states.dim(0)?, Vec::new(), Vec::new(), Gradients::default());
        for start in (0..rows).step_by(most) {
            let part = |x: &Tensor| x.narrow(0, start, most.min(rows - start));
            let states = Var::from_tensor(&part(&states)?)?;
            let loss = self.loss_of(&states, batch.target().0.modality, &(part(&targets)?, part(&weights)?))?;
            let mut store = loss.backward()?;
            for (name, var) in self.head.params.iter().filter(|(_, param)| !param.attributes.base) {
                if let Some(gradient) = store.remove(var) {
                    gradients.add(name, gradient)?;
                }
            }
            dstates.push(store.remove(&states).context("the head passes no gradient on")?);
            losses.push(loss.detach());
        }
        let (b, positions, _) = x.dims3()?;
        let (first, predicted) = (batch.source_positions(), rows / b.max(1));
        let dx = Tensor::cat(&dstates, 0)?.reshape((b, predicted, ()))?;
        let dx = dx.pad_with_zeros(1, first, positions - first - predicted)?;
        Ok((Tensor::stack(&losses, 0)?.sum_all()?, Found { gradients, dx }))
    }
}

/// The hidden states (b · predicted, hidden) of `x` (b, positions, hidden) from which the target is predicted.
fn states(x: &Tensor, batch: &Batch) -> Result<Tensor> {
    Ok(x.narrow(1, batch.source_positions(), batch.target().0.predicted())?.contiguous()?.flatten_to(1)?)
}

impl Segment<Batch> for AutogradHead<'_> {
    fn name(&self) -> &str {
        "head"
    }

    fn params(&self) -> &Params {
        &self.head.params
    }

    /// (b, positions, hidden) → the loss, a scalar.
    fn forward(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Saved)> {
        let (loss, found) = self.find(x, batch, ROWS)?;
        Ok((loss, Box::new(found)))
    }

    fn backward(
        &self,
        _: &Tensor,
        _: &Batch,
        saved: Saved,
        _: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let Found { gradients: found, dx } = unpack::<Found>(saved)?;
        gradients.merge(found)?;
        Ok(Some(dx))
    }
}
