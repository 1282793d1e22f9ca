//! The inner loops of a product with packed weights: a few rows of x against panels of [`PANEL`] outputs.
//!
//! A panel stores its weights input by input: one step of the sum reads a short line of weights, converts it to f32 in
//! registers, and multiplies it by one number of each row of x. Weights are read once for up to six rows, and a single
//! row uses four panels side by side to hide the latency of the multiply-adds. An output is one chain of multiply-adds
//! over the inputs in order: its bits depend neither on other rows nor on the number of threads.

use crate::ops::simd::{Level, level};

/// Number of outputs of a panel.
pub(super) const PANEL: usize = 16;

/// Maximum number of rows of x per call.
pub(super) const ROWS: usize = 6;

/// Maximum number of panels per call.
pub(super) const PANELS: usize = 4;

/// 16 weights in f32.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct F32Line(pub [f32; PANEL]);

/// 16 weights in bf16. Output i is the low half of lane i and output i + 8 its high half, so that a shift and a mask
/// convert them.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Bf16Line(pub [u32; PANEL / 2]);

/// 16 weights in units of their output's scale.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Int8Line(pub [i8; PANEL]);

/// 16 sums, and the conversion of weights to factors.
///
/// # Safety
/// The functions of a type need its instruction set.
pub(super) trait Lanes: Copy {
    /// One number in every lane.
    type Splat: Copy;
    /// Number of panels side by side with [`ROWS`] rows, limited by the registers.
    const WIDE: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self::Splat;
    /// `self * x + sum`.
    unsafe fn mul_add(self, x: Self::Splat, sum: Self) -> Self;
    unsafe fn store(self, to: &mut [f32; PANEL]);
    unsafe fn from_f32(line: &F32Line) -> Self;
    unsafe fn from_bf16(line: &Bf16Line) -> Self;
    unsafe fn from_int8(line: &Int8Line) -> Self;
}

/// A line of weights in some format.
pub(super) trait Line: Copy + Send + Sync {
    /// # Safety
    /// Needs the instruction set of `L`.
    unsafe fn widen<L: Lanes>(&self) -> L;
}

macro_rules! line {
    ($line:ty, $from:ident) => {
        impl Line for $line {
            #[inline(always)]
            unsafe fn widen<L: Lanes>(&self) -> L {
                // SAFETY: the caller's promise.
                unsafe { L::$from(self) }
            }
        }
    };
}
line!(F32Line, from_f32);
line!(Bf16Line, from_bf16);
line!(Int8Line, from_int8);

/// `sums[r * panels + p]` = the products of row r of `x (rows, inputs)` with panel p of `lines (panels, inputs)`.
pub(super) fn sums<W: Line>(sums: &mut [[f32; PANEL]], x: &[f32], lines: &[W], inputs: usize) {
    let (rows, panels) = (x.len() / inputs, lines.len() / inputs);
    assert!(x.len() == rows * inputs && lines.len() == panels * inputs && sums.len() == rows * panels);
    match level() {
        // SAFETY: `level` only returns what the processor supports.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::avx512(sums, x, lines, inputs, (rows, panels)) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::avx2(sums, x, lines, inputs, (rows, panels)) },
        // SAFETY: portable lanes need no instruction set.
        _ => unsafe { any_tile::<Portable, W>(sums, x, lines, inputs, (rows, panels)) },
    }
}

/// The number of panels side by side for a number of rows.
pub(super) fn panels_beside(rows: usize) -> usize {
    let wide = match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => x86::Avx512::WIDE,
        _ => 1,
    };
    match rows {
        1 => PANELS,
        2 | 3 => 2,
        _ => wide,
    }
}

#[inline(always)]
unsafe fn any_tile<L: Lanes, W: Line>(
    sums: &mut [[f32; PANEL]],
    x: &[f32],
    lines: &[W],
    inputs: usize,
    shape: (usize, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        match shape {
            (1, 4) => tile::<L, W, 1, 4>(sums, x, lines, inputs),
            (1, 3) => tile::<L, W, 1, 3>(sums, x, lines, inputs),
            (1, 2) => tile::<L, W, 1, 2>(sums, x, lines, inputs),
            (1, 1) => tile::<L, W, 1, 1>(sums, x, lines, inputs),
            (2, 2) => tile::<L, W, 2, 2>(sums, x, lines, inputs),
            (2, 1) => tile::<L, W, 2, 1>(sums, x, lines, inputs),
            (3, 2) => tile::<L, W, 3, 2>(sums, x, lines, inputs),
            (3, 1) => tile::<L, W, 3, 1>(sums, x, lines, inputs),
            (4, 2) if L::WIDE == 2 => tile::<L, W, 4, 2>(sums, x, lines, inputs),
            (4, 1) => tile::<L, W, 4, 1>(sums, x, lines, inputs),
            (5, 2) if L::WIDE == 2 => tile::<L, W, 5, 2>(sums, x, lines, inputs),
            (5, 1) => tile::<L, W, 5, 1>(sums, x, lines, inputs),
            (6, 2) if L::WIDE == 2 => tile::<L, W, 6, 2>(sums, x, lines, inputs),
            (6, 1) => tile::<L, W, 6, 1>(sums, x, lines, inputs),
            (rows, panels) => panic!("no tile of {rows} rows and {panels} panels"),
        }
    }
}

/// `R` rows and `P` panels, with all sums in registers.
#[inline(always)]
unsafe fn tile<L: Lanes, W: Line, const R: usize, const P: usize>(
    out: &mut [[f32; PANEL]],
    x: &[f32],
    lines: &[W],
    inputs: usize,
) {
    // SAFETY: the caller guarantees the instruction set. Slices of equal length let the compiler drop bounds checks.
    unsafe {
        let x: [&[f32]; R] = std::array::from_fn(|r| &x[r * inputs..][..inputs]);
        let lines: [&[W]; P] = std::array::from_fn(|p| &lines[p * inputs..][..inputs]);
        let mut sums = [[L::zero(); P]; R];
        for i in 0..inputs {
            let mut w = [L::zero(); P];
            for p in 0..P {
                w[p] = lines[p].get_unchecked(i).widen::<L>();
            }
            for r in 0..R {
                let x = L::splat(*x[r].get_unchecked(i));
                for p in 0..P {
                    sums[r][p] = w[p].mul_add(x, sums[r][p]);
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
            sum.store(out);
        }
    }
}

/// Lanes for any instruction set.
#[derive(Clone, Copy)]
struct Portable([f32; PANEL]);

impl Lanes for Portable {
    type Splat = f32;
    const WIDE: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; PANEL])
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    unsafe fn mul_add(self, x: f32, sum: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * x + sum.0[i]))
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut [f32; PANEL]) {
        *to = self.0;
    }

    #[inline(always)]
    unsafe fn from_f32(line: &F32Line) -> Self {
        Self(line.0)
    }

    #[inline(always)]
    unsafe fn from_bf16(line: &Bf16Line) -> Self {
        let half = |i: usize| if i < 8 { line.0[i] << 16 } else { line.0[i - 8] & 0xffff_0000 };
        Self(std::array::from_fn(|i| f32::from_bits(half(i))))
    }

    #[inline(always)]
    unsafe fn from_int8(line: &Int8Line) -> Self {
        Self(line.0.map(f32::from))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<W: Line>(
        sums: &mut [[f32; PANEL]],
        x: &[f32],
        lines: &[W],
        inputs: usize,
        shape: (usize, usize),
    ) {
        // SAFETY: the features are there.
        unsafe { any_tile::<Avx2, W>(sums, x, lines, inputs, shape) }
    }

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub unsafe fn avx512<W: Line>(
        sums: &mut [[f32; PANEL]],
        x: &[f32],
        lines: &[W],
        inputs: usize,
        shape: (usize, usize),
    ) {
        // SAFETY: the features are there.
        unsafe { any_tile::<Avx512, W>(sums, x, lines, inputs, shape) }
    }

    /// All ones in the upper half of each lane.
    const HIGH: i32 = 0xffff_0000_u32 as i32;

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    // SAFETY of the blocks below: the features are the caller's promise; lines are as long and as aligned as the loads
    // ask.
    impl Lanes for Avx2 {
        type Splat = __m256;
        const WIDE: usize = 1;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, x: __m256, sum: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, x, sum.0), _mm256_fmadd_ps(self.1, x, sum.1)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut [f32; PANEL]) {
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn from_f32(line: &F32Line) -> Self {
            let line = line.0.as_ptr();
            unsafe { Self(_mm256_load_ps(line), _mm256_load_ps(line.add(8))) }
        }

        #[inline(always)]
        unsafe fn from_bf16(line: &Bf16Line) -> Self {
            unsafe {
                let both = _mm256_load_si256(line.0.as_ptr().cast());
                let (low, high) = (_mm256_slli_epi32::<16>(both), _mm256_and_si256(both, _mm256_set1_epi32(HIGH)));
                Self(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }

        #[inline(always)]
        unsafe fn from_int8(line: &Int8Line) -> Self {
            let line = line.0.as_ptr();
            unsafe {
                let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(line.cast()));
                let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(line.add(8).cast()));
                Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
            }
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY of the blocks below: as above.
    impl Lanes for Avx512 {
        type Splat = __m512;
        const WIDE: usize = 2;

        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { Self(_mm512_setzero_ps()) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, x: __m512, sum: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, x, sum.0)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut [f32; PANEL]) {
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        unsafe fn from_f32(line: &F32Line) -> Self {
            unsafe { Self(_mm512_load_ps(line.0.as_ptr())) }
        }

        #[inline(always)]
        unsafe fn from_bf16(line: &Bf16Line) -> Self {
            unsafe {
                let both = _mm512_broadcast_i64x4(_mm256_load_si256(line.0.as_ptr().cast()));
                let shifts = _mm512_set_epi64(0, 0, 0, 0, SHIFTS, SHIFTS, SHIFTS, SHIFTS);
                let moved = _mm512_sllv_epi32(both, shifts);
                Self(_mm512_castsi512_ps(_mm512_and_si512(moved, _mm512_set1_epi32(HIGH))))
            }
        }

        #[inline(always)]
        unsafe fn from_int8(line: &Int8Line) -> Self {
            unsafe {
                let all = _mm512_cvtepi8_epi32(_mm_load_si128(line.0.as_ptr().cast()));
                Self(_mm512_cvtepi32_ps(all))
            }
        }
    }

    /// 16 in each of two lanes.
    const SHIFTS: i64 = 16 << 32 | 16;
}
