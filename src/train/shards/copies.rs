//! Variables that are copies of the weights: those on a GPU, and rounded ones. The weights that the optimizer updates lie
//! beside its moments, f32 on the host. A rank's own go to its device when others want them, rounded where the variable
//! is; gradients add up on the device and come to the host once a step, when it updates.

use super::{Piece, Shards};
use crate::{error::Result, ops};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

impl Shards<'_> {
    /// The variables of a unit become what all ranks' weights are now.
    pub(super) fn copy_weights(&self, unit: usize) -> Result<()> {
        if self.replicated() {
            return self.units[unit].pieces.iter().flatten().try_for_each(|piece| {
                ops::replace(&self.params[&piece.name], self.part(&piece.name)?)?;
                Ok(())
            });
        }
        for (name, parts) in self.gather_tensors(unit)? {
            let var = &self.params[name];
            ops::assign(var, &Tensor::cat(&parts, 0)?.reshape(var.shape())?)?;
        }
        Ok(())
    }

    /// A unit's parameters, each in the parts that its owners have.
    fn gather_tensors(&self, unit: usize) -> Result<BTreeMap<&str, Vec<Tensor>>> {
        let (pieces, mut parts) = (&self.units[unit].pieces, BTreeMap::<&str, Vec<Tensor>>::new());
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let of = |piece: &&Piece| self.params[&piece.name].dtype() == dtype;
            let counts = pieces.iter().map(|pieces| length(pieces.iter().filter(of)));
            let counts: Vec<usize> = counts.collect();
            let Some(first) = pieces.iter().flatten().find(of) else { continue };
            let mut ours = Vec::new();
            for piece in pieces[self.group.shard_rank()].iter().filter(of) {
                self.with_part(&piece.name, |weights| ours.extend_from_slice(weights))?;
            }
            let ours = there(ours, dtype, &self.params[&first.name])?;
            let (all, mut at) = (self.group.all_gather_tensor(&ours, &counts)?, 0);
            for piece in pieces.iter().flatten().filter(of) {
                parts.entry(&piece.name).or_default().push(all.narrow(0, at, piece.range.len())?);
                at += piece.range.len();
            }
        }
        Ok(parts)
    }

    /// A unit's gradients are summed over all ranks, to where their owners add them up.
    pub(super) fn sum_tensors(&mut self, unit: usize) -> Result<()> {
        self.units[unit].sent = true;
        let pieces = self.live(unit);
        let mut flat = Vec::new();
        for Piece { name, range } in pieces.iter().flatten() {
            if let Some(gradient) = self.gradients.get(name) {
                flat.push(gradient.flatten_all()?.narrow(0, range.start, range.len())?);
            }
        }
        if flat.is_empty() {
            return Ok(());
        }
        let all = Tensor::cat(&flat, 0)?;
        let (ours, sum) = if self.replicated() {
            (&pieces[0], self.group.all_reduce_tensor(&all)?)
        } else {
            let counts: Vec<usize> = pieces.iter().map(|pieces| length(pieces.iter())).collect();
            (&pieces[self.group.shard_rank()], self.group.reduce_scatter_tensor(&all, &counts)?)
        };
        let mut at = 0;
        for Piece { name, range } in ours {
            let part = sum.narrow(0, at, range.len())?;
            at += range.len();
            if self.replicated() {
                self.gradients.free(name);
                self.gradients.add(name, part.reshape(self.params[name].shape())?)?;
            } else {
                self.sums.add(name, part)?;
            }
        }
        Ok(())
    }
}

fn length<'a>(pieces: impl Iterator<Item = &'a Piece>) -> usize {
    pieces.map(|piece| piece.range.len()).sum()
}

/// Weights as a flat tensor of this type where the variable is. A driver has no memory of length zero.
fn there(weights: Vec<f32>, dtype: DType, var: &Tensor) -> Result<Tensor> {
    let len = weights.len();
    if len == 0 {
        return Ok(Tensor::zeros(1, dtype, var.device())?.narrow(0, 0, 0)?);
    }
    let rounded = Tensor::from_vec(weights, len, &candle_core::Device::Cpu)?.to_dtype(dtype)?;
    Ok(rounded.to_device(var.device())?)
}
