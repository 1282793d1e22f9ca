//! Threads, memory and the device of this process, chosen once at start.

use crate::error::{Context, Result};
use candle_core::Device;

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

/// Sizes the one thread pool of the process (rayon's global one).
///
/// # Errors
/// The threads cannot be started.
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0));
    builder.build_global().context("cannot start the compute threads")
}

/// What this machine offers and what this build contains, as (name, value).
pub fn facts() -> Vec<(&'static str, String)> {
    vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("device", "cpu".to_owned()),
        ("threads", rayon::current_num_threads().to_string()),
        ("cuda", "not built".to_owned()),
    ]
}
