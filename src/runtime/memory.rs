//! Memory of this process: allocator settings and usage.

use super::facts::field;

/// Keeps freed memory in the process. A training step frees and allocates the same buffers again and again; glibc would
/// return each to the kernel, and the page faults of using it again take a third of the time of a step.
///
/// One arena for all threads, because glibc unmaps the empty heaps of the others at any threshold, and maps each
/// block beyond 64 MiB there anew. Threads allocate small blocks from caches of their own.
pub fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets allocator parameters; it is called before any other thread starts.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1); // never
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Resident memory of this process in bytes; 0 if the system does not report it.
pub fn resident_bytes() -> u64 {
    status_bytes("VmRSS").unwrap_or(0)
}

/// Peak resident memory of this process in bytes, since its start or since [`restart_peak`].
pub fn peak_bytes() -> Option<u64> {
    status_bytes("VmHWM")
}

fn status_bytes(name: &str) -> Option<u64> {
    let line = field("/proc/self/status", name)?;
    Some(line.strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Frees unused memory, resets [`peak_bytes`] and returns the resident memory; `None` if the system cannot do it.
pub fn restart_peak() -> Option<u64> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim only releases memory that is not in use.
    unsafe {
        libc::malloc_trim(0);
    }
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    status_bytes("VmRSS")
}
