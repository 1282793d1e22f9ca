//! CUDA in a build without it.

use crate::error::{Error, Result, failed};
use candle_core::Device;

/// How many devices there are; never 0.
pub fn count() -> Result<usize> {
    Err(not_built())
}

/// Opens a device.
pub fn open(_number: usize) -> Result<Device> {
    Err(not_built())
}

/// What `vilg doctor` says.
pub fn describe() -> String {
    "not built".to_owned()
}

fn not_built() -> Error {
    failed("this program was built without `cuda`", "rebuild with --features cuda, or use --device cpu")
}
