//! Threads, memory and the device of this process, chosen once at start.

#[cfg_attr(not(feature = "cuda"), path = "runtime/cuda_disabled.rs")]
mod cuda;
mod device;
mod mapped;

pub use device::{Wanted, choose_device, cpu_only, device, set_local_rank};
pub use mapped::Mapped;

use crate::error::{Context, Result};
use std::{fs::read_to_string, sync::OnceLock};

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

/// Sizes the one thread pool of the process (rayon's global one); `None`: one thread a core.
///
/// # Errors
/// The threads cannot be started.
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    let builder = device::pool().num_threads(threads.unwrap_or(0)).stack_size(STACK);
    builder.build_global().context("cannot start the compute threads")
}

/// Bytes of a compute thread's stack: as much as a main thread has.
const STACK: usize = 8 << 20;

/// Runs `f` on one of the compute threads. Parallel loops then begin and end there without waking up a thread that
/// sleeps, which costs more than a small matrix product.
pub fn on_threads<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Runs `f` on one of `threads` compute threads that are `f`'s alone: a rank's share of the machine.
///
/// # Errors
/// The threads cannot be started.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> Result<R> {
    let pool = device::pool().num_threads(threads).stack_size(STACK).build();
    Ok(pool.context("cannot start the compute threads of a rank")?.install(f))
}

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

/// The instruction sets that make a difference to us.
fn vector_units() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("amx-bf16", amx_bf16()),
        ];
        found.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec!["baseline"]
}

/// Whether AMD made the processor.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe, reason = "cpuid is an unsafe function in older compilers that we support")]
pub fn amd() -> bool {
    // SAFETY: every x86-64 processor has cpuid.
    let maker = unsafe { std::arch::x86_64::__cpuid(0) };
    let [b, d, c] = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
    [b, d, c].as_flattened() == b"AuthenticAMD"
}

/// Whether this process may use AMX tiles with bf16. Asked once: the processor, whether the system saves the tiles, and
/// (Linux) for the permission that a process needs before it touches their 8 KiB of state.
pub fn amx_bf16() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(amx::usable)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// Number of the tiles' data among the parts of a processor's extended state; 17 is their configuration.
    const TILE_DATA: u32 = 18;

    pub fn usable() -> bool {
        present() && permitted()
    }

    /// The processor has AMX with bf16, and the system has enabled it.
    #[allow(unused_unsafe, reason = "cpuid is an unsafe function in older compilers that we support")]
    fn present() -> bool {
        const OSXSAVE: u32 = 1 << 27;
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        // SAFETY: every x86-64 processor has cpuid.
        let (largest, first) = unsafe { (__cpuid(0).eax, __cpuid(1)) };
        if largest < 7 || first.ecx & OSXSAVE == 0 {
            return false;
        }
        let wanted = AMX_BF16 | AMX_TILE;
        // SAFETY: OSXSAVE says that the instruction is there.
        let enabled = unsafe { _xgetbv(0) } >> (TILE_DATA - 1) & 0b11 == 0b11;
        // SAFETY: as above, and it answers leaf 7.
        unsafe { __cpuid_count(7, 0) }.edx & wanted == wanted && enabled
    }

    /// Linux gives the tiles' state to processes that ask for it.
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        // SAFETY: this request only marks the process; it has no pointer arguments.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod amx {
    pub fn usable() -> bool {
        false
    }
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
