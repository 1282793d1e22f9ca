//! Collectives between CUDA devices, over NCCL. **They have never run on a GPU.**
//!
//! One communicator a rank, each rank with a device of its own: a process or a thread.
//!
//! Everything goes on the device's one stream, so what candle computed before is there and what it computes next waits.
//! That also makes groups of calls right: NCCL starts them at the group's end, and buffers live until then. Sums of
//! floats have NCCL's order, which is not that of ranks on the CPU. A rank that dies leaves the others waiting on the
//! device; the ranks' control messages, which have a time limit, come before each collective.

use crate::error::{Context, Error, Result, anyhow, bail, ensure};
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Storage, Tensor,
    cuda_backend::{
        CudaDType,
        cudarc::{
            driver::{CudaSlice, CudaView, DeviceRepr, ValidAsZeroBits},
            nccl::{Comm, Id, NcclType, ReduceOp, group_end, group_start, result::NcclError, result::NcclStatus},
        },
    },
    op::BackpropOp,
};
use half::{bf16, f16};
use std::ops::Range;

/// A rank's end of the collectives; all ranks call the same ones in the same order with the same counts.
pub struct Nccl {
    comm: Comm,
    device: CudaDevice,
}

// SAFETY: NCCL allows a communicator on any thread, one at a time; the group keeps it behind a mutex.
unsafe impl Send for Nccl {}

impl Nccl {
    /// `exchange` is called once on every rank: it takes rank 0's bytes and returns them on all.
    ///
    /// # Errors
    /// The device is none of CUDA, two ranks have the same one, or a rank does not come.
    pub fn new(
        device: &Device,
        rank: usize,
        world_size: usize,
        exchange: impl FnOnce(Option<Vec<u8>>) -> Result<Vec<u8>>,
    ) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("NCCL needs a CUDA device, not {:?}", device.location()) };
        ensure!(rank < world_size && i32::try_from(world_size).is_ok(), "rank {rank} of {world_size}");
        let ours = match rank {
            0 => Some(Id::new().map_err(explain("id"))?.internal().iter().map(|&byte| byte as u8).collect()),
            _ => None,
        };
        let id: Vec<_> = exchange(ours)?.into_iter().map(|byte| byte as std::ffi::c_char).collect();
        let id = id.try_into().ok().context("the ranks exchanged no NCCL id")?;
        let comm = Comm::from_rank(device.cuda_stream(), rank, world_size, Id::uninit(id));
        Ok(Self { comm: comm.map_err(explain("start"))?, device: device.clone() })
    }

    /// All ranks' elements in rank order, where rank r gives `counts[r]`: flat, f32, bf16 or f16.
    pub fn all_gather(&self, ours: &Tensor, counts: &[usize]) -> Result<Tensor> {
        match ours.dtype() {
            DType::F32 => self.gather::<f32>(ours, counts),
            DType::BF16 => self.gather::<bf16>(ours, counts),
            DType::F16 => self.gather::<f16>(ours, counts),
            dtype => bail!("all_gather: {dtype:?} is no type of weights"),
        }
    }

    fn gather<T: Element>(&self, ours: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let (parts, len) = self.parts(counts)?;
        let expected = parts[self.comm.rank()].len();
        ensure!(ours.elem_count() == expected, "all_gather: {} elements instead of {expected}", ours.elem_count());
        let mut all = self.room::<T>(len)?;
        if len > 0 {
            with_view::<T>(ours, |ours| match equal(counts) {
                true => done("all_gather", self.comm.all_gather(ours, &mut all)),
                false => grouped(parts, |root, part| {
                    let ours = (root == self.comm.rank()).then_some(ours);
                    done("broadcast", self.comm.broadcast(ours, &mut all.slice_mut(part), root as i32))
                }),
            })?;
        }
        Ok(self.tensor(all, len))
    }

    /// The sum over all ranks of this rank's part of `all`, in which `counts[r]` elements after another are rank r's.
    pub fn reduce_scatter(&self, all: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let (parts, len) = self.parts(counts)?;
        ensure!(all.elem_count() == len, "reduce_scatter: {} elements instead of {len}", all.elem_count());
        let count = parts[self.comm.rank()].len();
        let mut ours = self.room::<f32>(count)?;
        if len > 0 {
            with_view::<f32>(all, |all| match equal(counts) {
                true => done("reduce_scatter", self.comm.reduce_scatter(all, &mut ours, &ReduceOp::Sum)),
                false => grouped(parts, |root, part| {
                    let ours = (root == self.comm.rank()).then_some(&mut ours);
                    done("reduce", self.comm.reduce(&all.slice(part), ours, &ReduceOp::Sum, root as i32))
                }),
            })?;
        }
        Ok(self.tensor(ours, count))
    }

    /// The sum over all ranks.
    pub fn all_reduce(&self, ours: &Tensor) -> Result<Tensor> {
        let len = ours.elem_count();
        let mut sum = self.room::<f32>(len)?;
        if len > 0 {
            with_view::<f32>(ours, |ours| done("all_reduce", self.comm.all_reduce(ours, &mut sum, &ReduceOp::Sum)))?;
        }
        Ok(self.tensor(sum, len))
    }

    /// Each rank's range, and the elements in all.
    fn parts(&self, counts: &[usize]) -> Result<(Vec<Range<usize>>, usize)> {
        let ranks = self.comm.world_size();
        ensure!(counts.len() == ranks, "{} counts for {ranks} ranks", counts.len());
        let mut len = 0;
        let part = |count: &usize| {
            len += count;
            len - count..len
        };
        let parts = counts.iter().map(part).collect();
        Ok((parts, len))
    }

    /// Memory for `len` elements; a driver may refuse memory of length zero.
    fn room<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        Ok(self.device.alloc_zeros(len.max(1))?)
    }

    fn tensor<T: Element>(&self, elements: CudaSlice<T>, len: usize) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(elements, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), len, BackpropOp::none(), false)
    }
}

/// Whether all ranks have equally many, which NCCL has collectives of its own for.
fn equal(counts: &[usize]) -> bool {
    counts.windows(2).all(|pair| pair[0] == pair[1])
}

/// What tensors on a device are made of.
trait Element: NcclType + CudaDType + DeviceRepr + ValidAsZeroBits {}

impl<T: NcclType + CudaDType + DeviceRepr + ValidAsZeroBits> Element for T {}

/// Calls `f` with the elements of a tensor on a CUDA device.
fn with_view<T: Element>(tensor: &Tensor, f: impl FnOnce(&CudaView<T>) -> Result<()>) -> Result<()> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("NCCL moves tensors of CUDA devices only") };
    let (start, end) = layout.contiguous_offsets().context("the tensor is not contiguous")?;
    f(&storage.as_cuda_slice::<T>()?.slice(start..end))
}

/// Calls `f` for every rank whose part is not empty, as one operation.
fn grouped(parts: Vec<Range<usize>>, mut f: impl FnMut(usize, Range<usize>) -> Result<()>) -> Result<()> {
    done("group", group_start())?;
    let mut parts = parts.into_iter().enumerate().filter(|(_, part)| !part.is_empty());
    let called = parts.try_for_each(|(rank, part)| f(rank, part));
    // A group that was begun must end, also after an error.
    let ended = done("group", group_end());
    called.and(ended)
}

fn done(what: &'static str, result: Result<NcclStatus, NcclError>) -> Result<()> {
    result.map(drop).map_err(explain(what))
}

fn explain(what: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| anyhow!("NCCL {what}: {:?}", error.0)
}
