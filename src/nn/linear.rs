//! Linear layer, `y = x Wᵀ + b`.

use super::{
    gradients::Gradients,
    params::{Init, Scope},
};
use crate::{
    config::{Activation, Precision},
    error::Result,
    ops::{self, activation, epilogue::Epilogue, linear, slices::view},
};
use candle_core::Tensor;

/// A linear layer with bias.
#[derive(Debug, Clone)]
pub struct Linear {
    name: String,
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// `weight` (outputs, inputs), normal with `std`; `bias` (outputs), zero.
    pub fn new(scope: &Scope, inputs: usize, outputs: usize, std: f64) -> Result<Self> {
        let weight = scope.get("weight", (outputs, inputs), Init::Normal(std))?;
        Self::of(scope, weight, outputs)
    }

    /// The same for a layer of a transformer block, whose weight is `stacked` matrices ([`Scope::block_matrices`]).
    pub fn in_block(scope: &Scope, [inputs, outputs]: [usize; 2], std: f64, stacked: usize) -> Result<Self> {
        let weight = scope.block_matrices("weight", (outputs, inputs), Init::Normal(std), stacked)?;
        Self::of(scope, weight, outputs)
    }

    fn of(scope: &Scope, weight: Tensor, outputs: usize) -> Result<Self> {
        let bias = scope.get("bias", outputs, Init::Zeros)?;
        Ok(Self { name: scope.name().to_owned(), weight, bias })
    }

    /// (outputs, inputs)
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// (outputs)
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// Size of the last dimension of what comes out.
    pub fn outputs(&self) -> usize {
        self.bias.elem_count()
    }

    /// (.., inputs) → (.., outputs).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_in(Precision::F32, x)
    }

    /// The same with the matrix product in `precision`.
    pub fn forward_in(&self, precision: Precision, x: &Tensor) -> Result<Tensor> {
        ops::linear_in(precision, x, &self.weight, &self.bias)
    }

    /// `x` (rows, inputs) → (rows, outputs), plus `residual` (rows, outputs).
    pub fn manual(&self, precision: Precision, x: &[f32], residual: Option<&[f32]>) -> Result<Vec<f32>> {
        let (weight, bias) = (view(&self.weight)?, view(&self.bias)?);
        let epilogue = Epilogue { bias: Some(&bias), residual, gelu: None };
        Ok(linear::forward_in(precision, x, &weight, self.sizes(x.len())?, epilogue))
    }

    /// y of `x` (rows, inputs), and the activation of y. GELU is fused with the product.
    pub fn manual_activated(&self, precision: Precision, kind: Activation, x: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        if kind != Activation::Gelu {
            let y = self.manual(precision, x, None)?;
            let activated = activation::forward(kind, &y);
            return Ok((y, activated));
        }
        let (weight, bias) = (view(&self.weight)?, view(&self.bias)?);
        Ok(linear::forward_gelu(precision, x, &weight, &bias, self.sizes(x.len())?))
    }

    /// Adds the gradients of weight and bias for x (rows, inputs) and dy (rows, outputs); returns dx.
    pub fn manual_backward(
        &self,
        precision: Precision,
        x: &[f32],
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let sizes = self.sizes(x.len())?;
        gradients.accumulate(&format!("{}.weight", self.name), self.weight.shape(), |dw, beta| {
            linear::weight_gradient(precision, dw, beta, dy, x, sizes);
        })?;
        gradients.accumulate_vector(&format!("{}.bias", self.name), linear::column_sums(dy, sizes[2]))?;
        Ok(linear::input_gradient(precision, dy, &view(&self.weight)?, sizes))
    }

    /// Number of rows of x, inputs and outputs.
    fn sizes(&self, elements: usize) -> Result<[usize; 3]> {
        let (outputs, inputs) = self.weight.dims2()?;
        Ok([elements / inputs, inputs, outputs])
    }
}
