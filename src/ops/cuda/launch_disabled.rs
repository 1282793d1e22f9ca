//! The function of `launch.rs` in a build without CUDA.

use super::call::{Calls, Output};
use crate::ops::custom_gradient::Computed;
use candle_core::{Result, Tensor, bail};

/// Always an error in this build.
pub fn run(_: &[&Tensor], _: &[Output], _: Calls) -> Result<Vec<Computed>> {
    bail!("this program was built without `cuda`; rebuild with --features cuda")
}
