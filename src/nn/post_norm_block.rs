//! The transformer block of BERT, with the norm behind each residual branch (post-LN): as candle ops, and with
//! hand-written forward and backward passes over slices for the CPU, which a test holds equal.

use super::{
    block::BlockLayers, gradients::Gradients, linear::Linear, mlp_manual::ManualMlp, norm::LayerNorm, params::Scope,
};
use crate::{
    config::{self, Activation, Precision},
    error::{Result, ensure},
    ops::{
        self,
        attention::{self, KeyRanges, Sizes},
        slices,
    },
};
use candle_core::Tensor;
use std::sync::Arc;

/// BERT adds this to the variance.
const EPS: f64 = 1e-12;

/// `x ← norm1(x + attention(x))`, then `x ← norm2(x + mlp(x))`, with the layers and names of a [`Block`](super::block::Block).
pub struct PostNormBlock {
    layers: BlockLayers<LayerNorm, Linear>,
    heads: usize,
    activation: Activation,
}

/// Activations saved for the backward pass, beside the block's input; l positions in all.
pub struct Activations {
    /// (l, 3, heads, d)
    qkv: Vec<f32>,
    /// (l, hidden)
    attended: Vec<f32>,
    /// Log-sum-exp of each query's scores, (samples, heads, positions).
    log_sums: Vec<f32>,
    /// Inputs of the two norms, (l, hidden) each.
    sums: [Vec<f32>; 2],
    /// (l, 4 · hidden), before the activation.
    inner: Vec<f32>,
}

impl PostNormBlock {
    /// Fresh weights have the standard deviation `std`.
    ///
    /// # Errors
    /// The hidden size is not a multiple of the heads, or a checkpoint lacks a parameter.
    pub fn new(scope: &Scope, model: &config::Model, activation: Activation, std: f64) -> Result<Self> {
        let config::Model { hidden, heads, .. } = *model;
        ensure!(heads > 0 && hidden % heads == 0, "hidden size {hidden} is not a multiple of {heads} heads");
        let layers = BlockLayers::of(model).try_map(
            |name, size| Ok(LayerNorm::new(&scope.at(name), *size)?.with_eps(EPS)),
            |name, size| Linear::in_block(&scope.at(name), [size.inputs, size.outputs], std, size.stacked),
        )?;
        Ok(Self { layers, heads, activation })
    }

    /// Attention heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// x (b, l, hidden) → (b, l, hidden), with linear layers in `precision`.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn forward(&self, precision: Precision, x: &Tensor, keys: &Arc<KeyRanges>) -> Result<Tensor> {
        let (b, l, hidden) = x.dims3()?;
        let qkv = self.layers.qkv.forward_in(precision, x)?.reshape((b, l, 3, self.heads, hidden / self.heads))?;
        let branch = self.layers.proj.forward_in(precision, &ops::attention(&qkv, keys)?)?;
        let x = self.layers.norm1.forward(&(x + branch)?)?;
        let inner = self.layers.fc1.forward_activated(precision, self.activation, &x)?;
        let branch = self.layers.fc2.forward_in(precision, &inner)?;
        self.layers.norm2.forward(&(x + branch)?)
    }

    /// x (l, hidden) → (l, hidden), and what the backward pass needs.
    ///
    /// # Errors
    /// A parameter is not f32 in memory of the CPU.
    pub fn manual(
        &self,
        precision: Precision,
        x: &[f32],
        keys: &KeyRanges,
        sizes: Sizes,
    ) -> Result<(Vec<f32>, Activations)> {
        let qkv = self.layers.qkv.manual(precision, x, None)?;
        let (attended, log_sums) = attention::forward_saved(&qkv, keys, sizes);
        let sum1 = self.layers.proj.manual(precision, &attended, Some(x))?;
        let middle = self.layers.norm1.manual(&sum1)?;
        let (sum2, inner) = self.mlp(precision).forward(&middle, Some(&middle))?;
        let y = self.layers.norm2.manual(&sum2)?;
        Ok((y, Activations { qkv, attended, log_sums, sums: [sum1, sum2], inner }))
    }

    /// Adds the parameters' gradients and returns dx (l, hidden).
    ///
    /// # Errors
    /// As [`PostNormBlock::manual`].
    pub fn manual_backward(
        &self,
        precision: Precision,
        x: &[f32],
        (keys, sizes): (&KeyRanges, Sizes),
        saved: Activations,
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Activations { qkv, attended, log_sums, sums: [sum1, sum2], inner } = saved;
        let layers = &self.layers;
        let dsum2 = layers.norm2.manual_backward(&sum2, dy, gradients)?;
        drop(sum2);
        let middle = || layers.norm1.manual(&sum1);
        let mut dmiddle = self.mlp(precision).backward(middle, inner, &dsum2, gradients)?;
        slices::add(&mut dmiddle, &dsum2);
        let dsum1 = layers.norm1.manual_backward(&sum1, &dmiddle, gradients)?;
        drop((sum1, dmiddle, dsum2));
        let dattended = layers.proj.manual_backward(precision, &attended, &dsum1, gradients)?;
        let dqkv = attention::backward_saved(&qkv, (&attended, &log_sums), &dattended, keys, sizes);
        let mut dx = layers.qkv.manual_backward(precision, x, &dqkv, gradients)?;
        slices::add(&mut dx, &dsum1);
        Ok(dx)
    }

    fn mlp(&self, precision: Precision) -> ManualMlp<'_> {
        ManualMlp::of(&self.layers, self.activation, precision)
    }
}
