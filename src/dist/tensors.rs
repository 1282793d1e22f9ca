//! Collectives of tensors on devices. NCCL sends them from device to device; without NCCL they are sent as floats
//! through the host, as in tests on the CPU.

use super::{
    Group,
    call::{Among, Call, Op},
    nccl::Nccl,
};
use crate::error::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use std::sync::{Mutex, PoisonError};

impl Group {
    /// The flat tensors of all ranks of this shard group, in rank order; rank r contributes `counts[r]` elements. With
    /// NCCL this returns before the transfer ends: kernels that read the tensors wait on the device.
    ///
    /// # Errors
    /// A tensor has another length than `counts` says, or a rank times out.
    pub fn all_gather_tensor(&self, ours: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
        let Some(nccl) = self.wire.nccl.get() else {
            let parts = self.all_gather(floats(ours)?, counts)?.wait()?;
            return parts.iter().map(|part| like(ours, part.to_vec())).collect();
        };
        let expected = self.count(counts)?;
        ensure!(ours.elem_count() == expected, "all_gather: {} elements instead of {expected}", ours.elem_count());
        let call = self.call(Op::AllGather, counts.iter().sum());
        match PaddedParts::of(counts) {
            PaddedParts::Equal(padded_length) => {
                let ours = padded(ours, padded_length)?;
                let all = self.on_device(nccl, call, |nccl| nccl.all_gather(Among::Shards, &ours))?;
                counts
                    .iter()
                    .enumerate()
                    .map(|(rank, count)| Ok(all.narrow(0, rank * padded_length, *count)?))
                    .collect()
            }
            PaddedParts::Own => self.on_device(nccl, call, |nccl| nccl.broadcasts(Among::Shards, ours, counts)),
        }
    }

    /// [`Group::reduce_scatter`] for a flat f32 tensor; with NCCL it returns before the transfer ends.
    ///
    /// # Errors
    /// As [`Group::all_gather_tensor`].
    pub fn reduce_scatter_tensor(&self, all: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let Some(nccl) = self.wire.nccl.get() else {
            return like(all, self.reduce_scatter(floats(all)?, counts)?.wait()?);
        };
        let (call, ours) = (self.call(Op::ReduceScatter, counts.iter().sum()), self.count(counts)?);
        ensure!(all.elem_count() == call.len, "reduce_scatter: {} elements instead of {}", all.elem_count(), call.len);
        let part = match PaddedParts::of(counts) {
            PaddedParts::Equal(padded_length) => {
                let all = spread(all, counts, padded_length)?;
                self.on_device(nccl, call, |nccl| nccl.reduce_scatter(Among::Shards, &all))?.narrow(0, 0, ours)?
            }
            PaddedParts::Own => self.on_device(nccl, call, |nccl| nccl.reductions(Among::Shards, all, counts))?,
        };
        if self.hsdp_shard_size() == self.world_size() {
            return Ok(part);
        }
        self.on_device(nccl, call, |nccl| nccl.all_reduce(Among::Replicas, &part))
    }

    /// [`Group::all_reduce`] for a flat f32 tensor; with NCCL it returns before the transfer ends.
    ///
    /// # Errors
    /// As [`Group::all_gather_tensor`].
    pub fn all_reduce_tensor(&self, ours: &Tensor) -> Result<Tensor> {
        let Some(nccl) = self.wire.nccl.get() else { return like(ours, self.all_reduce(floats(ours)?).wait()?) };
        let call = self.call(Op::AllReduce, ours.elem_count());
        self.on_device(nccl, call, |nccl| nccl.all_reduce(Among::All, ours))
    }

    fn on_device<R>(&self, nccl: &Mutex<Nccl>, call: Call, f: impl FnOnce(&Nccl) -> Result<R>) -> Result<R> {
        // NCCL has no time limit. This exchange has one, and it checks that all ranks make the same call.
        self.to_all(call.op, call.len, Vec::<u8>::new())?;
        f(&nccl.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Length of each rank's part in a transfer.
#[derive(Debug, PartialEq, Eq)]
enum PaddedParts {
    /// The same for all ranks, that of the largest part: one collective.
    Equal(usize),
    /// Its own length: one operation for each rank.
    Own,
}

impl PaddedParts {
    /// Evenly split parts differ by at most one element and are padded. If few ranks own nearly everything, equal
    /// buffers would be mostly padding.
    fn of(counts: &[usize]) -> Self {
        let (most, len) = (counts.iter().copied().max().unwrap_or(0), counts.iter().sum::<usize>());
        if most * counts.len() <= len + len / 8 { Self::Equal(most) } else { Self::Own }
    }
}

/// A flat tensor padded with zeros to `len` elements.
fn padded(part: &Tensor, len: usize) -> Result<Tensor> {
    match part.elem_count() {
        0 => Ok(Tensor::zeros(len, part.dtype(), part.device())?),
        count => Ok(part.pad_with_zeros(0, 0, len - count)?),
    }
}

/// The parts of a flat tensor in which each part is padded to `padded_length` elements.
fn spread(all: &Tensor, counts: &[usize], padded_length: usize) -> Result<Tensor> {
    if counts.iter().all(|count| *count == padded_length) {
        return Ok(all.clone());
    }
    let mut at = 0;
    let part = |count: &usize| {
        at += count;
        padded(&all.narrow(0, at - count, *count)?, padded_length)
    };
    let parts: Vec<Tensor> = counts.iter().map(part).collect::<Result<_>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// A flat tensor's elements as f32.
fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.to_vec1()?)
}

/// A flat tensor with these values, with the dtype and device of `like`.
fn like(like: &Tensor, values: Vec<f32>) -> Result<Tensor> {
    let len = values.len();
    Ok(Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_padded_unless_most_would_be_padding() -> Result<()> {
        assert_eq!(PaddedParts::of(&[8, 8, 8]), PaddedParts::Equal(8));
        assert_eq!(PaddedParts::of(&[8, 8, 7]), PaddedParts::Equal(8));
        assert_eq!(PaddedParts::of(&[9, 0, 0]), PaddedParts::Own);
        let all = Tensor::new(&[1f32, 2.0, 3.0, 4.0, 5.0], &Device::Cpu)?;
        let spread = spread(&all, &[2, 1, 2], 2)?;
        assert_eq!(spread.to_vec1::<f32>()?, [1.0, 2.0, 3.0, 0.0, 4.0, 5.0]);
        Ok(())
    }
}
