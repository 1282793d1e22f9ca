//! The micro-kernel shared by all matrix products of attention: a tile of sums in registers.

use crate::ops::simd::{
    Level, Real, level,
    vector::{Portable, Vector},
};

/// Number of queries in a block, which are the lanes of its scores; also the number of columns of a full kernel.
pub(super) const LANES: usize = 16;

/// `C[m, n] = Σ over parts, Σₖ A[m, k] · B[k, n]`, plus the old C if `onto`. Strides are in elements. B and C have as
/// many columns as the kernel.
#[derive(Clone, Copy)]
pub(super) struct Product<'a, T> {
    pub rows: usize,
    pub a: *const T,
    pub a_row: usize,
    pub a_step: usize,
    pub b: *const T,
    pub b_step: usize,
    pub c: *mut T,
    pub c_row: usize,
    pub beta: bool,
    pub parts: &'a [Part],
}

/// A part of the sum over k: its offsets in A and B, and its number of steps.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub a: usize,
    pub b: usize,
    pub len: usize,
}

/// # Safety
/// Both functions reach every element that the strides of the product name.
#[derive(Clone, Copy)]
pub struct Kernel<T> {
    /// [`LANES`] columns.
    pub(super) full: unsafe fn(Product<T>),
    /// Half as many.
    pub(super) half: unsafe fn(Product<T>),
}

/// Element types of attention.
pub trait Element: Real {
    fn kernel() -> Kernel<Self>;
}

impl Element for f64 {
    fn kernel() -> Kernel<f64> {
        Kernel { full: run::<Portable<f64>, 2, 4>, half: run::<Portable<f64>, 4, 2> }
    }
}

impl Element for f32 {
    fn kernel() -> Kernel<f32> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Kernel { full: avx512_full, half: avx2_half },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Kernel { full: avx2_full, half: avx2_half },
            _ => Kernel { full: run::<Portable<f32>, 2, 4>, half: run::<Portable<f32>, 4, 2> },
        }
    }
}

macro_rules! specialise {
    ($name:ident, $features:literal, $vector:ident, $rows:literal, $columns:literal) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $name(product: Product<f32>) {
            // SAFETY: the features are there, the rest is the caller's promise.
            unsafe { run::<std::arch::x86_64::$vector, $rows, $columns>(product) }
        }
    };
}
specialise!(avx512_full, "avx512f", __m512, 8, 1);
// Twelve accumulators hide the latency of a multiply-add; eight reach 60 % of their speed.
specialise!(avx2_full, "avx2,fma", __m256, 6, 2);
specialise!(avx2_half, "avx2,fma", __m256, 8, 1);

/// Iterates over the rows of C, `M` ≤ 8 at a time. The last rows are split into two tiles of similar height instead of
/// a high one and one with a row or two.
#[inline(always)]
unsafe fn run<V: Vector<Element: Default>, const M: usize, const N: usize>(mut p: Product<V::Element>) {
    // SAFETY: the caller's promise; `advance` stays within the rows.
    unsafe {
        while p.rows >= M + 3 || p.rows == M {
            tile::<V, M, N>(&p);
            advance(&mut p, M);
        }
        while p.rows > 0 {
            let rows = if p.rows > M { p.rows.div_ceil(2) } else { p.rows };
            match rows {
                8 => tile::<V, 8, N>(&p),
                7 => tile::<V, 7, N>(&p),
                6 => tile::<V, 6, N>(&p),
                5 => tile::<V, 5, N>(&p),
                4 => tile::<V, 4, N>(&p),
                3 => tile::<V, 3, N>(&p),
                2 => tile::<V, 2, N>(&p),
                _ => tile::<V, 1, N>(&p),
            }
            advance(&mut p, rows);
        }
    }
}

#[inline(always)]
fn advance<T>(p: &mut Product<T>, rows: usize) {
    p.rows -= rows;
    p.a = p.a.wrapping_add(rows * p.a_row);
    p.c = p.c.wrapping_add(rows * p.c_row);
}

/// `M` rows of C, kept in registers over the whole sum.
#[inline(always)]
unsafe fn tile<V: Vector<Element: Default>, const M: usize, const N: usize>(p: &Product<V::Element>) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(V::Element::default()); N]; M];
        if p.beta {
            for (m, row) in sums.iter_mut().enumerate() {
                for (n, sum) in row.iter_mut().enumerate() {
                    *sum = V::load(p.c.add(m * p.c_row + n * V::LANES));
                }
            }
        }
        for part in p.parts {
            let (mut a, mut b) = (p.a.add(part.a), p.b.add(part.b));
            for _ in 0..part.len {
                let mut columns = [V::load(b); N];
                for (n, column) in columns.iter_mut().enumerate().skip(1) {
                    *column = V::load(b.add(n * V::LANES));
                }
                for (m, row) in sums.iter_mut().enumerate() {
                    let x = V::splat(*a.add(m * p.a_row));
                    for (sum, column) in row.iter_mut().zip(columns) {
                        *sum = x.mul_add(column, *sum);
                    }
                }
                // The step after the last one is never read.
                a = a.wrapping_add(p.a_step);
                b = b.wrapping_add(p.b_step);
            }
        }
        for (m, row) in sums.iter().enumerate() {
            for (n, sum) in row.iter().enumerate() {
                sum.store(p.c.add(m * p.c_row + n * V::LANES));
            }
        }
    }
}
