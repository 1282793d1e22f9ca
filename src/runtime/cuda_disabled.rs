//! The functions of `cuda.rs` in a build without CUDA.

use super::gpu::DeviceMemory;
use crate::error::{Error, Result, failed, usage};
use candle_core::Device;

/// Number of devices; always an error in this build.
pub fn count() -> Result<usize> {
    Err(not_built())
}

/// Opens a device.
pub fn open(_number: usize) -> Result<Device> {
    Err(not_built())
}

/// The memory of a device; `None` in this build.
pub fn memory(_number: usize) -> Option<DeviceMemory> {
    None
}

/// The name of a device; `None` in this build.
pub fn model(_number: usize) -> Option<String> {
    None
}

/// Whether this build has kernels of our own; always an error in this build.
pub fn fused_kernels() -> Result<()> {
    Err(usage(
        "--kernels fused: this program was built without `cuda`",
        "rebuild with --features cuda, or leave out --kernels",
    ))
}

/// The line of `vilg doctor` about CUDA.
pub fn summary() -> String {
    "not built".to_owned()
}

fn not_built() -> Error {
    failed("this program was built without `cuda`", "rebuild with --features cuda, or use --device cpu")
}
