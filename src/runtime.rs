//! Threads, memory and the device of this process, chosen once at start.

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
