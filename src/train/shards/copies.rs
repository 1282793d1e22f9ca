//! Variables that are copies of the weights: those on a GPU, and rounded ones. The weights that the optimizer updates lie
//! beside its moments, f32 on the host. A rank's own go to its device when others want them, rounded where the variable
//! is; gradients add up on the device and come to the host once a step, when it updates.

use super::{Piece, Shards, traffic::length};
use crate::{error::Result, ops};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

impl Shards<'_> {
    /// The variables of a unit become what all ranks' weights are now.
    pub(super) fn copy_weights(&self, unit: usize) -> Result<()> {
        if self.replicated() {
            for Piece { name, .. } in self.units[unit].pieces.iter().flatten() {
                let var = &self.params[name];
                ops::assign(var, &self.flat([name].into_iter(), var)?.reshape(var.shape())?)?;
            }
            return Ok(());
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
            let counts: Vec<usize> = pieces.iter().map(|pieces| length(pieces.iter().filter(of))).collect();
            let Some(first) = pieces.iter().flatten().find(of) else { continue };
            let names = pieces[self.group.shard_rank()].iter().filter(of).map(|piece| &piece.name);
            let ours = self.flat(names, &self.params[&first.name])?;
            let (all, mut at) = (self.group.all_gather_tensor(&ours, &counts)?, 0);
            for piece in pieces.iter().flatten().filter(of) {
                parts.entry(&piece.name).or_default().push(all.narrow(0, at, piece.range.len())?);
                at += piece.range.len();
            }
        }
        Ok(parts)
    }

    /// What this rank owns of these parameters, one after another, of the type and on the device of `like`.
    fn flat<'a>(&self, names: impl Iterator<Item = &'a String>, like: &Tensor) -> Result<Tensor> {
        let (mut floats, mut halves) = (Vec::new(), Vec::new());
        for name in names {
            match self.rounded.get(name) {
                Some(rounded) => halves.extend_from_slice(rounded),
                None => self.with_part(name, |weights| floats.extend_from_slice(weights))?,
            }
        }
        let flat = match (floats.len(), halves.len()) {
            // A driver has no memory of length zero.
            (0, 0) => return Ok(Tensor::zeros(1, like.dtype(), like.device())?.narrow(0, 0, 0)?),
            (0, len) => Tensor::from_vec(halves, len, &Device::Cpu)?,
            (len, _) => Tensor::from_vec(floats, len, &Device::Cpu)?,
        };
        Ok(flat.to_dtype(like.dtype())?.to_device(like.device())?)
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
            let counts: Vec<usize> = pieces.iter().map(length).collect();
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
