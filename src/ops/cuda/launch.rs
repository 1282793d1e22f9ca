//! Launches kernels on a CUDA device. **This has never run on a GPU**, only on an emulated one.
//!
//! The kernels are one module of PTX for compute capability 8.0, which build.rs makes with the nvcc that candle's own kernels
//! need as well: an error of a kernel fails the build and not a run, and no compiler is needed where the program runs. The driver
//! compiles the PTX for its GPU when the first kernel is called, and keeps the result on disk.

use super::call::{Address, Arg, Call, Calls, Output};
use crate::ops::custom_gradient::Computed;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor,
    backend::{BackendDevice, BackendStorage},
    bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop},
    },
};
use half::bf16;

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// As [`super::run`]; the launches are queued on the device's stream.
pub fn run(inputs: &[&Tensor], outputs: &[Output], calls: Calls) -> Result<Vec<Computed>> {
    let Some(Device::Cuda(device)) = inputs.first().map(|input| input.device()) else {
        bail!("kernels need tensors on a CUDA device")
    };
    let stream = device.cuda_stream();
    // SAFETY: the kernels write every element, which the emulator's test checks, before anything reads them.
    let allocate = |output: &Output| unsafe { device.alloc_uninit(&output.shape, output.dtype) };
    let mut written = outputs.iter().map(allocate).collect::<Result<Vec<_>>>()?;
    let read: Vec<_> = inputs.iter().map(|input| input.storage_and_layout()).collect();
    {
        // While they live, other streams know that this one uses the buffers.
        let (mut uses, mut from, mut to) = (Vec::new(), Vec::new(), Vec::new());
        for (storage, layout) in &read {
            let Storage::Cuda(storage) = &**storage else { bail!("kernels need tensors on a CUDA device") };
            let (address, usage) = address(storage, layout, &stream)?;
            uses.push(usage);
            from.push(address);
        }
        for storage in &mut written {
            let (address, usage) = address_mut(storage, &stream)?;
            uses.push(usage);
            to.push(address);
        }
        for call in calls(&from, &to) {
            launch(device, &call)?;
        }
    }
    let computed =
        |(storage, output): (_, &Output)| Computed { storage: Storage::Cuda(storage), shape: output.shape.clone() };
    Ok(written.into_iter().zip(outputs).map(computed).collect())
}

fn launch(device: &CudaDevice, call: &Call) -> Result<()> {
    let kernel = device.get_or_load_custom_func(&call.kernel, "vilg_kernels", PTX)?;
    let mut builder = kernel.builder();
    for arg in &call.args {
        match arg {
            Arg::Pointer(address) => builder.arg(address),
            Arg::Size(size) => builder.arg(size),
            Arg::Float(number) => builder.arg(number),
        };
    }
    let [x, y] = call.grid.map(u32::try_from);
    let (Ok(x), Ok(y), Ok(threads), Ok(shared_mem_bytes)) =
        (x, y, u32::try_from(call.threads), u32::try_from(call.shared_bytes))
    else {
        bail!("{}: a grid of {:?} blocks is too large", call.kernel, call.grid)
    };
    let config = LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes };
    // SAFETY: number and types of the arguments are the kernel's, and all addresses are inside of their buffers: the emulator's
    // tests check both. The caller keeps the buffers.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// The address of a tensor's first element.
fn address<'a>(storage: &'a CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<(Address, SyncOnDrop<'a>)> {
    let Some((start, _)) = layout.contiguous_offsets() else { bail!("a kernel needs contiguous tensors") };
    let (address, usage) = match storage.dtype() {
        DType::F32 => pointer::<f32>(storage.as_cuda_slice()?, stream),
        DType::BF16 => pointer::<bf16>(storage.as_cuda_slice()?, stream),
        DType::U32 => pointer::<u32>(storage.as_cuda_slice()?, stream),
        dtype => bail!("there is no kernel for {dtype:?}"),
    };
    Ok((Address(address + (start * storage.dtype().size_in_bytes()) as u64), usage))
}

fn pointer<'a, T>(slice: &'a CudaSlice<T>, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
    slice.device_ptr(stream)
}

fn address_mut<'a>(storage: &'a mut CudaStorage, stream: &'a CudaStream) -> Result<(Address, SyncOnDrop<'a>)> {
    let (address, usage) = match storage.dtype() {
        DType::F32 => storage.as_cuda_slice_mut::<f32>()?.device_ptr_mut(stream),
        DType::BF16 => storage.as_cuda_slice_mut::<bf16>()?.device_ptr_mut(stream),
        dtype => bail!("there is no kernel that writes {dtype:?}"),
    };
    Ok((Address(address), usage))
}
