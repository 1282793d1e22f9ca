//! Which kernels compute on CUDA devices: the value of `--kernels`, chosen once for the process.

use super::{cuda, device::Wanted};
use crate::error::{Result, usage};
use clap::ValueEnum;
use std::sync::OnceLock;

/// What training and decoding on a CUDA device consist of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kernels {
    /// candle's ops only
    Stock,
    /// Kernels of this program where it has one, else candle's ops
    Fused,
}

static CHOSEN: OnceLock<Kernels> = OnceLock::new();

/// Sets the kernels for the whole process. Only the first call has an effect.
///
/// # Errors
/// [`Kernels::Fused`] in a build without CUDA, or for the CPU.
pub fn choose_kernels(kernels: Kernels, device: Wanted) -> Result<()> {
    if kernels == Kernels::Fused {
        cuda::fused_kernels()?;
        for_device(device)?;
    }
    let _ = CHOSEN.set(kernels);
    Ok(())
}

fn for_device(device: Wanted) -> Result<()> {
    match device {
        Wanted::Cpu => Err(usage("--kernels fused is for CUDA devices", "leave out --kernels or --device cpu")),
        Wanted::Auto | Wanted::Cuda(_) => Ok(()),
    }
}

/// The kernels of this process. Stock ops unless [`choose_kernels`] has chosen, because the fused kernels have not run on a GPU
/// yet.
pub fn kernels() -> Kernels {
    CHOSEN.get().copied().unwrap_or(Kernels::Stock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_no_fused_kernels() {
        assert!(for_device(Wanted::Cpu).is_err());
        assert!(for_device(Wanted::Auto).is_ok() && for_device(Wanted::Cuda(Some(1))).is_ok());
        assert_eq!(kernels(), Kernels::Stock, "no test chooses others");
    }
}
