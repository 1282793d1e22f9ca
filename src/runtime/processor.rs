//! Features of the processor, detected at run time because one binary runs on all x86-64 machines.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

/// The vector instruction sets that kernels use, as far as the processor has them.
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

/// Whether the processor is made by AMD.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe, reason = "cpuid is an unsafe function in older compilers that we support")]
pub fn amd() -> bool {
    // SAFETY: every x86-64 processor has cpuid.
    let maker = unsafe { std::arch::x86_64::__cpuid(0) };
    let [b, d, c] = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
    [b, d, c].as_flattened() == b"AuthenticAMD"
}

/// Whether the user asked for AMX.
static AMX_WANTED: AtomicBool = AtomicBool::new(false);

/// Enables AMX for this process if the processor has it. Must be called before the first matrix product. Off by
/// default, because the AMX code has only run in an emulator so far.
pub fn want_amx() {
    AMX_WANTED.store(true, Ordering::Relaxed);
}

/// Whether AMX tiles with bf16 are used: the user asked for them, the processor has them, and the system saves their
/// state and (on Linux, asked once) permits this process to use them.
pub fn amx_bf16() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    AMX_WANTED.load(Ordering::Relaxed) && *USABLE.get_or_init(amx::usable)
}

/// The line of `vilg doctor` about AMX.
pub(super) fn amx_state() -> &'static str {
    amx_state_of(amx::present(), amx_bf16(), AMX_WANTED.load(Ordering::Relaxed))
}

fn amx_state_of(present: bool, usable: bool, wanted: bool) -> &'static str {
    match (present, usable, wanted) {
        (false, ..) => "not available on this processor",
        (true, _, false) => "present but off: so far tested only in an emulator; switch it on with --amx",
        (true, false, true) => "present, but the system does not permit it",
        (true, true, true) => "on",
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    /// State component of the tile data (XTILEDATA) in XCR0; 17 is the tile configuration.
    const TILE_DATA: u32 = 18;

    pub fn usable() -> bool {
        present() && permitted()
    }

    /// Whether the processor has AMX with bf16 and the system has enabled it.
    #[allow(unused_unsafe, reason = "cpuid is an unsafe function in older compilers that we support")]
    pub fn present() -> bool {
        const OSXSAVE: u32 = 1 << 27;
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        // SAFETY: every x86-64 processor has cpuid.
        let (largest, first) = unsafe { (__cpuid(0).eax, __cpuid(1)) };
        if largest < 7 || first.ecx & OSXSAVE == 0 {
            return false;
        }
        let wanted = AMX_BF16 | AMX_TILE;
        // SAFETY: OSXSAVE says that the instruction exists.
        let enabled = unsafe { _xgetbv(0) } >> (TILE_DATA - 1) & 0b11 == 0b11;
        // SAFETY: as above, and the processor supports leaf 7.
        unsafe { __cpuid_count(7, 0) }.edx & wanted == wanted && enabled
    }

    /// Asks Linux for permission to use the tile state.
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        // SAFETY: this request only marks the process; it has no pointer arguments.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod amx {
    pub fn present() -> bool {
        false
    }

    pub fn usable() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amx_is_off_until_it_is_asked_for() {
        assert!(!amx_bf16(), "no test asks for it");
        assert!(amx_state_of(true, false, false).contains("--amx"));
        assert!(!amx_state_of(false, false, true).contains("--amx"));
        assert_eq!(amx_state_of(true, true, true), "on");
    }
}
