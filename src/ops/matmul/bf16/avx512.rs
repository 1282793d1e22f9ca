//! AVX-512's dot products of bf16 pairs (`VDPBF16PS`), on the tiles of [`super::tile`].

use super::tile::{LINES, Panel, Tile};
use crate::ops::{
    matmul::matrix::Beta,
    simd::{Level, level},
};

/// Number of rows of C kept in registers, with [`super::tile::SIDE`] columns each: enough sums to hide the latency of
/// an instruction, and few enough loads of A for two columns of B.
const ROWS: usize = 8;

/// Proof that the instructions may be used; a value only exists where they may.
#[derive(Clone, Copy)]
pub struct Avx512Bf16(#[cfg(target_arch = "x86_64")] (), #[cfg(not(target_arch = "x86_64"))] std::convert::Infallible);

impl Avx512Bf16 {
    /// `None` if the processor or the system lacks the instructions.
    pub fn get() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16") {
            return Some(Self(()));
        }
        None
    }

    /// Whether these instructions are faster than f32 instructions: 1.8 times the multiplications per second on AMD's
    /// Zen 5, fewer on Intel's Sapphire Rapids (both measured).
    pub(super) fn beats_f32(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return crate::runtime::amd();
        #[cfg(not(target_arch = "x86_64"))]
        match self.0 {}
    }

    /// C (32 × 32) = A·B or C += A·B.
    ///
    /// # Safety
    /// C can be read (if beta is one) and written; its rows are `stride` floats apart.
    pub(super) unsafe fn square(self, a: &Panel, b: &Panel, c: *mut f32, stride: usize, beta: Beta) {
        // SAFETY: passed on.
        unsafe { self.lines(a, 2 * LINES, b, c, stride, beta) }
    }

    /// The same for the first `rows ≤ 16` rows.
    ///
    /// # Safety
    /// As above.
    pub(super) unsafe fn flat(self, a: &[[Tile; 1]], rows: usize, b: &Panel, c: *mut f32, stride: usize, beta: Beta) {
        // SAFETY: passed on.
        unsafe { self.lines(a, rows, b, c, stride, beta) }
    }

    unsafe fn lines<const N: usize>(
        self,
        a: &[[Tile; N]],
        rows: usize,
        b: &Panel,
        c: *mut f32,
        stride: usize,
        beta: Beta,
    ) {
        assert!(rows <= N * LINES && a.len() == b.len(), "the factors do not fit");
        for first in (0..rows).step_by(ROWS) {
            let c = Lines { start: c.wrapping_add(first * stride), stride, rows: ROWS.min(rows - first), beta };
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves that the instructions exist, and the rows are the caller's. Tiles have a multiple
            // of
            // `ROWS` rows.
            unsafe {
                pass(a, first, b, &c);
            }
            #[cfg(not(target_arch = "x86_64"))]
            match self.0 {}
        }
    }
}

/// Up to [`ROWS`] rows of C.
struct Lines {
    start: *mut f32,
    stride: usize,
    rows: usize,
    beta: Beta,
}

/// Rows `first..first + ROWS` of A times B, for as many of them as C has.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pass<const N: usize>(a: &[[Tile; N]], first: usize, b: &Panel, c: &Lines) {
    use std::arch::x86_64::*;
    // SAFETY: any 64 bytes are 32 bf16 numbers.
    let pairs = |words: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(words) };
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    // SAFETY: the rows of C are the caller's, 32 floats each; rows of a tile are 64 bytes long.
    unsafe {
        if c.beta == Beta::One {
            for (i, sums) in sums.iter_mut().enumerate().take(c.rows) {
                let row = c.start.add(i * c.stride);
                *sums = [_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(LINES))];
            }
        }
        let (tile, first) = (first / LINES, first % LINES);
        for (a, b) in a.iter().zip(b) {
            let a: &[[u32; LINES]; ROWS] = &*a[tile].0[first..].as_ptr().cast();
            for pair in 0..LINES {
                let b = [0, 1].map(|i| pairs(_mm512_load_si512(b[i].0[pair].as_ptr().cast())));
                for (sums, a) in sums.iter_mut().zip(a) {
                    let a = pairs(_mm512_set1_epi32(a[pair] as i32));
                    sums[0] = _mm512_dpbf16_ps(sums[0], a, b[0]);
                    sums[1] = _mm512_dpbf16_ps(sums[1], a, b[1]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate().take(c.rows) {
            let row = c.start.add(i * c.stride);
            _mm512_storeu_ps(row, sums[0]);
            _mm512_storeu_ps(row.add(LINES), sums[1]);
        }
    }
}
