//! The micro-kernel of convolution, without im2col: it reads the padded image in place.
//!
//! `C[m, n] += Σ_outer Σ_inner A[m, outer, inner] · B[outer, inner, n]`. A is read element by element with its own
//! strides, and rows of B are contiguous. In NHWC this form covers all three products:
//!
//! | | m | n | outer | inner |
//! | --- | --- | --- | --- | --- |
//! | forward, input gradient | pixels of a row | output channels | kernel row | kernel column × input channel |
//! | weight gradient | kernel column × input channel | output channels | image row | image column |

use crate::ops::simd::{
    Level, Real, level,
    vector::{Portable, Vector},
};

/// One product. Strides are in elements. C has `m` rows and the width of one panel ([`Kernel::width`]). `fresh`: the
/// old content of C is ignored.
#[derive(Clone, Copy)]
pub struct Product<T> {
    pub m: usize,
    pub outer: usize,
    pub inner: usize,
    pub a: *const T,
    pub a_m: usize,
    pub a_outer: usize,
    pub a_inner: usize,
    pub b: *const T,
    pub b_outer: usize,
    pub b_inner: usize,
    pub c: *mut T,
    pub c_m: usize,
    pub fresh: bool,
}

/// Element types of convolution.
pub trait Element: Real {
    /// The kernel for products with `n` columns.
    fn kernel(n: usize) -> Kernel<Self>;
}

/// A micro-kernel and its number of columns.
#[derive(Clone, Copy)]
pub struct Kernel<T> {
    /// Number of columns of B and C per call.
    pub width: usize,
    /// # Safety
    /// Every element that the product's strides reach must be in bounds.
    pub run: unsafe fn(Product<T>),
}

impl Element for f64 {
    fn kernel(_: usize) -> Kernel<f64> {
        Kernel { width: 8, run: run::<Portable<f64>, 4, 2> }
    }
}

impl Element for f32 {
    fn kernel(n: usize) -> Kernel<f32> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if n <= 16 => Kernel { width: 16, run: avx512_narrow },
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Kernel { width: 32, run: avx512_wide },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 if n <= 8 => Kernel { width: 8, run: avx2_narrow },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Kernel { width: 16, run: avx2_wide },
            _ => Kernel { width: 8, run: run::<Portable<f32>, 4, 2> },
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
// Enough accumulators to hide the latency of a fused multiply-add: 12 of 16 registers, or half of 32.
specialise!(avx512_wide, "avx512f", __m512, 8, 2);
specialise!(avx512_narrow, "avx512f", __m512, 8, 1);
specialise!(avx2_wide, "avx2,fma", __m256, 6, 2);
specialise!(avx2_narrow, "avx2,fma", __m256, 8, 1);

/// Iterates over the rows of C, `M` at a time.
#[inline(always)]
unsafe fn run<V: Vector, const M: usize, const N: usize>(mut product: Product<V::Element>) {
    // SAFETY: the caller's promise; `advance` stays within `m`.
    unsafe {
        // A tile of two rows would wait for its own sums: 4 + 4 rows are faster than 6 + 2.
        while product.m >= M && product.m != M + 2 {
            tile::<V, M, N>(&product);
            advance(&mut product, M);
        }
        while product.m >= 4 {
            tile::<V, 4, N>(&product);
            advance(&mut product, 4);
        }
        while product.m >= 2 {
            tile::<V, 2, N>(&product);
            advance(&mut product, 2);
        }
        if product.m == 1 {
            tile::<V, 1, N>(&product);
        }
    }
}

#[inline(always)]
unsafe fn advance<T>(product: &mut Product<T>, rows: usize) {
    product.m -= rows;
    // SAFETY: at most one past the last row.
    unsafe {
        product.a = product.a.add(rows * product.a_m);
        product.c = product.c.add(rows * product.c_m);
    }
}

/// `M` rows of C, kept in registers over the whole sum.
#[inline(always)]
unsafe fn tile<V: Vector, const M: usize, const N: usize>(p: &Product<V::Element>) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::zero(); N]; M];
        if !p.fresh {
            for (m, row) in sums.iter_mut().enumerate() {
                for (n, sum) in row.iter_mut().enumerate() {
                    *sum = V::load(p.c.add(m * p.c_m + n * V::LANES));
                }
            }
        }
        for outer in 0..p.outer {
            let mut a = p.a.add(outer * p.a_outer);
            let mut b = p.b.add(outer * p.b_outer);
            for _ in 0..p.inner {
                let mut columns = [V::load(b); N];
                for (n, column) in columns.iter_mut().enumerate().skip(1) {
                    *column = V::load(b.add(n * V::LANES));
                }
                for (m, row) in sums.iter_mut().enumerate() {
                    let x = V::splat(*a.add(m * p.a_m));
                    for (sum, column) in row.iter_mut().zip(columns) {
                        *sum = x.mul_add(column, *sum);
                    }
                }
                // The step after the last one is never read.
                a = a.wrapping_add(p.a_inner);
                b = b.wrapping_add(p.b_inner);
            }
        }
        for (m, row) in sums.iter().enumerate() {
            for (n, sum) in row.iter().enumerate() {
                sum.store(p.c.add(m * p.c_m + n * V::LANES));
            }
        }
    }
}
