//! Collectives between CUDA devices over NCCL. **They have never run on a GPU**, only on emulated ones.
//!
//! Each rank (a process or a thread) has its own device and its own communicator.
//!
//! Collectives that overlap computation use a separate CUDA stream, others the compute stream. A collective waits for all
//! that has been queued on the compute stream: cudarc keeps an event of the last write of each buffer, but candle notes
//! some of its writes as reads (`copy2d`, in candle-core 0.11.1). Kernels that read a collective's output wait for that
//! event, and memory is freed after the last read and write. Because there is only one event of reads, nothing else may
//! read a collective's input. NCCL adds floats in its own order, not in rank order as on the CPU. If a
//! rank dies, the others would wait forever on the device; therefore a control message with a time limit precedes each
//! collective.

use super::call::Among;
use crate::error::{Context, Error, Result, anyhow, bail, ensure};
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Storage, Tensor,
    cuda_backend::{
        CudaDType,
        cudarc::{
            driver::{CudaSlice, CudaStream, CudaView, DeviceRepr, ValidAsZeroBits},
            nccl::{Comm, Id, NcclType, ReduceOp, result::NcclError, result::NcclStatus},
        },
    },
    op::BackpropOp,
};
use half::{bf16, f16};
use std::{collections::BTreeMap, sync::Arc};

/// One rank's NCCL communicators. All ranks make the same calls in the same order with the same counts.
pub struct Nccl {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    comms: BTreeMap<Among, Comm>,
}

// SAFETY: NCCL allows a communicator on any thread, one at a time; the group keeps it behind a mutex.
unsafe impl Send for Nccl {}

impl Nccl {
    /// No communicators yet. `beside`: collectives overlap computation.
    ///
    /// # Errors
    /// The device is not a CUDA device, or a second stream cannot be created.
    pub fn new(device: &Device, beside: bool) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("NCCL needs a CUDA device, not {:?}", device.location()) };
        let mut stream = device.cuda_stream();
        if beside {
            // Other ranks wait for its kernels, so they get priority.
            stream = stream.context().new_stream_with_priority(-1).context("a stream for NCCL")?;
        }
        Ok(Self { device: device.clone(), stream, comms: BTreeMap::new() })
    }

    /// Creates the communicator of the ranks `among`; this is the `rank`-th of them. `exchange` is called once on every
    /// rank and returns the bytes of the first rank on all of them.
    ///
    /// # Errors
    /// Two ranks have the same device, or a rank times out.
    pub fn join(
        &mut self,
        among: Among,
        rank: usize,
        ranks: usize,
        exchange: impl FnOnce(Option<Vec<u8>>) -> Result<Vec<u8>>,
    ) -> Result<()> {
        ensure!(rank < ranks && i32::try_from(ranks).is_ok(), "rank {rank} of {ranks}");
        let ours = match rank {
            0 => Some(Id::new().map_err(explain("id"))?.internal().iter().map(|&byte| byte as u8).collect()),
            _ => None,
        };
        let id: Vec<_> = exchange(ours)?.into_iter().map(|byte| byte as std::ffi::c_char).collect();
        let id = id.try_into().ok().context("the ranks did not receive an NCCL id")?;
        let comm = Comm::from_rank(self.stream.clone(), rank, ranks, Id::uninit(id)).map_err(explain("start"))?;
        self.comms.insert(among, comm);
        Ok(())
    }

    /// All ranks' elements in rank order, with equal counts: flat, f32, bf16 or f16.
    pub fn all_gather(&self, among: Among, ours: &Tensor) -> Result<Tensor> {
        match ours.dtype() {
            DType::F32 => self.all_gather_of::<f32>(among, ours),
            DType::BF16 => self.all_gather_of::<bf16>(among, ours),
            DType::F16 => self.all_gather_of::<f16>(among, ours),
            dtype => bail!("all_gather: {dtype:?} is not a dtype of weights"),
        }
    }

    fn all_gather_of<T: Element>(&self, among: Among, ours: &Tensor) -> Result<Tensor> {
        let comm = self.comm(among)?;
        let len = ours.elem_count() * comm.world_size();
        let mut all = self.workspace::<T>(len)?;
        self.with_view::<T>(ours, |ours| done("all_gather", comm.all_gather(ours, &mut all)))?;
        Ok(self.tensor(all, len))
    }

    /// All ranks' elements in rank order, with `counts[r]` elements of rank r: flat, f32, bf16 or f16.
    pub fn broadcasts(&self, among: Among, ours: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
        match ours.dtype() {
            DType::F32 => self.broadcasts_of::<f32>(among, ours, counts),
            DType::BF16 => self.broadcasts_of::<bf16>(among, ours, counts),
            DType::F16 => self.broadcasts_of::<f16>(among, ours, counts),
            dtype => bail!("broadcast: {dtype:?} is not a dtype of weights"),
        }
    }

    fn broadcasts_of<T: Element>(&self, among: Among, ours: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
        let comm = self.comm(among)?;
        let mut buffers: Vec<CudaSlice<T>> =
            counts.iter().map(|count| self.workspace(*count)).collect::<Result<_>>()?;
        self.with_view::<T>(ours, |ours| {
            let views = buffers.iter_mut().zip(counts).map(|(workspace, count)| workspace.slice_mut(..*count));
            let views: Vec<_> = views.enumerate().filter(|(_, view)| !view.is_empty()).collect();
            let mut group = comm.group();
            for (root, view) in views {
                let ours = (root == comm.rank()).then(|| ours.slice(..));
                done("broadcast", group.broadcast(ours, view, root as i32))?;
            }
            Ok(())
        })?;
        Ok(buffers.into_iter().zip(counts).map(|(workspace, count)| self.tensor(workspace, *count)).collect())
    }

    /// This rank's part of the sum of `all` over these ranks: flat, f32, equal parts.
    pub fn reduce_scatter(&self, among: Among, all: &Tensor) -> Result<Tensor> {
        let comm = self.comm(among)?;
        let len = all.elem_count() / comm.world_size();
        let mut ours = self.workspace::<f32>(len)?;
        self.with_view::<f32>(all, |all| done("reduce_scatter", comm.reduce_scatter(all, &mut ours, &ReduceOp::Sum)))?;
        Ok(self.tensor(ours, len))
    }

    /// This rank's part of the sum of `all` over these ranks; `all` has consecutive parts of `counts[r]` elements.
    pub fn reductions(&self, among: Among, all: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let (comm, mut at) = (self.comm(among)?, 0);
        let count = counts[comm.rank()];
        let mut ours = self.workspace::<f32>(count)?;
        self.with_view::<f32>(all, |all| {
            let part = |count: &usize| {
                at += count;
                all.slice(at - count..at)
            };
            let parts: Vec<_> = counts.iter().map(part).enumerate().filter(|(_, part)| !part.is_empty()).collect();
            let mut ours = Some(ours.slice_mut(..));
            let mut group = comm.group();
            for (root, part) in parts {
                let ours = if root == comm.rank() { ours.take() } else { None };
                done("reduce", group.reduce(part, ours, &ReduceOp::Sum, root as i32))?;
            }
            Ok(())
        })?;
        Ok(self.tensor(ours, count))
    }

    /// The sum of `ours` over these ranks.
    pub fn all_reduce(&self, among: Among, ours: &Tensor) -> Result<Tensor> {
        let (comm, len) = (self.comm(among)?, ours.elem_count());
        let mut sum = self.workspace::<f32>(len)?;
        if len > 0 {
            self.with_view::<f32>(ours, |ours| done("all_reduce", comm.all_reduce(ours, &mut sum, &ReduceOp::Sum)))?;
        }
        Ok(self.tensor(sum, len))
    }

    /// The communicator of the ranks `among`. If all ranks form one shard group, there is only one.
    fn comm(&self, among: Among) -> Result<&Comm> {
        self.comms.get(&among).or_else(|| self.comms.get(&Among::All)).context("the ranks have no NCCL communicator")
    }

    /// Allocates `len` elements; at least one, because a driver may refuse memory of length zero.
    fn workspace<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        Ok(self.device.alloc_zeros(len.max(1))?)
    }

    /// Calls `f` with the elements of a tensor, which the stream of collectives may read from now on.
    fn with_view<T: Element>(&self, tensor: &Tensor, f: impl FnOnce(&CudaView<T>) -> Result<()>) -> Result<()> {
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("NCCL only supports tensors on CUDA devices") };
        let (start, end) = layout.contiguous_offsets().context("the tensor is not contiguous")?;
        let computing = self.device.cuda_stream();
        if self.stream != computing {
            self.stream.join(&computing).context("the streams of computation and NCCL")?;
        }
        f(&storage.as_cuda_slice::<T>()?.slice(start..end))
    }

    fn tensor<T: Element>(&self, elements: CudaSlice<T>, len: usize) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(elements, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), len, BackpropOp::none(), false)
    }
}

/// Element types of tensors on a device.
trait Element: NcclType + CudaDType + DeviceRepr + ValidAsZeroBits {}

impl<T: NcclType + CudaDType + DeviceRepr + ValidAsZeroBits> Element for T {}

fn done(what: &'static str, result: Result<NcclStatus, NcclError>) -> Result<()> {
    result.map(drop).map_err(explain(what))
}

fn explain(what: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| anyhow!("NCCL {what}: {:?}", error.0)
}
