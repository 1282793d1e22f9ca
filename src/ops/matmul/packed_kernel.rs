//! The inner loops of a product with packed weights: a few rows of x against groups of [`PANELS`] panels of [`PANEL`]
//! outputs.
//!
//! With few rows the product takes the time of reading the weights, so they are stored in the order in which they are read:
//! two inputs of the first panel of a group, of the second …, then the next two inputs. The stream is prefetched, since
//! hardware prefetchers stop at the end of each page of 4 KB. A line is converted to f32 in registers and multiplied by two
//! numbers of each row of x; all sums of up to six rows stay in registers. An output is one chain of multiply-adds over the
//! inputs in order: its bits depend neither on other rows nor on the number of threads.

use crate::ops::simd::{Level, level};

/// Number of outputs of a panel.
pub(super) const PANEL: usize = 16;

/// Number of panels of a group.
pub(super) const PANELS: usize = 4;

/// Maximum number of rows of x per call.
pub(super) const ROWS: usize = 6;

/// Number of inputs of a line.
pub(super) const DEPTH: usize = 2;

/// How many bytes ahead of their use weights are fetched.
const AHEAD: usize = 8192;

/// The sums of one row of x with a group.
pub(super) type Group = [[f32; PANEL]; PANELS];

/// Weights in f32 of two inputs and 16 outputs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct F32Line(pub [[f32; PANEL]; DEPTH]);

/// Weights in bf16. The first input is the low half of each lane and the second one its high half, so that a shift and a
/// mask convert them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Bf16Line(pub [u32; PANEL]);

/// Weights divided by their output's scale.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Int8Line(pub [[i8; PANEL]; DEPTH]);

/// 16 sums, and the conversion of weights to factors.
///
/// # Safety
/// The functions of a type need its instruction set.
pub(super) trait Lanes: Copy {
    /// One number in every lane.
    type Splat: Copy;
    /// Number of panels that fit in the registers beside each other, for each number of rows from 1 on.
    const BESIDE: [usize; ROWS];
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self::Splat;
    /// `self * x + sum`.
    unsafe fn mul_add(self, x: Self::Splat, sum: Self) -> Self;
    unsafe fn store(self, to: &mut [f32; PANEL]);
    unsafe fn from_f32(line: &F32Line) -> [Self; DEPTH];
    unsafe fn from_bf16(line: &Bf16Line) -> [Self; DEPTH];
    unsafe fn from_int8(line: &Int8Line) -> [Self; DEPTH];
    /// Fetches the cache line at an address, which need not be one of this process.
    unsafe fn prefetch(address: *const i8);
}

/// A line of weights in some format.
pub(super) trait Line: Copy + Send + Sync {
    /// # Safety
    /// Needs the instruction set of `L`.
    unsafe fn widen<L: Lanes>(&self) -> [L; DEPTH];
}

macro_rules! line {
    ($line:ty, $from:ident) => {
        impl Line for $line {
            #[inline(always)]
            unsafe fn widen<L: Lanes>(&self) -> [L; DEPTH] {
                // SAFETY: the caller's promise.
                unsafe { L::$from(self) }
            }
        }
    };
}
line!(F32Line, from_f32);
line!(Bf16Line, from_bf16);
line!(Int8Line, from_int8);

/// `sums[r]` = the products of row r of `x (rows, inputs)` with the group `lines (inputs / 2, panels)`; an odd number of
/// inputs is rounded up.
pub(super) fn sums<W: Line>(sums: &mut [Group], x: &[f32], lines: &[W], inputs: usize) {
    assert!(x.len() == sums.len() * inputs && lines.len() == inputs.div_ceil(DEPTH) * PANELS);
    match level() {
        // SAFETY: `level` only returns what the processor supports.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::avx512(sums, x, lines, inputs) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::avx2(sums, x, lines, inputs) },
        // SAFETY: portable lanes need no instruction set.
        _ => unsafe { any_rows::<Portable, W>(sums, x, lines, inputs) },
    }
}

#[inline(always)]
unsafe fn any_rows<L: Lanes, W: Line>(sums: &mut [Group], x: &[f32], lines: &[W], inputs: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match sums.len() {
            1 => group::<L, W, 1>(sums, x, lines, inputs),
            2 => group::<L, W, 2>(sums, x, lines, inputs),
            3 => group::<L, W, 3>(sums, x, lines, inputs),
            4 => group::<L, W, 4>(sums, x, lines, inputs),
            5 => group::<L, W, 5>(sums, x, lines, inputs),
            6 => group::<L, W, 6>(sums, x, lines, inputs),
            rows => panic!("no product for {rows} rows"),
        }
    }
}

/// `R` rows and all panels of a group, as many beside each other as the registers hold.
#[inline(always)]
unsafe fn group<L: Lanes, W: Line, const R: usize>(sums: &mut [Group], x: &[f32], lines: &[W], inputs: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..PANELS).step_by(L::BESIDE[R - 1]) {
            match L::BESIDE[R - 1] {
                4 => tile::<L, W, R, 4>(sums, x, lines, (inputs, first)),
                2 => tile::<L, W, R, 2>(sums, x, lines, (inputs, first)),
                _ => tile::<L, W, R, 1>(sums, x, lines, (inputs, first)),
            }
        }
    }
}

/// `R` rows and `P` panels from panel `first` on, with all sums in registers.
#[allow(clippy::needless_range_loop, reason = "counted loops of constant length are unrolled into registers")]
#[inline(always)]
unsafe fn tile<L: Lanes, W: Line, const R: usize, const P: usize>(
    out: &mut [Group],
    x: &[f32],
    lines: &[W],
    (inputs, first): (usize, usize),
) {
    // SAFETY: the caller guarantees the instruction set. Slices of equal length let the compiler drop bounds checks.
    unsafe {
        let x: [&[f32]; R] = std::array::from_fn(|r| &x[r * inputs..][..inputs]);
        let mut sums = [[L::zero(); P]; R];
        let lines = lines.as_chunks::<PANELS>().0;
        for i in 0..inputs / DEPTH {
            let line = lines.get_unchecked(i).as_ptr().add(first);
            let ahead = line.cast::<i8>().wrapping_add(AHEAD);
            for offset in (0..size_of::<[W; P]>()).step_by(64) {
                L::prefetch(ahead.wrapping_add(offset));
            }
            let mut w = [[L::zero(); DEPTH]; P];
            for p in 0..P {
                w[p] = (*line.add(p)).widen::<L>();
            }
            for n in 0..DEPTH {
                for r in 0..R {
                    let x = L::splat(*x[r].get_unchecked(DEPTH * i + n));
                    for p in 0..P {
                        sums[r][p] = w[p][n].mul_add(x, sums[r][p]);
                    }
                }
            }
        }
        if inputs % DEPTH > 0 {
            for r in 0..R {
                let x = L::splat(x[r][inputs - 1]);
                for p in 0..P {
                    let [w, _] = lines[inputs / DEPTH][first + p].widen::<L>();
                    sums[r][p] = w.mul_add(x, sums[r][p]);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(&sums) {
            for (out, sum) in out[first..].iter_mut().zip(sums) {
                sum.store(out);
            }
        }
    }
}

/// Lanes for any instruction set.
#[derive(Clone, Copy)]
struct Portable([f32; PANEL]);

impl Lanes for Portable {
    type Splat = f32;
    const BESIDE: [usize; ROWS] = [1; ROWS];

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
    unsafe fn from_f32(line: &F32Line) -> [Self; DEPTH] {
        line.0.map(Self)
    }

    #[inline(always)]
    unsafe fn from_bf16(line: &Bf16Line) -> [Self; DEPTH] {
        [line.0.map(|pair| pair << 16), line.0.map(|pair| pair & 0xffff_0000)]
            .map(|bits| Self(bits.map(f32::from_bits)))
    }

    #[inline(always)]
    unsafe fn from_int8(line: &Int8Line) -> [Self; DEPTH] {
        line.0.map(|line| Self(line.map(f32::from)))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const i8) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<W: Line>(sums: &mut [Group], x: &[f32], lines: &[W], inputs: usize) {
        // SAFETY: the features are there.
        unsafe { any_rows::<Avx2, W>(sums, x, lines, inputs) }
    }

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub unsafe fn avx512<W: Line>(sums: &mut [Group], x: &[f32], lines: &[W], inputs: usize) {
        // SAFETY: the features are there.
        unsafe { any_rows::<Avx512, W>(sums, x, lines, inputs) }
    }

    /// All ones in the upper half of each lane.
    const HIGH: i32 = 0xffff_0000_u32 as i32;

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256, __m256);

    // SAFETY of the blocks below: the features are the caller's promise; lines are as long and as aligned as the loads
    // ask.
    impl Lanes for Avx2 {
        type Splat = __m256;
        const BESIDE: [usize; ROWS] = [4, 2, 1, 1, 1, 1];

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
        unsafe fn from_f32(line: &F32Line) -> [Self; DEPTH] {
            let of = |line: &[f32; PANEL]| unsafe {
                Self(_mm256_load_ps(line.as_ptr()), _mm256_load_ps(line.as_ptr().add(8)))
            };
            [of(&line.0[0]), of(&line.0[1])]
        }

        #[inline(always)]
        unsafe fn from_bf16(line: &Bf16Line) -> [Self; DEPTH] {
            unsafe {
                let pairs = line.0.as_ptr().cast::<__m256i>();
                let (a, b) = (_mm256_load_si256(pairs), _mm256_load_si256(pairs.add(1)));
                let low = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
                let high = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(HIGH)));
                [Self(low(a), low(b)), Self(high(a), high(b))]
            }
        }

        #[inline(always)]
        unsafe fn from_int8(line: &Int8Line) -> [Self; DEPTH] {
            let eight =
                |from: *const i8| unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) };
            let of = |line: &[i8; PANEL]| unsafe { Self(eight(line.as_ptr()), eight(line.as_ptr().add(8))) };
            [of(&line.0[0]), of(&line.0[1])]
        }

        #[inline(always)]
        unsafe fn prefetch(address: *const i8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address) }
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY of the blocks below: as above.
    impl Lanes for Avx512 {
        type Splat = __m512;
        const BESIDE: [usize; ROWS] = [PANELS; ROWS];

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
        unsafe fn from_f32(line: &F32Line) -> [Self; DEPTH] {
            let of = |line: &[f32; PANEL]| unsafe { Self(_mm512_load_ps(line.as_ptr())) };
            [of(&line.0[0]), of(&line.0[1])]
        }

        #[inline(always)]
        unsafe fn from_bf16(line: &Bf16Line) -> [Self; DEPTH] {
            unsafe {
                let pairs = _mm512_load_si512(line.0.as_ptr().cast());
                let high = _mm512_and_si512(pairs, _mm512_set1_epi32(HIGH));
                [_mm512_slli_epi32::<16>(pairs), high].map(|bits| Self(_mm512_castsi512_ps(bits)))
            }
        }

        #[inline(always)]
        unsafe fn from_int8(line: &Int8Line) -> [Self; DEPTH] {
            let of = |line: &[i8; PANEL]| unsafe {
                Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(line.as_ptr().cast()))))
            };
            [of(&line.0[0]), of(&line.0[1])]
        }

        #[inline(always)]
        unsafe fn prefetch(address: *const i8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address) }
        }
    }
}
