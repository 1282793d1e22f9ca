//! This process's memory: how the allocator keeps it, and how much of it is in RAM.

use super::facts::field;

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
