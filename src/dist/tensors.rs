//! Collectives of tensors that lie on devices: over NCCL they go from device to device. Without it they travel as floats do,
//! which tests on the CPU rely on.

use super::{
    Call, Group, Op,
    nccl::Nccl,
    wire::{Among, sum},
};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use std::sync::PoisonError;

impl Group {
    /// The flat tensors of the ranks that share this one's replica out, one after another: the r-th gives `counts[r]`
    /// elements of f32, bf16 or f16.
    ///
    /// # Errors
    /// The lengths are not these, or a rank does not come.
    pub fn all_gather_tensor(&self, ours: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let call = self.call(Op::AllGather, counts.iter().sum());
        if let Some(all) = self.on_device(call, Among::Shards, |nccl| nccl.all_gather(ours, counts))? {
            return Ok(all);
        }
        self.settle()?;
        let parts = self.wire.to_members(call, Among::Shards, floats(ours)?)?;
        like(ours, parts.iter().flat_map(|part| part.iter().copied()).collect())
    }

    /// As [`Group::reduce_scatter`], of a flat tensor of f32.
    ///
    /// # Errors
    /// As [`Group::all_gather_tensor`].
    pub fn reduce_scatter_tensor(&self, all: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let call = self.call(Op::ReduceScatter, counts.iter().sum());
        let part = match self.on_device(call, Among::Shards, |nccl| nccl.reduce_scatter(all, counts))? {
            Some(part) => part,
            None => {
                self.settle()?;
                like(all, sum(&self.wire.scatter(call, Among::Shards, floats(all)?, counts)?))?
            }
        };
        if self.shard_ranks() == self.world_size() { Ok(part) } else { self.reduce(call, Among::Replicas, &part) }
    }

    /// As [`Group::all_reduce`], of a flat tensor of f32.
    ///
    /// # Errors
    /// As [`Group::all_gather_tensor`].
    pub fn all_reduce_tensor(&self, ours: &Tensor) -> Result<Tensor> {
        self.reduce(self.call(Op::AllReduce, ours.elem_count()), Among::All, ours)
    }

    fn reduce(&self, call: Call, among: Among, ours: &Tensor) -> Result<Tensor> {
        if let Some(sum) = self.on_device(call, among, |nccl| nccl.all_reduce(ours))? {
            return Ok(sum);
        }
        self.settle()?;
        like(ours, self.wire.all_reduce(call, among, floats(ours)?)?)
    }

    /// What `f` gives; `None` where the ranks have no devices that NCCL joins.
    fn on_device(&self, call: Call, among: Among, f: impl FnOnce(&Nccl) -> Result<Tensor>) -> Result<Option<Tensor>> {
        let Some(nccl) = self.wire.nccl.get() else { return Ok(None) };
        // NCCL waits for ever; this does not, and sees whether all ranks call the same.
        self.to_all(call.op, call.len, Vec::<u8>::new())?;
        let nccl = nccl.lock().unwrap_or_else(PoisonError::into_inner);
        f(&nccl[among as usize]).map(Some)
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec1()?)
}

fn like(tensor: &Tensor, floats: Vec<f32>) -> Result<Tensor> {
    let len = floats.len();
    Ok(Tensor::from_vec(floats, len, &Device::Cpu)?.to_dtype(tensor.dtype())?.to_device(tensor.device())?)
}
