//! `y = x Wᵀ + b`.

use super::params::{Init, Scope};
use crate::{error::Result, ops};
use candle_core::Tensor;

/// A linear layer with bias.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// `weight` (outputs, inputs), normal with `std`; `bias` (outputs), zero.
    pub fn new(scope: &Scope, inputs: usize, outputs: usize, std: f64) -> Result<Self> {
        let weight = scope.get("weight", (outputs, inputs), Init::Normal(std))?;
        let bias = scope.get("bias", outputs, Init::Zeros)?;
        Ok(Self { weight, bias })
    }

    /// (.., inputs) → (.., outputs).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, Some(&self.bias))
    }
}
