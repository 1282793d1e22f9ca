//! What `vilg doctor` prints about this machine and this build.

use super::{cuda, device, processor::vector_units};
use std::fs::read_to_string;

/// What this machine offers and what this build contains, as (name, value).
pub fn facts() -> Vec<(&'static str, String)> {
    let build = if cfg!(debug_assertions) { "debug (slow: build with --release)" } else { "release" };
    vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("build", build.to_owned()),
        ("device", device::name()),
        ("cuda", cuda::describe()),
        ("nccl", if cfg!(feature = "nccl") { "built" } else { "not built" }.to_owned()),
        ("threads", rayon::current_num_threads().to_string()),
        ("processor", field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned())),
        ("vector units", vector_units().join(" ")),
        ("memory", memory("MemTotal")),
        ("memory available", memory("MemAvailable")),
        ("disk available here", disk().map_or("unknown".to_owned(), gigabytes)),
    ]
}

/// The first value of `name` in one of Linux's `name : value` files.
pub(super) fn field(file: &str, name: &str) -> Option<String> {
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
