//! CUDA devices. **This has never run on a GPU**: it compiles, links, starts and fails cleanly on machines without one,
//! and what follows was found by reading candle-core 0.11.1 and cudarc 0.19.10.
//!
//! - *Device*: one a rank. candle's `cuda_is_available` only says what was built, so the driver is asked and a device
//!   opened; every failure on the way is an error, and `--device auto` then means the CPU.
//! - *Streams*: one of the device's own, on which candle puts all kernels, copies and cuBLAS, so they run in the order of the
//!   calls. Not the per-thread default stream, which is another one on each compute thread. NCCL has a second one where
//!   collectives run beside computation (`train.overlap`); the two events that cudarc keeps for each buffer order the two.
//! - *Memory*: `cuMemAllocAsync` from the driver's pool. Its release threshold is 0 by default, which hands freed memory
//!   back at every synchronisation, and each loss read is one; we keep it, as `keep_memory` does on the CPU. Nothing of
//!   length zero is allocated, which the driver may refuse.
//! - *Numbers*: f32, but for the products of linear layers and convolutions: their factors are cast to `train.precision`, in
//!   which the generator's linear layers are kept. Packed weights are for the CPU; candle leaves TF32 off. candle's kernels index with 32-bit counts in places, so
//!   one tensor must stay below 2³² elements.
//! - *Segments*: the autograd ones run, of stock ops only; attention builds n×n scores there. There is no kernel of ours.
//! - *Optimizer*: its state and the weights that it updates are in host memory. Variables are copies: gradients add up on the device
//!   and cross the bus once a step, weights before each use (stage 3) or once a step (`train::shards::device`).
//! - *Threads*: handles are shared by all threads of a rank; cudarc binds the context to the thread at every call.

use crate::error::{Result, failed, usage};
use candle_core::{
    Device,
    cuda_backend::cudarc::driver::{
        result,
        sys::{self, CUresult},
    },
};

const HINT: &str = "--device cpu runs without; `vilg doctor` shows what this machine offers";

/// How many devices the driver offers; never 0.
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
        // candle's errors may bring a backtrace along.
        let why = error.to_string();
        let why = why.lines().next().unwrap_or_default();
        failed(format_args!("CUDA device {number} does not open: {why}"), HINT)
    })?;
    keep_memory(number);
    Ok(device)
}

/// What `vilg doctor` says.
pub fn describe() -> String {
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

/// What a driver that does not start means.
fn why(code: CUresult) -> String {
    match code {
        CUresult::CUDA_ERROR_NO_DEVICE => no_device(),
        // What NVIDIA's stub library answers, and the stand-ins of scripts/cuda_shims.py.
        CUresult::CUDA_ERROR_STUB_LIBRARY => "there is no CUDA driver here".to_owned(),
        code => format!("the CUDA driver does not start: {code:?}"),
    }
}

fn name(number: usize) -> String {
    let name = result::device::get(number as i32).and_then(result::device::get_name);
    format!("cuda:{number} {}", name.unwrap_or_else(|_| "without a name".to_owned()))
}

/// Keeps freed memory in the process. Drivers without pools refuse, and lose nothing.
fn keep_memory(number: usize) {
    let Ok(device) = result::device::get(number as i32) else { return };
    let (mut pool, mut all) = (std::ptr::null_mut(), u64::MAX);
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the first call writes one handle; the second reads one u64, which is what this attribute is.
    unsafe {
        if sys::cuDeviceGetDefaultMemPool(&mut pool, device) == CUresult::CUDA_SUCCESS {
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast());
        }
    }
}
