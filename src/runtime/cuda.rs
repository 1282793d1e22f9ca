//! CUDA devices. **This has never run on a GPU**, only on an emulated one (`scripts/emulated_gpu.sh`).
//! The following was found by reading candle-core 0.11.1 and cudarc 0.19.10.
//!
//! - *Device*: one per rank. candle's `cuda_is_available` only reports how it was built, so the driver is asked and a
//!   device is opened. Every failure is an error; `--device auto` then uses the CPU.
//! - *Streams*: all kernels, copies and cuBLAS calls use one stream of the device, so they run in call order. The
//!   per-thread default stream is not used, because it differs between compute threads. NCCL has a second stream, on
//!   which collectives overlap computation (`train.overlap`); the two events that cudarc keeps for each buffer order
//!   the two streams.
//! - *Memory*: `cuMemAllocAsync` from the driver's pool. Its release threshold is 0 by default, which frees memory at
//!   every synchronization, and each read of a loss is one. The threshold is raised, as `keep_memory` does on the CPU.
//!   No buffer of length zero is allocated, because the driver may refuse it.
//! - *Numbers*: f32, except for the products of linear layers and convolutions: their factors are cast to
//!   `train.precision`, in which the generator's linear layers are stored. Packed weights exist only on the CPU; candle
//!   leaves TF32 off. candle's kernels use 32-bit indices in places, so one tensor must have fewer than 2³² elements.
//! - *Segments*: the autograd segments, from stock ops, or with the kernels of `ops::cuda` (`--kernels fused`). Attention is
//!   blockwise (`ops::attention::blockwise`) and never builds the n×n scores.
//! - *Optimizer*: optimizer state and master weights are in host memory. Variables are copies: gradients accumulate on
//!   the device and are copied to the host once per step; weights are copied to the device before each use (stage 3) or
//!   once per step (`train::shards::device`).
//! - *Threads*: all threads of a rank share the handles; cudarc binds the context to the thread at every call.

use super::gpu::DeviceMemory;
use crate::error::{Result, failed, usage};
use candle_core::{
    Device,
    cuda_backend::cudarc::driver::{
        result,
        sys::{self, CUresult},
    },
};

const HINT: &str = "use --device cpu; `vilg doctor` shows what this machine offers";

/// Number of devices that the driver reports; never 0.
pub fn count() -> Result<usize> {
    match found() {
        Ok(0) => Err(failed(no_device(), HINT)),
        Ok(count) => Ok(count),
        Err(code) => Err(failed(why(code), HINT)),
    }
}

/// Opens a device.
pub fn open(number: usize) -> Result<Device> {
    let count = count()?;
    if number >= count {
        return Err(usage(format_args!("there is no CUDA device {number}"), format_args!("this machine has {count}")));
    }
    let device = Device::new_cuda_with_stream(number).map_err(|error| {
        // candle's errors may include a backtrace.
        let why = error.to_string();
        let why = why.lines().next().unwrap_or_default();
        failed(format_args!("cannot open CUDA device {number}: {why}"), HINT)
    })?;
    keep_memory(number);
    Ok(device)
}

/// Whether this build has kernels of our own; here it has.
pub fn fused_kernels() -> Result<()> {
    Ok(())
}

/// The line of `vilg doctor` about CUDA.
pub fn summary() -> String {
    match found() {
        Ok(0) => format!("built, but {}", no_device()),
        Ok(count) => format!("built; {}", (0..count).map(name).collect::<Vec<_>>().join(", ")),
        Err(code) => format!("built, but {}", why(code)),
    }
}

fn found() -> Result<usize, CUresult> {
    let count = result::init().and_then(|()| result::device::get_count());
    count.map(|count| usize::try_from(count).unwrap_or(0)).map_err(|error| error.0)
}

fn no_device() -> String {
    "the CUDA driver finds no device".to_owned()
}

/// Explains why the driver does not start.
fn why(code: CUresult) -> String {
    match code {
        CUresult::CUDA_ERROR_NO_DEVICE => no_device(),
        // The answer of NVIDIA's stub library and of the shims of scripts/cuda_shims.py.
        CUresult::CUDA_ERROR_STUB_LIBRARY => "this machine has no CUDA driver".to_owned(),
        code => format!("the CUDA driver does not start: {code:?}"),
    }
}

fn name(number: usize) -> String {
    format!("cuda:{number} {}", model(number).unwrap_or_else(|| "without a name".to_owned()))
}

/// The name of a device.
pub fn model(number: usize) -> Option<String> {
    result::device::get(number as i32).and_then(result::device::get_name).ok()
}

/// The memory of a device's pool, from which candle allocates. Drivers without memory pools report none.
pub fn memory(number: usize) -> Option<DeviceMemory> {
    type Attribute = sys::CUmemPool_attribute;
    let device = result::device::get(number as i32).ok()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: writes one handle.
    let found = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device) };
    let read = |attribute| {
        let mut bytes = 0_u64;
        // SAFETY: the pool exists, and the value of these attributes is a u64.
        let code = unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()) };
        (code == CUresult::CUDA_SUCCESS).then_some(bytes)
    };
    (found == CUresult::CUDA_SUCCESS).then_some(())?;
    Some(DeviceMemory {
        allocated: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        reserved: read(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
    })
}

/// Keeps freed memory in the process. Drivers without memory pools refuse, which is harmless.
fn keep_memory(number: usize) {
    let Ok(device) = result::device::get(number as i32) else { return };
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the first call writes one handle; the second reads one u64, the type of this attribute.
    unsafe {
        if sys::cuDeviceGetDefaultMemPool(&mut pool, device) == CUresult::CUDA_SUCCESS {
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast());
        }
    }
}
