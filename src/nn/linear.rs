//! Linear layer, `y = x Wᵀ + b`.

use super::{
    gradients::Gradients,
    lora::Adapter,
    params::{Init, Scope},
};
use crate::{
    config::{Activation, Precision},
    error::Result,
    ops::{self, activation, epilogue::Epilogue, linear, slices::view},
};
use candle_core::Tensor;

/// A linear layer with bias; of a frozen base, with or without a low-rank adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    name: String,
    weight: Tensor,
    bias: Tensor,
    frozen: bool,
    adapter: Option<Adapter>,
}

impl Linear {
    /// `weight` (outputs, inputs), normal with `std`; `bias` (outputs), zero.
    pub fn new(scope: &Scope, inputs: usize, outputs: usize, std: f64) -> Result<Self> {
        let weight = scope.get("weight", (outputs, inputs), Init::Normal(std))?;
        Self::of(scope, weight, outputs)
    }

    /// The same for a layer of a transformer block, whose weight is `stacked` matrices ([`Scope::block_matrices`]). It has
    /// a low-rank adapter where the scope's [`Scope::lora`] targets it.
    pub fn in_block(scope: &Scope, [inputs, outputs]: [usize; 2], std: f64, stacked: usize) -> Result<Self> {
        let weight = scope.block_matrices("weight", (outputs, inputs), Init::Normal(std), stacked)?;
        let adapter = scope.lora().filter(|lora| lora.adapts(scope.name()));
        let adapter = adapter.map(|lora| Adapter::new(scope, [inputs, outputs], &lora)).transpose()?;
        Ok(Self { adapter, ..Self::of(scope, weight, outputs)? })
    }

    fn of(scope: &Scope, weight: Tensor, outputs: usize) -> Result<Self> {
        let bias = scope.get("bias", outputs, Init::Zeros)?;
        Ok(Self { name: scope.name().to_owned(), weight, bias, frozen: scope.lora().is_some(), adapter: None })
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
        let y = ops::linear_in(precision, x, &self.weight, Some(&self.bias))?;
        match &self.adapter {
            Some(adapter) => Ok((y + adapter.forward_in(precision, x)?)?),
            None => Ok(y),
        }
    }

    /// The activation of [`Linear::forward_in`].
    pub fn forward_activated(&self, precision: Precision, kind: Activation, x: &Tensor) -> Result<Tensor> {
        match &self.adapter {
            None => ops::linear_activated(kind, precision, x, &self.weight, &self.bias),
            Some(_) => ops::activation(kind, &self.forward_in(precision, x)?),
        }
    }

    /// `x` (rows, inputs) → (rows, outputs), plus `residual` (rows, outputs).
    pub fn manual(&self, precision: Precision, x: &[f32], residual: Option<&[f32]>) -> Result<Vec<f32>> {
        let (weight, bias) = (view(&self.weight)?, view(&self.bias)?);
        let adapted = self.adapted(precision, x, residual)?;
        let epilogue = Epilogue { bias: Some(&bias), residual: adapted.as_deref().or(residual), gelu: None };
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
        let adapted = self.adapted(precision, x, None)?;
        Ok(linear::forward_gelu(precision, x, &weight, &bias, adapted.as_deref(), self.sizes(x.len())?))
    }

    /// What the adapter, if there is one, adds to the output (rows, outputs), plus `residual`.
    fn adapted(&self, precision: Precision, x: &[f32], residual: Option<&[f32]>) -> Result<Option<Vec<f32>>> {
        self.adapter.as_ref().map(|adapter| adapter.manual(precision, x, residual)).transpose()
    }

    /// Adds the gradients of weight and bias, or of the adapter where they are frozen, for x (rows, inputs) and dy (rows,
    /// outputs); returns dx.
    pub fn manual_backward(
        &self,
        precision: Precision,
        x: &[f32],
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let sizes = self.sizes(x.len())?;
        if self.frozen {
            let mut dx = linear::input_gradient(precision, dy, &view(&self.weight)?, sizes);
            if let Some(adapter) = &self.adapter {
                adapter.manual_backward(precision, x, dy, &mut dx, gradients)?;
            }
            return Ok(dx);
        }
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
