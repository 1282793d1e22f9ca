//! Threads, memory and the device of this process, chosen once at start.

use crate::error::{Context, Result};
use candle_core::Device;
use std::fs::read_to_string;

/// Keeps freed memory in the process. A training step frees and allocates the same buffers over and
/// over; glibc would give each back to the kernel and fault it in again (a third of the time of a step).
pub fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets allocator parameters; it is called before any other thread starts.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// The device that everything runs on.
pub fn device() -> Device {
    Device::Cpu
}

/// Sizes the one thread pool of the process (rayon's global one); `None`: one thread a core.
///
/// # Errors
/// The threads cannot be started.
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0));
    builder.build_global().context("cannot start the compute threads")
}

/// What this machine offers and what this build contains, as (name, value).
pub fn facts() -> Vec<(&'static str, String)> {
    let build = if cfg!(debug_assertions) { "debug (slow: build with --release)" } else { "release" };
    vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("build", build.to_owned()),
        ("device", "cpu".to_owned()),
        ("cuda", "not built".to_owned()),
        ("threads", rayon::current_num_threads().to_string()),
        ("processor", field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned())),
        ("vector units", vector_units().join(" ")),
        ("memory", memory("MemTotal")),
        ("memory available", memory("MemAvailable")),
        ("disk available here", disk().map_or("unknown".to_owned(), gigabytes)),
    ]
}

/// The instruction sets that make a difference to us.
fn vector_units() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        ];
        found.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec!["baseline"]
}

/// The first value of `name` in one of Linux's `name : value` files.
fn field(file: &str, name: &str) -> Option<String> {
    let text = read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

fn memory(name: &str) -> String {
    let kilobytes = field("/proc/meminfo", name).and_then(|v| v.split(' ').next()?.parse::<u64>().ok());
    kilobytes.map_or("unknown".to_owned(), |kb| gigabytes(kb * 1024))
}

/// Bytes that a user may still write below the current folder.
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

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// Memory of this process that is in RAM, in bytes; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    status_bytes("VmRSS").unwrap_or(0)
}

/// The most memory that this process has had in RAM, in bytes, since it began or since [`restart_peak`].
pub fn peak_bytes() -> Option<u64> {
    status_bytes("VmHWM")
}

fn status_bytes(name: &str) -> Option<u64> {
    let line = field("/proc/self/status", name)?;
    Some(line.strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Gives freed memory back, lets [`peak_bytes`] begin anew and returns what is in RAM now; `None` where the system cannot.
pub fn restart_peak() -> Option<u64> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim only returns memory that nobody uses.
    unsafe {
        libc::malloc_trim(0);
    }
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    status_bytes("VmRSS")
}
