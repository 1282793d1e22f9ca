//! The device of a process or rank, opened at the first use and kept.

use super::{cuda, gpu::DeviceMemory};
use crate::{
    error::{Result, usage},
    report,
};
use candle_core::{Device, DeviceLocation};
use rayon::ThreadPoolBuilder;
use std::{
    cell::Cell,
    collections::BTreeMap,
    str::FromStr,
    sync::{Mutex, OnceLock, PoisonError},
};

/// The value of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The first CUDA device if this build supports CUDA and the device opens, else the CPU.
    Auto,
    Cpu,
    /// One CUDA device by number; without a number, one by local rank.
    Cuda(Option<usize>),
}

impl FromStr for Wanted {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => Ok(Self::Cuda(Some(number))),
                _ => Err("expected auto, cpu, cuda or cuda:N"),
            },
        }
    }
}

static WANTED: OnceLock<Wanted> = OnceLock::new();

thread_local! {
    static LOCAL_RANK: Cell<usize> = const { Cell::new(0) };
}

/// Sets the device for the whole process. Only the first call has an effect, and no device is opened yet.
pub fn choose_device(wanted: Wanted) {
    let _ = WANTED.set(wanted);
}

/// Sets the local rank of the calling thread; thread pools started by it inherit the rank. Before, a thread has local
/// rank 0.
pub fn set_local_rank(rank: usize) {
    LOCAL_RANK.set(rank);
}

/// Builder of a pool whose threads have the local rank of the calling thread.
pub(super) fn pool() -> ThreadPoolBuilder {
    let rank = LOCAL_RANK.get();
    ThreadPoolBuilder::new().start_handler(move |_| set_local_rank(rank))
}

/// The device of this rank; every call returns the same device.
///
/// # Errors
/// `--device` asks for CUDA, but this build has no CUDA, there is no driver or no such device; or other ranks have a
/// device and this rank's cannot be opened.
pub fn device() -> Result<Device> {
    // CUDA is detected once per process, so that no rank falls back to the CPU alone.
    static FOUND: OnceLock<bool> = OnceLock::new();
    match WANTED.get().copied().unwrap_or(Wanted::Auto) {
        Wanted::Cpu => Ok(Device::Cpu),
        Wanted::Cuda(number) => cuda_device(number),
        Wanted::Auto => match *FOUND.get_or_init(found) {
            true => cuda_device(None),
            false => Ok(Device::Cpu),
        },
    }
}

/// Whether CUDA is available. If a device exists but cannot be opened, a warning is printed.
fn found() -> bool {
    let opened = cuda_device(None);
    if let Err(error) = &opened
        && cuda::count().is_ok()
    {
        report::warn(format_args!("{error}; computing on the CPU"));
    }
    opened.is_ok()
}

/// Opens a device once: tensors created through two handles of one device cannot be combined.
fn cuda_device(number: Option<usize>) -> Result<Device> {
    static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let number = match number {
        Some(number) => number,
        // If there are more ranks than devices, ranks share devices.
        None => LOCAL_RANK.get() % cuda::count()?,
    };
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.get(&number) {
        return Ok(device.clone());
    }
    let device = cuda::open(number)?;
    opened.insert(number, device.clone());
    Ok(device)
}

/// The memory of this rank's device; `None` on the CPU, or if the driver does not report it.
pub fn device_memory() -> Option<DeviceMemory> {
    cuda_number().and_then(cuda::memory)
}

/// The name of this rank's device, as `NVIDIA H100 80GB HBM3`; `None` on the CPU.
pub fn device_model() -> Option<String> {
    cuda_number().and_then(cuda::model)
}

/// The number of this rank's device, if it is one of CUDA.
fn cuda_number() -> Option<usize> {
    match device().ok()?.location() {
        DeviceLocation::Cuda { gpu_id } => Some(gpu_id),
        _ => None,
    }
}

/// Refuses `--device cuda` for commands that run only on the CPU.
pub fn cpu_only(what: &str) -> Result<()> {
    match WANTED.get() {
        Some(Wanted::Cuda(_)) => Err(usage(format_args!("{what} runs only on the CPU"), "leave out --device")),
        _ => Ok(()),
    }
}

/// `cpu` or `cuda:N`, or why no device is available.
pub(super) fn name() -> String {
    match device().map(|device| device.location()) {
        Ok(DeviceLocation::Cpu) => "cpu".to_owned(),
        Ok(DeviceLocation::Cuda { gpu_id: number } | DeviceLocation::Metal { gpu_id: number }) => {
            format!("cuda:{number}")
        }
        Err(error) => format!("none: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_help() {
        let wanted = ["auto", "cpu", "cuda", "cuda:3"].map(str::parse::<Wanted>);
        assert_eq!(wanted, [Wanted::Auto, Wanted::Cpu, Wanted::Cuda(None), Wanted::Cuda(Some(3))].map(Ok));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA"] {
            assert!(text.parse::<Wanted>().is_err(), "{text}");
        }
    }

    #[test]
    fn pools_have_the_rank_that_started_them() {
        set_local_rank(3);
        let seen = super::super::with_threads(2, || rayon::broadcast(|_| LOCAL_RANK.get())).unwrap();
        assert_eq!(seen, [3, 3]);
        set_local_rank(0);
    }
}
