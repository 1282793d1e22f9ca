//! Layer normalization (arXiv 1607.06450).

use super::{
    gradients::Gradients,
    params::{Init, Scope},
};
use crate::{
    error::Result,
    ops::{self, layer_norm, slices::view},
};
use candle_core::Tensor;

/// LayerNorm over the last dimension with a learned scale and shift.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    name: String,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// PyTorch's default.
    pub const EPS: f64 = 1e-5;

    /// `weight` (size), initialized to one; `bias` (size), initialized to zero.
    pub fn new(scope: &Scope, size: usize) -> Result<Self> {
        let (weight, bias) = (scope.get("weight", size, Init::Ones)?, scope.get("bias", size, Init::Zeros)?);
        Ok(Self { name: scope.name().to_owned(), weight, bias, eps: Self::EPS })
    }

    /// The same with another number added to the variance.
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    /// The scale, (size).
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The shift, (size).
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// (.., size) → (.., size).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }

    /// x (rows, size) → (rows, size).
    pub fn manual(&self, x: &[f32]) -> Result<Vec<f32>> {
        Ok(layer_norm::forward(x, &view(&self.weight)?, &view(&self.bias)?, self.eps))
    }

    /// Adds the gradients of weight and bias for x and dy (rows, size); returns dx.
    pub fn manual_backward(&self, x: &[f32], dy: &[f32], gradients: &mut Gradients) -> Result<Vec<f32>> {
        let (dx, dweight, dbias) = layer_norm::backward(x, &view(&self.weight)?, dy, self.eps);
        gradients.accumulate_vector(&format!("{}.weight", self.name), dweight)?;
        gradients.accumulate_vector(&format!("{}.bias", self.name), dbias)?;
        Ok(dx)
    }
}
