//! `vilg doctor --check`: what a device computes, compared with the CPU.
//!
//! Each check computes an op in the numbers of the device and again in f64 on the CPU, forward and backward, from the same
//! inputs. On a GPU the op runs from stock tensor ops, and where there is a kernel of ours, also by that. On the CPU the
//! implementation for devices (stock tensor ops) is compared with the CPU's own kernels, so that the checks themselves are
//! tested where there is no GPU.

mod attention;
mod case;
mod collectives;
mod kernels;
mod ops;

pub use case::Check;

use candle_core::{DType, Device};
use case::Case;
use clap::ValueEnum;
use serde::Serialize;

/// A group of checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Products, convolutions, norms, activations, loss, embeddings, casts: against the CPU's kernels
    Ops,
    /// Sparse attention, block by block: against attention with a full mask
    Attention,
    /// Collectives of one rank over NCCL (on the CPU: over the host)
    Collectives,
}

/// Runs the checks of the parts on a device, in order.
pub fn run(parts: &[Part], device: &Device) -> Vec<Check> {
    let check = |part: Part, mut cases: Vec<Case>| {
        if device.is_cuda() {
            cases.extend(fused(part, device));
        }
        cases.iter().map(|case| case.check(part, device)).collect()
    };
    let of_part = |part: &Part| match part {
        Part::Ops => check(*part, ops::cases(device)),
        Part::Attention => check(*part, attention::cases(device)),
        Part::Collectives => collectives::checks(device),
    };
    parts.iter().flat_map(of_part).collect()
}

/// Checks of the kernels of ours, for a CUDA device (in tests: for the emulator).
fn fused(part: Part, device: &Device) -> Vec<Case> {
    match part {
        Part::Ops => kernels::cases(device),
        Part::Attention => attention::fused_cases(device),
        Part::Collectives => Vec::new(),
    }
}

/// The half-precision types in which a device has products; candle's CPU has no bf16 products.
fn halves(device: &Device) -> &'static [DType] {
    if device.is_cpu() { &[DType::F16] } else { &[DType::F16, DType::BF16] }
}

/// Bound of the relative error of products of these numbers: some roundings of the largest element.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 3e-2,
        DType::F16 => 4e-3,
        _ => 2e-5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::emulator;

    fn all() -> Vec<Check> {
        run(Part::value_variants(), &Device::Cpu)
    }

    #[test]
    fn the_ops_of_devices_equal_the_kernels_of_the_cpu() {
        let checks = all();
        let failed: Vec<_> = checks.iter().filter(|check| !check.passed).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        for part in Part::value_variants() {
            assert!(checks.iter().filter(|check| check.part == *part).count() >= 5, "{part:?}");
        }
        let rounded = checks.iter().filter(|check| check.error.is_some_and(|error| error > 0.0)).count();
        assert!(rounded > checks.len() / 2, "both sides compute the same way: only {rounded} errors are not 0");
    }

    /// What a CUDA device would be asked, computed by the emulator.
    #[test]
    fn the_kernels_of_devices_equal_the_kernels_of_the_cpu() {
        if !emulator::available() {
            return;
        }
        for part in [Part::Ops, Part::Attention] {
            let mut checks = Vec::new();
            for case in fused(part, &Device::Cpu) {
                let before = emulator::launches();
                checks.push(case.check(part, &Device::Cpu));
                // Forward and backward.
                assert!(emulator::launches() >= before + 8, "{} is computed by stock ops", case.name);
            }
            let failed: Vec<_> = checks.iter().filter(|check| !check.passed).collect();
            assert!(checks.len() >= 6 && failed.is_empty(), "{failed:#?}");
        }
    }
}
