//! The processor's unit that multiplies pairs of bf16 and sums in f32: AVX-512 BF16, or AMX with `--amx`.

use super::{
    amx::{Amx, Tiles},
    avx512::Avx512Bf16,
    tile::{Panel, Tile},
};
use crate::{config::Precision, ops::matmul::matrix::Beta};

/// A unit that this processor has. Their sums differ in the last bits.
#[derive(Clone, Copy)]
pub enum Bf16Unit {
    Amx(Amx),
    Avx512(Avx512Bf16),
}

impl Bf16Unit {
    /// The fastest unit; `None` if f32 is faster.
    pub fn get() -> Option<Self> {
        let avx512 = || Avx512Bf16::get().filter(|unit| unit.beats_f32()).map(Self::Avx512);
        Amx::get().map(Self::Amx).or_else(avx512)
    }

    /// The unit for products in `precision`; `None` if `precision` is not bf16 or the processor has no unit.
    pub fn for_precision(precision: Precision) -> Option<Self> {
        match precision {
            Precision::F32 | Precision::F16 => None,
            Precision::Bf16 => Self::get(),
        }
    }

    /// Prepares this thread for products with `rows ≤ 16` rows in each tile of the left factor.
    pub(in crate::ops) fn ready(self, rows: usize) -> Ready {
        match self {
            Self::Amx(amx) => Ready::Amx(amx.tiles(rows)),
            Self::Avx512(unit) => Ready::Avx512(unit, rows),
        }
    }
}

/// A unit prepared for this thread until this is dropped.
pub(in crate::ops) enum Ready {
    Amx(Tiles),
    Avx512(Avx512Bf16, usize),
}

impl Ready {
    /// C (32 × 32) = A·B or C += A·B, with rows of C `stride` floats apart.
    ///
    /// # Safety
    /// The unit is ready for 16 rows; C can be read (if beta is one) and written.
    pub unsafe fn square(&self, a: &Panel, b: &Panel, c: *mut f32, stride: usize, beta: Beta) {
        // SAFETY: passed on.
        match self {
            Self::Amx(tiles) => unsafe { tiles.square(a, b, c, stride, beta) },
            Self::Avx512(unit, _) => unsafe { unit.square(a, b, c, stride, beta) },
        }
    }

    /// C (rows × 32) = A·B or C += A·B for the few rows for which the unit is ready. B is read once or twice, in order.
    ///
    /// # Safety
    /// C can be read (if beta is one) and written; its rows are `stride` floats apart.
    pub unsafe fn flat(&self, a: &[[Tile; 1]], b: &Panel, c: *mut f32, stride: usize, beta: Beta) {
        // SAFETY: passed on.
        match self {
            Self::Amx(tiles) => unsafe { tiles.flat(a, b, c, stride, beta) },
            Self::Avx512(unit, rows) => unsafe { unit.flat(a, *rows, b, c, stride, beta) },
        }
    }
}
