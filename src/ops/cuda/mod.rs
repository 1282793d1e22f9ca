//! Kernels of our own for CUDA, in place of chains of stock ops. **They have never run on a GPU**: the tests run them on the CPU,
//! from their source and as PTX on an emulated GPU.
//!
//! A kernel is written once, in a `.cu` file beside its CPU twin. `launch` runs it on a device; `emulator` runs the same source
//! on the CPU, in the tests: with several orders of blocks and threads, which must give the same bits. What launches a kernel
//! (grid, arguments, gradient) is shared by both, so the tests cover it too.
//!
//! The kernels are for f32 and bf16 and compute in f32. They are used where the global option `--kernels fused` asks for them;
//! elsewhere stock ops compute the same.

mod call;
#[cfg(test)]
pub mod emulator;
#[cfg_attr(not(feature = "cuda"), path = "launch_disabled.rs")]
mod launch;

pub use call::{Address, Call, Calls, Output, row_blocks};

use super::custom_gradient::Computed;
use crate::runtime::Kernels;
use candle_core::{DType, Device, Result, Tensor, bail};

/// Whether kernels of ours compute an op of these arguments: they are asked for, the arguments have one type that the kernels
/// have, and are on a CUDA device (in tests: or on the CPU, for the emulator).
pub fn takes(kernels: Kernels, args: &[&Tensor]) -> bool {
    let Some(first) = args.first() else { return false };
    let device = match first.device() {
        Device::Cuda(_) => true,
        Device::Cpu => cfg!(test),
        Device::Metal(_) => false,
    };
    let dtype = first.dtype();
    let same = args.iter().all(|arg| arg.dtype() == dtype && arg.elem_count() > 0);
    kernels == Kernels::Fused && device && same && [DType::F32, DType::BF16].contains(&dtype)
}

/// Runs kernels on contiguous tensors; they write new ones. `calls` gets the addresses of inputs and outputs.
///
/// # Errors
/// The device is out of memory, or this build has no CUDA.
pub fn run<const N: usize>(inputs: &[&Tensor], outputs: [Output; N], calls: Calls) -> Result<[Computed; N]> {
    match all(inputs, &outputs, calls)?.try_into() {
        Ok(results) => Ok(results),
        Err(results) => bail!("{} results instead of {N}", results.len()),
    }
}

fn all(inputs: &[&Tensor], outputs: &[Output], calls: Calls) -> Result<Vec<Computed>> {
    #[cfg(test)]
    if inputs.iter().all(|input| input.device().is_cpu()) {
        return emulator::run(inputs, outputs, calls);
    }
    launch::run(inputs, outputs, calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_used_where_they_are_asked_for_and_have_the_type() -> Result<()> {
        let tensor = |dtype| Tensor::zeros((2, 3), dtype, &Device::Cpu);
        let (f32, bf16, f16) = (tensor(DType::F32)?, tensor(DType::BF16)?, tensor(DType::F16)?);
        let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu)?;
        for (args, expected) in [
            (&[&f32][..], true),
            (&[&bf16, &bf16], true),
            (&[&f32, &bf16], false),
            (&[&f16], false),
            (&[&f32, &empty], false),
            (&[], false),
        ] {
            assert_eq!(takes(Kernels::Fused, args), expected, "{args:?}");
            assert!(!takes(Kernels::Stock, args));
        }
        Ok(())
    }
}
