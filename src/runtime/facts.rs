//! Facts about this machine and this build, for `vilg doctor`.

use super::{
    cuda, device,
    processor::{amx_state, vector_units},
};
use std::fs::read_to_string;

/// Facts about this machine and this build.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `release` or `debug`.
    pub build: &'static str,
    /// The device that commands would use, or why none is available.
    pub device: String,
    pub cuda: String,
    pub nccl: &'static str,
    pub threads: usize,
    pub processor: String,
    pub vector_units: Vec<&'static str>,
    /// Whether the processor has AMX and whether matrix products use it.
    pub amx: &'static str,
    /// RAM of the machine in bytes; `None` if the system does not report it.
    pub memory_bytes: Option<u64>,
    pub memory_available_bytes: Option<u64>,
    /// Free disk space below the current folder in bytes.
    pub disk_available_here_bytes: Option<u64>,
}

/// Collects the facts.
pub fn facts() -> Facts {
    Facts {
        build: if cfg!(debug_assertions) { "debug (slow: build with --release)" } else { "release" },
        device: device::name(),
        cuda: cuda::summary(),
        nccl: if cfg!(feature = "nccl") { "built" } else { "not built" },
        threads: rayon::current_num_threads(),
        processor: field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        vector_units: vector_units(),
        amx: amx_state(),
        memory_bytes: memory("MemTotal"),
        memory_available_bytes: memory("MemAvailable"),
        disk_available_here_bytes: disk(),
    }
}

/// The name of this machine; empty if the system does not report it.
pub fn host_name() -> String {
    read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// The command line of this process, with the program.
pub fn command_line() -> Vec<String> {
    std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect()
}

/// What all processes of this machine, and no others, have in common. A container is a machine of its own.
pub fn host_identity() -> String {
    host_name() + &read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// The value of the first line `name : value` of a Linux file such as `/proc/cpuinfo`.
pub(super) fn field(file: &str, name: &str) -> Option<String> {
    let text = read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The value of a field of `/proc/meminfo`, in bytes.
fn memory(name: &str) -> Option<u64> {
    let kilobytes: u64 = field("/proc/meminfo", name)?.split(' ').next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Free disk space below the current folder in bytes, as far as the user may use it.
fn disk() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: statvfs fills the plain struct that it is given; the path ends in NUL.
        let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
        let done = unsafe { libc::statvfs(c".".as_ptr(), &mut stat) } == 0;
        done.then(|| stat.f_bavail as u64 * stat.f_frsize as u64)
    }
    #[cfg(not(target_os = "linux"))]
    None
}
