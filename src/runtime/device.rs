//! The device that a process or rank computes on, opened at the first use and kept.

use super::cuda;
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

/// What `--device` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// CUDA where this build has it and a device opens, else the CPU.
    Auto,
    Cpu,
    /// One CUDA device by number, or the one of the local rank.
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

/// Chooses for the whole process; only the first call counts. Nothing is opened yet.
pub fn choose_device(wanted: Wanted) {
    let _ = WANTED.set(wanted);
}

/// Says which of this machine's ranks the calling thread works for; the pools that it starts inherit it. Before it, a
/// thread works for rank 0.
pub fn set_local_rank(rank: usize) {
    LOCAL_RANK.set(rank);
}

/// A pool whose threads work for the calling thread's rank.
pub(super) fn pool() -> ThreadPoolBuilder {
    let rank = LOCAL_RANK.get();
    ThreadPoolBuilder::new().start_handler(move |_| set_local_rank(rank))
}

/// The device that everything of this rank runs on: always the same one.
///
/// # Errors
/// `--device` asks for CUDA, and this build has none, there is no driver, or no such device; or some ranks have a device
/// and this one's does not open.
pub fn device() -> Result<Device> {
    // Whether there is CUDA is found out once, so that no rank falls back alone.
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

/// Whether CUDA can be had. A device that is there and does not open is not passed over in silence.
fn found() -> bool {
    let opened = cuda_device(None);
    if let Err(error) = &opened
        && cuda::count().is_ok()
    {
        report::warn(format_args!("{error}; computing on the CPU"));
    }
    opened.is_ok()
}

/// The opened device: tensors of two handles on one device would not mix.
fn cuda_device(number: Option<usize>) -> Result<Device> {
    static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let number = match number {
        Some(number) => number,
        // More ranks than devices share them.
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

/// Refuses `--device cuda` for what runs on the CPU only.
pub fn cpu_only(what: &str) -> Result<()> {
    match WANTED.get() {
        Some(Wanted::Cuda(_)) => Err(usage(format_args!("{what} is for the CPU only"), "leave --device away")),
        _ => Ok(()),
    }
}

/// `cpu` or `cuda:N`, or why there is none.
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
    fn pools_work_for_the_rank_that_started_them() {
        set_local_rank(3);
        let seen = super::super::with_threads(2, || rayon::broadcast(|_| LOCAL_RANK.get())).unwrap();
        assert_eq!(seen, [3, 3]);
        set_local_rank(0);
    }
}
