//! GroupNorm (arXiv 1803.08494) over `(batch, height, width, channels)`, as VQGAN has it.

use super::params::{Init, Scope};
use crate::{
    error::{Result, ensure},
    ops,
};
use candle_core::Tensor;

/// taming-transformers normalises in 32 groups, so channels come in multiples of 32.
pub const GROUPS: usize = 32;
const EPS: f64 = 1e-6;

/// GroupNorm in 32 groups with a scale and a shift a channel.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
}

impl GroupNorm {
    /// # Errors
    /// The channels are no multiple of [`GROUPS`].
    pub fn new(scope: &Scope, channels: usize) -> Result<Self> {
        ensure!(
            channels.is_multiple_of(GROUPS),
            "{channels} channels are not a multiple of the norm's {GROUPS} groups"
        );
        Ok(Self { weight: scope.get("weight", channels, Init::Ones)?, bias: scope.get("bias", channels, Init::Zeros)? })
    }

    /// The normalised input, same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, GROUPS, EPS, false)
    }

    /// `swish(norm(x))` in one pass.
    pub fn silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, GROUPS, EPS, true)
    }
}
