//! The contract between a model and the training engine: a model is a chain of segments.
//!
//! The engine runs a segment forward, may forget what happened inside it, and runs it forward again
//! under the tape when its gradient is due (activation recomputation, paper §3.2).

use super::params::Params;
use crate::error::Result;
use candle_core::Tensor;

/// One link of the chain embedding → block 1 … block L → head with loss.
///
/// `B` is what the whole chain reads beside the hidden states: tokens, masks, targets. The first
/// segment ignores `x` (it is an empty tensor); the last one returns the scalar loss.
pub trait Segment<B> {
    /// The segment's name in messages (`blocks.3`).
    fn name(&self) -> &str;

    /// Its trainable parameters by full name.
    fn params(&self) -> &Params;

    /// The segment's output for its input, differentiable in both `x` and the parameters.
    fn forward(&self, x: &Tensor, batch: &B) -> Result<Tensor>;
}
