//! The transformer block.

use super::{
    cache::{Cache, Place},
    linear::Linear,
    norm::LayerNorm,
    params::Scope,
};
use crate::{
    config::{self, Activation, Precision},
    error::{Result, ensure},
    ops::{self, attention::KeyRanges},
};
use candle_core::Tensor;
use std::sync::Arc;

/// The layers of a pre-LN block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))`. This is the one description of
/// a block; `N` is a LayerNorm and `L` a linear layer, as sizes, as parameters or packed for decoding.
pub struct BlockLayers<N, L> {
    pub norm1: N,
    pub qkv: L,
    pub proj: L,
    /// LayerNorms on each head's queries and keys, shared by the heads (arXiv 2405.09818).
    pub qk_norm: Option<(N, N)>,
    pub norm2: N,
    pub fc1: L,
    pub fc2: L,
    /// LayerNorms at the end of the two residual branches (sandwich-LN, arXiv 2105.13290).
    pub post: Option<(N, N)>,
}

/// The size of a linear layer.
#[derive(Debug, Clone, Copy)]
pub struct LinearSize {
    pub inputs: usize,
    pub outputs: usize,
    /// Matrices that its weight consists of.
    pub stacked: usize,
    /// Whether it writes into the residual stream.
    pub residual: bool,
}

impl LinearSize {
    /// Elements of its weight.
    pub fn weight(&self) -> usize {
        self.inputs * self.outputs
    }
}

impl BlockLayers<usize, LinearSize> {
    /// The sizes of each block of this model.
    pub fn of(model: &config::Model) -> Self {
        let config::Model { hidden, heads, mlp_ratio, .. } = *model;
        let inner = hidden * mlp_ratio;
        let head = hidden / heads.max(1);
        let linear = |inputs, outputs| LinearSize { inputs, outputs, stacked: 1, residual: false };
        Self {
            norm1: hidden,
            qkv: LinearSize { stacked: 3, ..linear(hidden, 3 * hidden) },
            proj: LinearSize { residual: true, ..linear(hidden, hidden) },
            qk_norm: model.qk_norm.then_some((head, head)),
            norm2: hidden,
            fc1: linear(hidden, inner),
            fc2: LinearSize { residual: true, ..linear(inner, hidden) },
            post: model.sandwich_norm.then_some((hidden, hidden)),
        }
    }
}

impl<N, L> BlockLayers<N, L> {
    /// The same layers in another form; both functions also get the layer's name within the block.
    ///
    /// # Errors
    /// Those of the functions.
    pub fn try_map<M, K>(
        &self,
        norm: impl Fn(&str, &N) -> Result<M>,
        linear: impl Fn(&str, &L) -> Result<K>,
    ) -> Result<BlockLayers<M, K>> {
        let norms = |names: [&str; 2], norms: &Option<(N, N)>| -> Result<Option<(M, M)>> {
            norms.as_ref().map(|(a, b)| Ok((norm(names[0], a)?, norm(names[1], b)?))).transpose()
        };
        Ok(BlockLayers {
            norm1: norm("norm1", &self.norm1)?,
            qkv: linear("attention.qkv", &self.qkv)?,
            proj: linear("attention.proj", &self.proj)?,
            qk_norm: norms(["attention.q_norm", "attention.k_norm"], &self.qk_norm)?,
            norm2: norm("norm2", &self.norm2)?,
            fc1: linear("mlp.fc1", &self.fc1)?,
            fc2: linear("mlp.fc2", &self.fc2)?,
            post: norms(["norm1_post", "norm2_post"], &self.post)?,
        })
    }

    /// The linear layers in the order of the forward pass.
    pub fn linears(&self) -> [&L; 4] {
        [&self.qkv, &self.proj, &self.fc1, &self.fc2]
    }
}

/// A transformer block with its parameters.
pub struct Block {
    pub layers: BlockLayers<LayerNorm, Linear>,
    heads: usize,
    pub(super) activation: Activation,
}

impl Block {
    /// # Errors
    /// The hidden size is not a multiple of the heads, or a checkpoint lacks a parameter.
    pub fn new(scope: &Scope, model: &config::Model) -> Result<Self> {
        Self::with_std(scope, model, 0.02)
    }

    /// The same with fresh weights of this standard deviation.
    ///
    /// # Errors
    /// As [`Block::new`].
    pub fn with_std(scope: &Scope, model: &config::Model, std: f64) -> Result<Self> {
        let config::Model { hidden, heads, layers, .. } = *model;
        ensure!(heads > 0 && hidden % heads == 0, "hidden size {hidden} is not a multiple of {heads} heads");
        // Branches that write into the residual stream start smaller, so that its variance does not grow with depth.
        let residual_std = std / (2.0 * layers as f64).sqrt();
        let layers = BlockLayers::of(model).try_map(
            |name, size| LayerNorm::new(&scope.at(name), *size),
            |name, size| {
                let std = if size.residual { residual_std } else { std };
                Linear::in_block(&scope.at(name), [size.inputs, size.outputs], std, size.stacked)
            },
        )?;
        Ok(Self { layers, heads, activation: Activation::Gelu })
    }

    /// The same with another activation than GELU.
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// Attention heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Whole sequences: x (b, l, hidden) → (b, l, hidden), with linear layers in `precision`.
    pub fn forward(&self, precision: Precision, x: &Tensor, keys: &Arc<KeyRanges>) -> Result<Tensor> {
        self.forward_with(precision, x, |qkv| ops::attention(qkv, keys))
    }

    /// The source of sequences that are about to be decoded; its keys and values go into `cache`.
    pub fn prefill(&self, x: &Tensor, keys: &Arc<KeyRanges>, cache: &mut Cache) -> Result<Tensor> {
        self.forward_with(Precision::F32, x, |qkv| {
            cache.fill(qkv)?;
            ops::attention(qkv, keys)
        })
    }

    /// One more position of each sequence: x (b, 1, hidden) → (b, 1, hidden).
    pub fn step(&self, x: &Tensor, place: Place, cache: &mut Cache) -> Result<Tensor> {
        self.forward_with(Precision::F32, x, |qkv| cache.attend(qkv, place))
    }

    /// The block around any implementation of attention: qkv (b, l, 3, heads, d) → (b, l, hidden).
    pub fn forward_with(
        &self,
        precision: Precision,
        x: &Tensor,
        attend: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (b, l, hidden) = x.dims3()?;
        let qkv = self.layers.qkv.forward_in(precision, &self.layers.norm1.forward(x)?)?;
        let qkv = self.normed(qkv.reshape((b, l, 3, self.heads, hidden / self.heads))?)?;
        let mut branch = self.layers.proj.forward_in(precision, &attend(&qkv)?)?;
        if let Some((post, _)) = &self.layers.post {
            branch = post.forward(&branch)?;
        }
        let x = (x + branch)?;
        let inner = self.layers.fc1.forward_activated(precision, self.activation, &self.layers.norm2.forward(&x)?)?;
        let mut branch = self.layers.fc2.forward_in(precision, &inner)?;
        if let Some((_, post)) = &self.layers.post {
            branch = post.forward(&branch)?;
        }
        Ok((x + branch)?)
    }

    fn normed(&self, qkv: Tensor) -> Result<Tensor> {
        let Some((q_norm, k_norm)) = &self.layers.qk_norm else { return Ok(qkv) };
        let part = |i| qkv.narrow(2, i, 1)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        Ok(Tensor::cat(&[q_norm.forward(&q)?, k_norm.forward(&k)?, v], 2)?)
    }
}
