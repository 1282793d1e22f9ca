//! Collectives between CUDA devices, over NCCL. **They have never run on a GPU.**
//!
//! One communicator a rank, each rank with a device of its own: a process or a thread.
//!
//! Collectives that overlap computation have a CUDA stream of their own; otherwise they use the compute stream. cudarc keeps
//! two events for each buffer, of its last read and its last write: a collective waits for the kernels that write its
//! input, kernels that read its output wait for it, and memory is freed after both. There is only one read event, so that
//! nothing else may read a collective's input. NCCL adds floats in its own order, not in that of ranks on the CPU. A rank
//! that dies leaves the others waiting on the device; therefore a control message with a time limit comes before each
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

/// A rank's end of the collectives; all ranks call the same ones in the same order with the same counts.
pub struct Nccl {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    comms: BTreeMap<Among, Comm>,
}

// SAFETY: NCCL allows a communicator on any thread, one at a time; the group keeps it behind a mutex.
unsafe impl Send for Nccl {}

impl Nccl {
    /// Without communicators yet; `beside`: collectives run beside computation.
    ///
    /// # Errors
    /// The device is none of CUDA, or has no second stream.
    pub fn new(device: &Device, beside: bool) -> Result<Self> {
        let Device::Cuda(device) = device else { bail!("NCCL needs a CUDA device, not {:?}", device.location()) };
        let mut stream = device.cuda_stream();
        if beside {
            // Others wait for what it does: its kernels go first.
            stream = stream.context().new_stream_with_priority(-1).context("a stream for NCCL")?;
        }
        Ok(Self { device: device.clone(), stream, comms: BTreeMap::new() })
    }

    /// Joins this rank to the others in `among`, of which it is the `rank`-th. `exchange` is called once on every rank: it
    /// takes the first one's bytes and returns them on all.
    ///
    /// # Errors
    /// Two ranks have the same device, or one does not come.
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
        let id = id.try_into().ok().context("the ranks exchanged no NCCL id")?;
        let comm = Comm::from_rank(self.stream.clone(), rank, ranks, Id::uninit(id)).map_err(explain("start"))?;
        self.comms.insert(among, comm);
        Ok(())
    }

    /// All ranks' elements in rank order, equally many of each: flat, f32, bf16 or f16.
    pub fn all_gather(&self, among: Among, ours: &Tensor) -> Result<Tensor> {
        match ours.dtype() {
            DType::F32 => self.all_gather_of::<f32>(among, ours),
            DType::BF16 => self.all_gather_of::<bf16>(among, ours),
            DType::F16 => self.all_gather_of::<f16>(among, ours),
            dtype => bail!("all_gather: {dtype:?} is no type of weights"),
        }
    }

    fn all_gather_of<T: Element>(&self, among: Among, ours: &Tensor) -> Result<Tensor> {
        let comm = self.comm(among)?;
        let len = ours.elem_count() * comm.world_size();
        let mut all = self.workspace::<T>(len)?;
        with_view::<T>(ours, |ours| done("all_gather", comm.all_gather(ours, &mut all)))?;
        Ok(self.tensor(all, len))
    }

    /// All ranks' elements in rank order, where rank r gives `counts[r]`: flat, f32, bf16 or f16.
    pub fn broadcasts(&self, among: Among, ours: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
        match ours.dtype() {
            DType::F32 => self.broadcasts_of::<f32>(among, ours, counts),
            DType::BF16 => self.broadcasts_of::<bf16>(among, ours, counts),
            DType::F16 => self.broadcasts_of::<f16>(among, ours, counts),
            dtype => bail!("broadcast: {dtype:?} is no type of weights"),
        }
    }

    fn broadcasts_of<T: Element>(&self, among: Among, ours: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
        let comm = self.comm(among)?;
        let mut rooms: Vec<CudaSlice<T>> = counts.iter().map(|count| self.workspace(*count)).collect::<Result<_>>()?;
        with_view::<T>(ours, |ours| {
            let views = rooms.iter_mut().zip(counts).map(|(workspace, count)| workspace.slice_mut(..*count));
            let views: Vec<_> = views.enumerate().filter(|(_, view)| !view.is_empty()).collect();
            let mut group = comm.group();
            for (root, view) in views {
                let ours = (root == comm.rank()).then(|| ours.slice(..));
                done("broadcast", group.broadcast(ours, view, root as i32))?;
            }
            Ok(())
        })?;
        Ok(rooms.into_iter().zip(counts).map(|(workspace, count)| self.tensor(workspace, *count)).collect())
    }

    /// The sum over these ranks of this rank's part of `all`: flat, f32, cut in equal parts.
    pub fn reduce_scatter(&self, among: Among, all: &Tensor) -> Result<Tensor> {
        let comm = self.comm(among)?;
        let len = all.elem_count() / comm.world_size();
        let mut ours = self.workspace::<f32>(len)?;
        with_view::<f32>(all, |all| done("reduce_scatter", comm.reduce_scatter(all, &mut ours, &ReduceOp::Sum)))?;
        Ok(self.tensor(ours, len))
    }

    /// The sum over these ranks of this rank's part of `all`, in which `counts[r]` elements after another are rank r's.
    pub fn reductions(&self, among: Among, all: &Tensor, counts: &[usize]) -> Result<Tensor> {
        let (comm, mut at) = (self.comm(among)?, 0);
        let count = counts[comm.rank()];
        let mut ours = self.workspace::<f32>(count)?;
        with_view::<f32>(all, |all| {
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

    /// The sum over these ranks.
    pub fn all_reduce(&self, among: Among, ours: &Tensor) -> Result<Tensor> {
        let (comm, len) = (self.comm(among)?, ours.elem_count());
        let mut sum = self.workspace::<f32>(len)?;
        if len > 0 {
            with_view::<f32>(ours, |ours| done("all_reduce", comm.all_reduce(ours, &mut sum, &ReduceOp::Sum)))?;
        }
        Ok(self.tensor(sum, len))
    }

    /// Where all ranks share one replica out, they have one communicator.
    fn comm(&self, among: Among) -> Result<&Comm> {
        self.comms.get(&among).or_else(|| self.comms.get(&Among::All)).context("the ranks are not joined by NCCL")
    }

    /// Memory for `len` elements; a driver may refuse memory of length zero.
    fn workspace<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        Ok(self.device.alloc_zeros(len.max(1))?)
    }

    fn tensor<T: Element>(&self, elements: CudaSlice<T>, len: usize) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(elements, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), len, BackpropOp::none(), false)
    }
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

fn done(what: &'static str, result: Result<NcclStatus, NcclError>) -> Result<()> {
    result.map(drop).map_err(explain(what))
}

fn explain(what: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| anyhow!("NCCL {what}: {:?}", error.0)
}
