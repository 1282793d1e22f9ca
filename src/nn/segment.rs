//! The interface between a model and the training engine: a model is a chain of segments.
//!
//! A segment has one of two implementations; the engine does not know which. *Autograd*: the forward pass uses candle
//! ops and candle computes the gradients; it runs on any device and is the reference. *Manual*: forward and backward
//! are written by hand over slices, for the CPU. Activation recomputation (paper §3.2) drops the saved state and runs
//! forward again.

use super::{gradients::Gradients, params::Params};
use crate::{
    error::{Context, Result},
    ops::custom_gradient::custom_gradient,
};
use candle_core::{DType, Tensor, Var};
use std::any::Any;

/// State that a forward pass saves for its backward pass. Only the segment knows its type.
pub type Saved = Box<dyn Any>;

/// A segment of the chain embedding → block 1 … block L → head with loss.
///
/// `B` is the batch, which all segments can read besides the hidden states: tokens, masks, targets. The first segment
/// ignores
/// `x` (an empty tensor); the last one returns the scalar loss, or an output whose gradient is given from outside (an
/// embedding).
pub trait Segment<B> {
    /// Name of the segment in error messages (`blocks.3`).
    fn name(&self) -> &str;

    /// Trainable parameters by full name.
    fn params(&self) -> &Params;

    /// Computes the output y from x; also returns the state for [`Segment::backward`].
    ///
    /// # Errors
    /// The shapes do not match, or the device fails.
    fn forward(&self, x: &Tensor, batch: &B) -> Result<(Tensor, Saved)>;

    /// Adds the parameters' gradients to `gradients` and returns the gradient of x, if y depends on x. `dy` is the
    /// gradient of the loss with respect to y; `None` if y is the loss itself, a scalar.
    ///
    /// # Errors
    /// `saved` belongs to another segment, the shapes do not match, or the device fails.
    fn backward(
        &self,
        x: &Tensor,
        batch: &B,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>>;
}

/// What a segment saved, as the type that it has.
///
/// # Errors
/// It has another type: another segment saved it.
pub fn unpack<T: 'static>(saved: Saved) -> Result<T> {
    saved.downcast().map(|saved| *saved).ok().context("the saved state belongs to another segment")
}

/// Segments that run in order, each on the output of the previous one. In training the last one returns the loss, or an
/// output whose gradient is given from outside.
pub type Chain<'a, B> = [Box<dyn Segment<B> + 'a>];

/// A segment whose gradients are computed by candle's autograd.
pub trait Autograd<B> {
    /// As [`Segment::name`].
    fn name(&self) -> &str;

    /// As [`Segment::params`].
    fn params(&self) -> &Params;

    /// The segment's output for its input, differentiable in both `x` and the parameters.
    fn autograd(&self, x: &Tensor, batch: &B) -> Result<Tensor>;
}

impl<B, S: Autograd<B>> Autograd<B> for &S {
    fn name(&self) -> &str {
        (*self).name()
    }

    fn params(&self) -> &Params {
        (*self).params()
    }

    fn autograd(&self, x: &Tensor, batch: &B) -> Result<Tensor> {
        (*self).autograd(x, batch)
    }
}

impl<B, S: Autograd<B>> Segment<B> for S {
    fn name(&self) -> &str {
        Autograd::name(self)
    }

    fn params(&self) -> &Params {
        Autograd::params(self)
    }

    fn forward(&self, x: &Tensor, batch: &B) -> Result<(Tensor, Saved)> {
        let input = Var::from_tensor(x)?;
        let y = self.autograd(&input, batch)?;
        Ok((y.detach(), Box::new((input, y))))
    }

    fn backward(
        &self,
        _: &Tensor,
        _: &B,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (input, y) = unpack::<(Var, Tensor)>(saved)?;
        let mut store = match dy {
            None => y.backward()?,
            Some(dy) => seeded(&y, dy)?.backward()?,
        };
        drop(y);
        for (name, var) in Autograd::params(self).iter().filter(|(_, param)| !param.attributes.base) {
            if let Some(gradient) = store.remove(var) {
                gradients.add(name, gradient)?;
            }
        }
        Ok(store.remove(&input))
    }
}

/// A scalar whose gradient with respect to `y` is `dy`: a sum of their product would read both several times.
fn seeded(y: &Tensor, dy: Tensor) -> Result<Tensor> {
    let scalar = |args: &[Tensor]| Ok(Tensor::zeros((), DType::F32, args[0].device())?);
    custom_gradient("seed", &[y], scalar, move |_, _, _| Ok(vec![dy.clone()]))
}
