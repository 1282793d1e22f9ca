//! Collectives of tensors that lie on devices: over NCCL they go from device to device. Without it they travel as floats do,
//! which tests on the CPU rely on.

use super::{Call, Group, Op, nccl::Nccl, wire::Among};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use std::sync::{Mutex, PoisonError};

impl Group {
    /// The flat tensors of the ranks that share this one's replica out, one after another: the r-th gives `counts[r]`
    /// elements of f32, bf16 or f16.
    ///
    /// # Errors
    /// The lengths are not these, or a rank does not come.
    pub fn all_gather_tensor(&self, ours: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let Some(nccl) = self.wire.nccl.get() else {
            let parts = self.all_gather(floats(ours)?, counts)?.wait()?;
            return like(ours, parts.iter().flat_map(|part| part.iter().copied()).collect());
        };
        let call = self.call(Op::AllGather, counts.iter().sum());
        self.on_device(nccl, (call, Among::Shards), |nccl| nccl.all_gather(ours, counts))
    }

    /// As [`Group::reduce_scatter`], of a flat tensor of f32.
    ///
    /// # Errors
    /// As [`Group::all_gather_tensor`].
    pub fn reduce_scatter_tensor(&self, all: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let Some(nccl) = self.wire.nccl.get() else {
            return like(all, self.reduce_scatter(floats(all)?, counts)?.wait()?);
        };
        let call = self.call(Op::ReduceScatter, counts.iter().sum());
        let part = self.on_device(nccl, (call, Among::Shards), |nccl| nccl.reduce_scatter(all, counts))?;
        if self.shard_ranks() == self.world_size() {
            return Ok(part);
        }
        self.on_device(nccl, (call, Among::Replicas), |nccl| nccl.all_reduce(&part))
    }

    /// As [`Group::all_reduce`], of a flat tensor of f32.
    ///
    /// # Errors
    /// As [`Group::all_gather_tensor`].
    pub fn all_reduce_tensor(&self, ours: &Tensor) -> Result<Tensor> {
        let Some(nccl) = self.wire.nccl.get() else { return like(ours, self.all_reduce(floats(ours)?).wait()?) };
        let call = self.call(Op::AllReduce, ours.elem_count());
        self.on_device(nccl, (call, Among::All), |nccl| nccl.all_reduce(ours))
    }

    /// What `f` gives on the communicator among these ranks.
    fn on_device(
        &self,
        nccl: &Mutex<[Nccl; 3]>,
        (call, among): (Call, Among),
        f: impl FnOnce(&Nccl) -> Result<Tensor>,
    ) -> Result<Tensor> {
        // NCCL waits for ever; this does not, and sees whether all ranks call the same.
        self.to_all(call.op, call.len, Vec::<u8>::new())?;
        f(&nccl.lock().unwrap_or_else(PoisonError::into_inner)[among as usize])
    }
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec1()?)
}

fn like(tensor: &Tensor, floats: Vec<f32>) -> Result<Tensor> {
    let len = floats.len();
    Ok(Tensor::from_vec(floats, len, &Device::Cpu)?.to_dtype(tensor.dtype())?.to_device(tensor.device())?)
}
