//! Layer normalisation.

use super::params::{Init, Scope};
use crate::{error::Result, ops};
use candle_core::Tensor;

/// LayerNorm over the last dimension with a learned scale and shift.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// PyTorch's default.
    pub const EPS: f64 = 1e-5;

    /// `weight` (size), one; `bias` (size), zero.
    pub fn new(scope: &Scope, size: usize) -> Result<Self> {
        Ok(Self { weight: scope.get("weight", size, Init::Ones)?, bias: scope.get("bias", size, Init::Zeros)? })
    }

    /// (.., size) → (.., size).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, Self::EPS)
    }
}
