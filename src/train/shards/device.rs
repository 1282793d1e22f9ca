//! Variables that are copies of the weights: those on a GPU, and rounded ones. They travel as tensors on their device.
//!
//! The weights that the optimizer updates (master weights) are f32, beside its moments: on the host, or with
//! `train.offload = "none"` on the device. After an update, a rank's own are rounded to the type of the variable, on their way
//! to the device or there. Gradients add up on the device; for an update on the host they go there once a step.

use super::{super::layout::length, Piece, Shards};
use crate::{
    error::Result,
    ops::{self, Buffer},
};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// Every rank's part of a unit, in rank order, by type of [`DTYPES`].
pub(super) type Tensors = Vec<Vec<Tensor>>;

/// Types of variables; each has a collective of its own.
const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

impl Shards<'_> {
    /// At stage 3, renews what this rank gives of each unit, on the device.
    pub(super) fn update_device_parts(&mut self) -> Result<()> {
        if self.masters.copied && self.stage == 3 {
            for unit in 0..self.parameter_groups.len() {
                self.parameter_groups[unit].device_part = self.own_copies(unit)?;
            }
        }
        Ok(())
    }

    /// Sends this rank's weights of a unit to all ranks of its replica, on the device.
    pub(super) fn all_gather_tensors(&self, unit: usize) -> Result<Tensors> {
        let ours = match self.parameter_groups[unit].device_part.as_slice() {
            [] => self.own_copies(unit)?,
            part => part.to_vec(),
        };
        let send = |(dtype, ours): (DType, Tensor)| {
            if self.replicated() {
                return Ok(vec![ours]);
            }
            let counts = self.parameter_groups[unit].pieces.iter().map(|pieces| length(self.of_type(pieces, dtype)));
            let counts: Vec<usize> = counts.collect();
            if counts.iter().all(|count| *count == 0) {
                return Ok(Vec::new());
            }
            self.group.all_gather_tensor(&ours, &counts)
        };
        DTYPES.into_iter().zip(ours).map(send).collect()
    }

    /// Sets the variables of a unit to what all ranks sent.
    pub(super) fn take_tensors(&self, unit: usize, parts: &[Vec<Tensor>]) -> Result<()> {
        let mut found: BTreeMap<&str, Vec<Tensor>> = BTreeMap::new();
        for (dtype, parts) in DTYPES.into_iter().zip(parts) {
            for (pieces, part) in self.parameter_groups[unit].pieces.iter().zip(parts) {
                let mut at = 0;
                for Piece { name, range } in self.of_type(pieces, dtype) {
                    found.entry(name).or_default().push(part.narrow(0, at, range.len())?);
                    at += range.len();
                }
            }
        }
        for (name, parts) in found {
            let var = &self.params[name];
            ops::assign(var, &Tensor::cat(&parts, 0)?.reshape(var.shape())?)?;
        }
        Ok(())
    }

    /// What this rank owns of a unit, flat, by type.
    fn own_copies(&self, unit: usize) -> Result<Vec<Tensor>> {
        let ours = &self.parameter_groups[unit].pieces[self.owner];
        DTYPES.into_iter().map(|dtype| self.flat(self.of_type(ours, dtype), dtype)).collect()
    }

    /// The pieces of this type that travel.
    fn of_type<'a>(&'a self, pieces: &'a [Piece], dtype: DType) -> impl Iterator<Item = &'a Piece> {
        pieces.iter().filter(move |piece| self.params[&piece.name].dtype() == dtype && !self.stays(piece))
    }

    /// The weights of these pieces of this rank, concatenated, on the device.
    fn flat<'a>(&self, pieces: impl Iterator<Item = &'a Piece>, dtype: DType) -> Result<Tensor> {
        let (mut floats, mut halves, mut there) = (Vec::new(), Vec::new(), Vec::new());
        for Piece { name, .. } in pieces {
            match (self.masters.weights.get(name), self.masters.rounded.get(name)) {
                (Some(Buffer::Device(weights)), _) => there.push(weights.to_dtype(dtype)?),
                (_, Some(rounded)) => halves.extend_from_slice(rounded),
                _ => self.with_part(name, |weights| floats.extend_from_slice(weights))?,
            }
        }
        if !there.is_empty() {
            return Ok(Tensor::cat(&there, 0)?);
        }
        let flat = match (floats.len(), halves.len()) {
            // A driver has no memory of length zero.
            (0, 0) => return Ok(Tensor::zeros(1, dtype, &self.device)?.narrow(0, 0, 0)?),
            (0, len) => Tensor::from_vec(halves, len, &Device::Cpu)?,
            (len, _) => Tensor::from_vec(floats, len, &Device::Cpu)?,
        };
        Ok(flat.to_dtype(dtype)?.to_device(&self.device)?)
    }

    /// Starts to sum the gradients of these pieces, by rank, over all ranks; there is one at least.
    pub(super) fn reduce_tensors(&self, pieces: &[Vec<Piece>], counts: &[usize]) -> Result<Tensor> {
        let mut flat = Vec::new();
        for Piece { name, range } in pieces.iter().flatten() {
            if let Some(gradient) = self.gradients.get(name) {
                flat.push(gradient.flatten_all()?.narrow(0, range.start, range.len())?);
            }
        }
        let all = Tensor::cat(&flat, 0)?;
        match self.replicated() {
            true => self.group.all_reduce_tensor(&all),
            false => self.group.reduce_scatter_tensor(&all, counts),
        }
    }

    /// Adds the sums of these pieces to those this rank owns, or puts them in place of its own gradients.
    pub(super) fn take_sum_tensor(&mut self, pieces: &[Piece], sums: &Tensor) -> Result<()> {
        let mut at = 0;
        for Piece { name, range } in pieces {
            let part = sums.narrow(0, at, range.len())?;
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
