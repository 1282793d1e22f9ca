//! The transformer block.

use super::{
    cache::{Cache, Place},
    linear::Linear,
    norm::LayerNorm,
    params::Scope,
};
use crate::{
    config::{self, Precision},
    error::{Result, ensure},
    ops::{self, attention::KeyRanges},
};
use candle_core::Tensor;
use std::sync::Arc;

/// A pre-LN block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))`.
pub struct Block {
    pub(super) norm1: LayerNorm,
    pub(super) qkv: Linear,
    pub(super) proj: Linear,
    /// LayerNorms on each head's queries and keys, shared by the heads (arXiv 2405.09818).
    pub(super) qk_norm: Option<(LayerNorm, LayerNorm)>,
    pub(super) norm2: LayerNorm,
    pub(super) fc1: Linear,
    pub(super) fc2: Linear,
    /// LayerNorms at the end of the two residual branches (sandwich-LN, arXiv 2105.13290).
    pub(super) post: Option<(LayerNorm, LayerNorm)>,
    heads: usize,
}

impl Block {
    pub fn new(scope: &Scope, model: &config::Model) -> Result<Self> {
        let config::Model { hidden, heads, layers, mlp_ratio, .. } = *model;
        ensure!(heads > 0 && hidden % heads == 0, "hidden size {hidden} is not a multiple of {heads} heads");
        let (attention, mlp) = (scope.at("attention"), scope.at("mlp"));
        let inner = hidden * mlp_ratio;
        // Branches that write into the residual stream start smaller, so that its variance does not grow with depth.
        let (std, residual_std) = (0.02, 0.02 / (2.0 * layers as f64).sqrt());
        let norm = |scope: &Scope, name: &str, size| LayerNorm::new(&scope.at(name), size);
        let head = hidden / heads;
        Ok(Self {
            norm1: norm(scope, "norm1", hidden)?,
            qkv: Linear::with_matmul_weight(&attention.at("qkv"), hidden, 3 * hidden, std)?,
            proj: Linear::with_matmul_weight(&attention.at("proj"), hidden, hidden, residual_std)?,
            qk_norm: match model.qk_norm {
                true => Some((norm(&attention, "q_norm", head)?, norm(&attention, "k_norm", head)?)),
                false => None,
            },
            norm2: norm(scope, "norm2", hidden)?,
            fc1: Linear::with_matmul_weight(&mlp.at("fc1"), hidden, inner, std)?,
            fc2: Linear::with_matmul_weight(&mlp.at("fc2"), inner, hidden, residual_std)?,
            post: match model.sandwich_norm {
                true => Some((norm(scope, "norm1_post", hidden)?, norm(scope, "norm2_post", hidden)?)),
                false => None,
            },
            heads,
        })
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
        let qkv = self.qkv.forward_in(precision, &self.norm1.forward(x)?)?;
        let qkv = self.normed(qkv.reshape((b, l, 3, self.heads, hidden / self.heads))?)?;
        let mut branch = self.proj.forward_in(precision, &attend(&qkv)?)?;
        if let Some((post, _)) = &self.post {
            branch = post.forward(&branch)?;
        }
        let x = (x + branch)?;
        let mut branch = self.fc1.forward_in(precision, &self.norm2.forward(&x)?)?;
        branch = self.fc2.forward_in(precision, &ops::gelu(&branch)?)?;
        if let Some((_, post)) = &self.post {
            branch = post.forward(&branch)?;
        }
        Ok((x + branch)?)
    }

    fn normed(&self, qkv: Tensor) -> Result<Tensor> {
        let Some((q_norm, k_norm)) = &self.qk_norm else { return Ok(qkv) };
        let part = |i| qkv.narrow(2, i, 1)?.contiguous();
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        Ok(Tensor::cat(&[q_norm.forward(&q)?, k_norm.forward(&k)?, v], 2)?)
    }
}
