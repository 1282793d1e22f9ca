//! The AMX matrix unit: eight tile registers of 16 rows × 64 bytes and an instruction that multiplies two tiles of
//! bf16 pairs into a tile of f32. Instructions as in Intel's Software Developer's Manual, volume 2; written in
//! assembly, because Rust's intrinsics for them are not stable. So far this code has run only in an emulator, so it is
//! off unless the user asks for it with `--amx`.

use super::tile::{LINES, Panel, Tile};
use crate::ops::matmul::matrix::Beta;
use std::marker::PhantomData;

/// Proof that AMX with bf16 may be used; a value only exists where it may.
#[derive(Clone, Copy)]
pub struct Amx(#[cfg(target_arch = "x86_64")] (), #[cfg(not(target_arch = "x86_64"))] std::convert::Infallible);

impl Amx {
    /// `None` unless the user asked for AMX (`--amx`), the processor has it, and the system permits it.
    pub fn get() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if usable() {
            return Some(Self(()));
        }
        None
    }

    /// Configures the tiles of this thread for products with `rows ≤ 16` rows in each tile of the left factor.
    pub(super) fn tiles(self, rows: usize) -> Tiles {
        assert!(rows <= LINES, "a tile has 16 rows");
        #[cfg(target_arch = "x86_64")]
        {
            let mut shape = Shape { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
            shape.bytes[..8].fill(64);
            shape.rows[..6].fill(rows as u8);
            shape.rows[6..8].fill(LINES as u8);
            // SAFETY: `self` proves that the instruction exists; it reads the 64 bytes of a valid configuration.
            unsafe {
                std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const shape, options(nostack, readonly));
            }
            Tiles { this_thread: PhantomData }
        }
        #[cfg(not(target_arch = "x86_64"))]
        match self.0 {}
    }
}

#[cfg(target_arch = "x86_64")]
fn usable() -> bool {
    #[cfg(all(test, target_os = "linux"))]
    if super::amx_emulator::active() {
        return true;
    }
    crate::runtime::amx_bf16()
}

/// The argument of `ldtilecfg`: bytes per row and rows of each tile.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// The configured tiles of this thread: 0–3 for C, 4 and 5 for A, 6 and 7 for B. Dropping this releases them.
pub(in crate::ops) struct Tiles {
    this_thread: PhantomData<*const ()>,
}

#[cfg(target_arch = "x86_64")]
impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a value of `Tiles` only exists where AMX does.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Tiles {
    /// C (32 × 32) = A·B or C += A·B, with rows of C `stride` floats apart.
    ///
    /// Each pair of tiles loaded from A and B is used twice, which halves the loads of a product tile by tile.
    ///
    /// # Safety
    /// The tiles are configured for 16 rows; C can be read (if beta is one) and written.
    pub unsafe fn square(&self, a: &Panel, b: &Panel, c: *mut f32, stride: usize, beta: Beta) {
        assert!(a.len() == b.len() && !a.is_empty(), "the inner sizes differ");
        // SAFETY: the loop reads the `a.len()` blocks of 2 KiB of both panels; the rest is the caller's promise.
        unsafe {
            std::arch::asm!(
                "test {beta:e}, {beta:e}",
                "jz 3f",
                "tileloadd tmm0, [{c} + {stride}]",
                "tileloadd tmm1, [{c} + {stride} + 64]",
                "tileloadd tmm2, [{lower} + {stride}]",
                "tileloadd tmm3, [{lower} + {stride} + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm6, [{b} + {row}]",
                "tileloadd tmm5, [{a} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetcht0 [{b} + 4096]",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{c} + {stride}], tmm0",
                "tilestored [{c} + {stride} + 64], tmm1",
                "tilestored [{lower} + {stride}], tmm2",
                "tilestored [{lower} + {stride} + 64], tmm3",
                beta = in(reg) u32::from(beta == Beta::One),
                c = in(reg) c,
                lower = in(reg) c.wrapping_add(LINES * stride),
                stride = in(reg) stride * size_of::<f32>(),
                row = in(reg) 64usize,
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                blocks = inout(reg) a.len() => _,
                options(nostack)
            );
        }
    }

    /// C (rows × 32) = A·B or C += A·B for the few rows for which the tiles are configured. B is read once, with
    /// prefetching.
    ///
    /// # Safety
    /// C can be read (if beta is one) and written; its rows are `stride` floats apart.
    pub unsafe fn flat(&self, a: &[[Tile; 1]], b: &Panel, c: *mut f32, stride: usize, beta: Beta) {
        assert!(a.len() == b.len() && !a.is_empty(), "the inner sizes differ");
        // SAFETY: the loop reads the `a.len()` blocks of both panels (1 and 2 KiB); the rest is the caller's promise.
        unsafe {
            std::arch::asm!(
                "test {beta:e}, {beta:e}",
                "jz 3f",
                "tileloadd tmm0, [{c} + {stride}]",
                "tileloadd tmm1, [{c} + {stride} + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm6, [{b} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "prefetcht0 [{b} + 8192]",
                "prefetcht0 [{b} + 9216]",
                "add {a}, 1024",
                "add {b}, 2048",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{c} + {stride}], tmm0",
                "tilestored [{c} + {stride} + 64], tmm1",
                beta = in(reg) u32::from(beta == Beta::One),
                c = in(reg) c,
                stride = in(reg) stride * size_of::<f32>(),
                row = in(reg) 64usize,
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                blocks = inout(reg) a.len() => _,
                options(nostack)
            );
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Tiles {
    /// As above; there are no `Tiles` here.
    pub unsafe fn square(&self, _: &Panel, _: &Panel, _: *mut f32, _: usize, _: Beta) {}

    /// As above; there are no `Tiles` here.
    pub unsafe fn flat(&self, _: &[[Tile; 1]], _: &Panel, _: *mut f32, _: usize, _: Beta) {}
}
