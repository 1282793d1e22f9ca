//! The transformer block with hand-written forward and backward passes over slices, for the CPU.
//!
//! Values that are cheap to recompute are not saved: the backward pass runs norms and activations again, and attention
//! recomputes its probabilities. Saved are qkv, the output of attention, the residual stream between the branches and
//! the MLP's hidden layer before the activation. A test compares the pass with [`Block::forward`] under candle's autograd.

use super::{block::Block, gradients::Gradients, mlp_manual::ManualMlp, norm::LayerNorm};
use crate::{
    config::Precision,
    error::Result,
    ops::{
        attention::{self, KeyRanges, Sizes},
        slices,
    },
};

/// Activations saved for the backward pass, beside the block's input; l positions in all.
pub struct Activations {
    /// (l, 3, heads, d), before the norms of queries and keys.
    qkv: Vec<f32>,
    /// (l, hidden)
    attended: Vec<f32>,
    /// Log-sum-exp of each query's scores, (samples, heads, positions).
    log_sums: Vec<f32>,
    /// The attention branch before its last norm, if it has one.
    branch1: Option<Vec<f32>>,
    /// The residual stream between the two branches.
    middle: Vec<f32>,
    /// (l, mlp_ratio · hidden), before the activation.
    inner: Vec<f32>,
    /// The second branch before its last norm, if it has one.
    branch2: Option<Vec<f32>>,
}

impl Block {
    /// x (l, hidden) → (l, hidden), and what the backward pass needs; linear layers compute in `precision`.
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
        let qkv = self.layers.qkv.manual(precision, &self.layers.norm1.manual(x)?, None)?;
        let normed = self.normed_manual(&qkv, sizes)?;
        let (attended, log_sums) = attention::forward_saved(normed.as_deref().unwrap_or(&qkv), keys, sizes);
        let (norm1_post, norm2_post) = self.layers.post.as_ref().map(|(a, b)| (a, b)).unzip();
        let residual = norm1_post.is_none().then_some(x);
        let (middle, branch1) = close(self.layers.proj.manual(precision, &attended, residual)?, norm1_post, x)?;
        let residual = norm2_post.is_none().then_some(middle.as_slice());
        let (branch, inner) = self.mlp(precision).forward(self.layers.norm2.manual(&middle)?, residual)?;
        let (y, branch2) = close(branch, norm2_post, &middle)?;
        Ok((y, Activations { qkv, attended, log_sums, branch1, middle, inner, branch2 }))
    }

    /// Adds the parameters' gradients and returns dx (l, hidden).
    pub fn manual_backward(
        &self,
        precision: Precision,
        x: &[f32],
        (keys, sizes): (&KeyRanges, Sizes),
        saved: Activations,
        dy: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Activations { qkv, attended, log_sums, branch1, middle, inner, branch2 } = saved;
        let (norm1_post, norm2_post) = self.layers.post.as_ref().map(|(a, b)| (a, b)).unzip();

        let dbranch = open(norm2_post, branch2, dy, gradients)?;
        let dbranch = dbranch.as_deref().unwrap_or(dy);
        let normed = || self.layers.norm2.manual(&middle);
        let dnormed = self.mlp(precision).backward(normed, inner, dbranch, gradients)?;
        let mut dmiddle = self.layers.norm2.manual_backward(&middle, &dnormed, gradients)?;
        slices::add(&mut dmiddle, dy);
        drop((middle, dnormed));

        let dbranch = open(norm1_post, branch1, &dmiddle, gradients)?;
        let dbranch = dbranch.as_deref().unwrap_or(&dmiddle);
        let dattended = self.layers.proj.manual_backward(precision, &attended, dbranch, gradients)?;
        let normed = self.normed_manual(&qkv, sizes)?;
        let (saved, queried) = ((attended.as_slice(), log_sums.as_slice()), normed.as_deref().unwrap_or(&qkv));
        let dqkv = attention::backward_saved(queried, saved, &dattended, keys, sizes);
        let dqkv = self.normed_backward(&qkv, dqkv, sizes, gradients)?;
        drop((qkv, normed, attended, dattended));
        let dnormed = self.layers.qkv.manual_backward(precision, &self.layers.norm1.manual(x)?, &dqkv, gradients)?;
        drop(dqkv);
        let mut dx = self.layers.norm1.manual_backward(x, &dnormed, gradients)?;
        slices::add(&mut dx, &dmiddle);
        Ok(dx)
    }

    fn mlp(&self, precision: Precision) -> ManualMlp<'_> {
        ManualMlp::of(&self.layers, self.activation, precision)
    }

    /// qkv with its queries and keys normed, where the block does that.
    fn normed_manual(&self, qkv: &[f32], sizes: Sizes) -> Result<Option<Vec<f32>>> {
        let Some((q_norm, k_norm)) = &self.layers.qk_norm else { return Ok(None) };
        let mut normed = qkv.to_vec();
        for (part, norm) in [q_norm, k_norm].into_iter().enumerate() {
            put_part(&mut normed, &norm.manual(&take_part(qkv, part, sizes))?, part, sizes);
        }
        Ok(Some(normed))
    }

    /// dqkv, from the gradient of the normed one.
    fn normed_backward(
        &self,
        qkv: &[f32],
        mut dqkv: Vec<f32>,
        sizes: Sizes,
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Some((q_norm, k_norm)) = &self.layers.qk_norm else { return Ok(dqkv) };
        for (part, norm) in [q_norm, k_norm].into_iter().enumerate() {
            let dy = take_part(&dqkv, part, sizes);
            let dx = norm.manual_backward(&take_part(qkv, part, sizes), &dy, gradients)?;
            put_part(&mut dqkv, &dx, part, sizes);
        }
        Ok(dqkv)
    }
}

/// The end of a residual branch: the stream behind it, and the branch where its norm will need it again.
fn close(branch: Vec<f32>, norm: Option<&LayerNorm>, stream: &[f32]) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
    let Some(norm) = norm else { return Ok((branch, None)) };
    let mut y = norm.manual(&branch)?;
    slices::add(&mut y, stream);
    Ok((y, Some(branch)))
}

/// The gradient of a branch before its last norm, if it has one.
fn open(
    norm: Option<&LayerNorm>,
    branch: Option<Vec<f32>>,
    dy: &[f32],
    gradients: &mut Gradients,
) -> Result<Option<Vec<f32>>> {
    norm.zip(branch).map(|(norm, branch)| norm.manual_backward(&branch, dy, gradients)).transpose()
}

/// Queries (0) or keys (1) of qkv (l, 3, heads, d) as (l, heads, d).
fn take_part(qkv: &[f32], part: usize, sizes: Sizes) -> Vec<f32> {
    let hidden = sizes.heads * sizes.d;
    qkv.chunks_exact(3 * hidden).flat_map(|row| &row[part * hidden..][..hidden]).copied().collect()
}

fn put_part(qkv: &mut [f32], values: &[f32], part: usize, sizes: Sizes) {
    let hidden = sizes.heads * sizes.d;
    for (row, values) in qkv.chunks_exact_mut(3 * hidden).zip(values.chunks_exact(hidden)) {
        row[part * hidden..][..hidden].copy_from_slice(values);
    }
}
