//! Low-rank adaptation (LoRA, arXiv 2106.09685): `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` with frozen W (outputs, inputs) and b,
//! trained A (r, inputs) and B (outputs, r), and s = alpha / r.
//!
//! In training the two products stay apart from the layer's own. Their gradients need x and dy only: neither W + s B A nor
//! the gradient of W, which are as large as W, is ever formed. For inference [`merge`] adds s B A to W.
//!
//! Names are those of PEFT below the layer's: `lora_A.weight`, `lora_B.weight`. B starts at zero and A uniform within
//! ±1/√inputs (PEFT's `kaiming_uniform_(a=√5)`), so that the adapted layer starts as the layer alone.

use super::{
    gradients::Gradients,
    params::{Init, Scope},
};
use crate::{
    config::{Lora, Precision},
    error::{Context, Result},
    ops::{
        self,
        epilogue::Epilogue,
        gemm::{Beta, Matrix, gemm},
        linear,
        slices::{self, view},
    },
};
use candle_core::Tensor;
use std::collections::HashMap;

/// Last part of the scope of A and of B, below the name of the adapted layer.
const NAMES: [&str; 2] = ["lora_A", "lora_B"];

/// The low-rank adapter of a linear layer.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Full names of A and B.
    names: [String; 2],
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Adapter {
    /// The adapter of the linear layer in `scope`.
    ///
    /// # Errors
    /// A checkpoint lacks A or B, or holds them in another shape.
    pub fn new(scope: &Scope, [inputs, outputs]: [usize; 2], lora: &Lora) -> Result<Self> {
        let scopes = NAMES.map(|name| scope.at(name));
        let bound = 1.0 / (inputs as f64).sqrt();
        let a = scopes[0].adapter("weight", (lora.rank, inputs), Init::Uniform(bound))?;
        let b = scopes[1].adapter("weight", (outputs, lora.rank), Init::Zeros)?;
        Ok(Self { names: names(scope.name()), a, b, scale: lora.scale() })
    }

    /// x (.., inputs) → s (x Aᵀ) Bᵀ (.., outputs), with the matrix products in `precision`.
    pub fn forward_in(&self, precision: Precision, x: &Tensor) -> Result<Tensor> {
        let low = (ops::linear_in(precision, x, &self.a, None)? * self.scale)?;
        ops::linear_in(precision, &low, &self.b, None)
    }

    /// x (rows, inputs) → s (x Aᵀ) Bᵀ + `residual` (rows, outputs).
    pub fn manual(&self, precision: Precision, x: &[f32], residual: Option<&[f32]>) -> Result<Vec<f32>> {
        let [rows, _, outputs, rank] = self.sizes(x.len())?;
        let (low, epilogue) = (self.low(precision, x)?, Epilogue { residual, ..Epilogue::NONE });
        Ok(linear::forward_in(precision, &low, &view(&self.b)?, [rows, rank, outputs], epilogue))
    }

    /// Adds the gradients of A and B for x (rows, inputs) and dy (rows, outputs): with the low-rank x̂ = s x Aᵀ and
    /// dx̂ = s dy B, these are dB = dyᵀ x̂ and dA = dx̂ᵀ x. Adds the adapter's share dx̂ A to `dx`.
    pub fn manual_backward(
        &self,
        precision: Precision,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let [rows, inputs, outputs, rank] = self.sizes(x.len())?;
        let low = self.low(precision, x)?;
        gradients.accumulate(&self.names[1], self.b.shape(), |db, beta| {
            linear::weight_gradient(precision, db, beta, dy, &low, [rows, rank, outputs]);
        })?;
        let mut dlow = linear::input_gradient(precision, dy, &view(&self.b)?, [rows, rank, outputs]);
        self.scaled(&mut dlow);
        gradients.accumulate(&self.names[0], self.a.shape(), |da, beta| {
            linear::weight_gradient(precision, da, beta, &dlow, x, [rows, inputs, rank]);
        })?;
        slices::add(dx, &linear::input_gradient(precision, &dlow, &view(&self.a)?, [rows, inputs, rank]));
        Ok(())
    }

    /// s x Aᵀ (rows, r).
    fn low(&self, precision: Precision, x: &[f32]) -> Result<Vec<f32>> {
        let [rows, inputs, _, rank] = self.sizes(x.len())?;
        let mut low = linear::forward_in(precision, x, &view(&self.a)?, [rows, inputs, rank], Epilogue::NONE);
        self.scaled(&mut low);
        Ok(low)
    }

    fn scaled(&self, low: &mut [f32]) {
        low.iter_mut().for_each(|x| *x *= self.scale as f32);
    }

    /// Rows of x, inputs, outputs, rank.
    fn sizes(&self, elements: usize) -> Result<[usize; 4]> {
        let ((rank, inputs), outputs) = (self.a.dims2()?, self.b.dim(0)?);
        Ok([elements / inputs, inputs, outputs, rank])
    }
}

/// W + s B A of W (outputs, inputs), A (r, inputs) and B (outputs, r), in f32 with a rounding of the sum alone.
///
/// # Errors
/// The shapes do not fit.
pub fn merge(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let ((outputs, rank), (_, inputs)) = (b.dims2()?, a.dims2()?);
    let double = |tensor: &Tensor| -> Result<Vec<f64>> {
        Ok(ops::with_slice(tensor, |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect())?)
    };
    let (mut sum, a, b) = (double(weight)?, double(a)?, double(b)?);
    gemm(&mut sum, Beta::One, scale, Matrix::new(&b, outputs, rank), Matrix::new(&a, rank, inputs));
    let sum: Vec<f32> = sum.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(sum, weight.shape(), weight.device())?)
}

/// The layer of which `name` is the parameter A.
fn layer_of(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")?.strip_suffix(NAMES[0])?.strip_suffix('.')
}

/// Whether a parameter of this name is the matrix A of an adapter.
pub fn is_a(name: &str) -> bool {
    layer_of(name).is_some()
}

/// Whether a parameter of this name belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    NAMES.iter().any(|part| name.rsplit('.').nth(1) == Some(part))
}

/// The names of A and B of a layer.
pub fn names(layer: &str) -> [String; 2] {
    NAMES.map(|name| format!("{layer}.{name}.weight"))
}

/// Replaces W, A and B of each adapted layer in `weights` by W + s B A.
///
/// # Errors
/// A weight is missing, or the shapes do not fit.
pub fn merge_all(weights: &mut HashMap<String, Tensor>, scale: f64) -> Result<()> {
    let layers: Vec<String> = weights.keys().filter_map(|name| layer_of(name)).map(str::to_owned).collect();
    for layer in layers {
        let mut take = |name: &str| weights.remove(name).with_context(|| format!("there is no `{name}`"));
        let ([a, b], name) = (names(&layer), format!("{layer}.weight"));
        let merged = merge(&take(&name)?, &take(&a)?, &take(&b)?, scale)?;
        weights.insert(name, merged);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
