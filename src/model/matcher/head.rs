//! The head of an encoder: the first position, projected and L2-normalized.

use super::Input;
use crate::{
    config::Precision,
    error::{Context, Result},
    nn::{
        gradients::Gradients,
        norm::LayerNorm,
        params::{Init, Params, Scope},
        segment::{Autograd, Saved, Segment},
    },
    ops::{self, epilogue::Epilogue, linear, simd::Real, slices::view},
};
use candle_core::{D, Tensor};
use rayon::prelude::*;

/// The last segment of an encoder.
pub struct Head {
    norm: Option<LayerNorm>,
    /// (embedding, hidden)
    proj: Tensor,
    /// Name of the encoder's scope.
    prefix: String,
    name: String,
    params: Params,
}

/// Smallest length that is divided by.
const MIN_LENGTH: f32 = 1e-12;

impl Head {
    /// `norm`: whether the position is normed first.
    pub fn new(scope: &Scope, hidden: usize, embedding: usize, norm: bool) -> Result<Self> {
        let before = scope.params();
        let norm = norm.then(|| LayerNorm::new(&scope.at("norm"), hidden)).transpose()?;
        let proj = scope.get("proj", (embedding, hidden), Init::Normal((hidden as f64).powf(-0.5)))?;
        let mut params = scope.params();
        params.retain(|name, _| !before.contains_key(name));
        Ok(Self { norm, proj, prefix: scope.name().to_owned(), name: format!("{}.head", scope.name()), params })
    }
}

impl Autograd<Input> for Head {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// (b, positions, hidden) → (b, embedding) of length 1.
    fn autograd(&self, x: &Tensor, _: &Input) -> Result<Tensor> {
        let mut first = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        if let Some(norm) = &self.norm {
            first = norm.forward(&first)?;
        }
        let y = ops::linear(&first, &self.proj, None)?;
        l2_normalized(&y)
    }
}

/// Rows (b, embedding) of length 1.
pub(super) fn l2_normalized(y: &Tensor) -> Result<Tensor> {
    let length = y.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(f64::from(MIN_LENGTH))?;
    Ok(y.broadcast_div(&length)?)
}

/// The first of `embeddings` (b, `width`) that could not be normalized: numbers that overflow in an encoder become NaN or
/// zeros.
pub fn unnormalized<T: Real>(embeddings: &[T], width: usize) -> Option<usize> {
    let square = |row: &[T]| row.iter().map(|value| value.to_f64().powi(2)).sum::<f64>();
    embeddings.chunks_exact(width.max(1)).position(|row| !(0.9..1.1).contains(&square(row)))
}

/// [`Head`] with hand-written gradients, computed in `precision`.
pub struct ManualHead<'a> {
    pub head: &'a Head,
    pub precision: Precision,
}

/// Saved for the backward pass.
struct Activations {
    /// First positions, (b, hidden).
    first: Vec<f32>,
    /// Embeddings before normalization, (b, embedding).
    embedding: Vec<f32>,
}

impl ManualHead<'_> {
    fn normed(&self, first: &[f32]) -> Result<Option<Vec<f32>>> {
        self.head.norm.as_ref().map(|norm| norm.manual(first)).transpose()
    }
}

impl Segment<Input> for ManualHead<'_> {
    fn name(&self) -> &str {
        &self.head.name
    }

    fn params(&self) -> &Params {
        &self.head.params
    }

    fn forward(&self, x: &Tensor, _: &Input) -> Result<(Tensor, Saved)> {
        let (b, positions, hidden) = x.dims3()?;
        let outputs = self.head.proj.dim(0)?;
        let first: Vec<f32> =
            view::<f32>(x)?.chunks_exact(positions * hidden).flat_map(|sample| &sample[..hidden]).copied().collect();
        let normed = self.normed(&first)?;
        let input = normed.as_deref().unwrap_or(&first);
        let sizes = [b, hidden, outputs];
        let embedding = linear::forward_in(self.precision, input, &view(&self.head.proj)?, sizes, Epilogue::NONE);
        let mut y = embedding.clone();
        y.par_chunks_exact_mut(outputs).for_each(|row| {
            let length = length(row);
            row.iter_mut().for_each(|value| *value /= length);
        });
        Ok((Tensor::from_vec(y, (b, outputs), x.device())?, Box::new(Activations { first, embedding })))
    }

    fn backward(
        &self,
        x: &Tensor,
        _: &Input,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let saved = saved.downcast::<Activations>().ok().context("the saved state belongs to another segment")?;
        let Activations { first, embedding } = *saved;
        let (b, positions, hidden) = x.dims3()?;
        let outputs = self.head.proj.dim(0)?;
        // y = z / |z|: dz = (dy - y (y · dy)) / |z|.
        let mut dz: Vec<f32> = view::<f32>(&dy.context("the head's gradient comes from the loss")?)?.to_vec();
        dz.par_chunks_exact_mut(outputs).zip(embedding.par_chunks_exact(outputs)).for_each(|(dz, z)| {
            let length = length(z);
            let along = z.iter().zip(dz.iter()).map(|(z, dy)| z * dy).sum::<f32>() / (length * length);
            dz.iter_mut().zip(z).for_each(|(dz, z)| *dz = (*dz - z * along) / length);
        });
        let sizes = [b, hidden, outputs];
        let normed = self.normed(&first)?;
        let input = normed.as_deref().unwrap_or(&first);
        gradients.accumulate(&format!("{}.proj", self.head.prefix), self.head.proj.shape(), |dw, beta| {
            linear::weight_gradient(self.precision, dw, beta, &dz, input, sizes);
        })?;
        let mut dfirst = linear::input_gradient(self.precision, &dz, &view(&self.head.proj)?, sizes);
        if let Some(norm) = &self.head.norm {
            dfirst = norm.manual_backward(&first, &dfirst, gradients)?;
        }
        let mut dx = vec![0.0; b * positions * hidden];
        for (dx, dfirst) in dx.chunks_exact_mut(positions * hidden).zip(dfirst.chunks_exact(hidden)) {
            dx[..hidden].copy_from_slice(dfirst);
        }
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

fn length(row: &[f32]) -> f32 {
    row.iter().map(|value| value * value).sum::<f32>().sqrt().max(MIN_LENGTH)
}
