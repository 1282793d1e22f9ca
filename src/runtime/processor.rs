//! What the processor can do: asked at run time, since one binary runs on all x86-64 machines.

use std::sync::OnceLock;

/// The instruction sets that make a difference to us.
pub(super) fn vector_units() -> Vec<&'static str> {
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
