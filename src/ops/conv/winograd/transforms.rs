//! The transforms of Winograd's minimal filtering F(2×2, 3×3) (arXiv 1509.09308), over adjacent channels.
//!
//! With `B`, `G` and `A` of the paper, a 4×4 patch `d` of the image, a 3×3 filter `g`, the 2×2 outputs `y`:
//! `y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A`, and the filter's gradient is `Gᵀ [(Bᵀ d B) ⊙ (A dy Aᵀ)] G`.

use crate::ops::simd::{
    Level, Real,
    vector::{Portable, Vector},
};

/// Elements of a transformed patch.
pub(super) const POINTS: usize = 16;

/// A patch of pixels and the location of its transform. All lengths are in elements.
#[derive(Clone, Copy)]
pub struct Patch<T> {
    pub pixels: *const T,
    /// Distances between the patch's rows, and between pixels of a row.
    pub row: usize,
    pub pixel: usize,
    /// Number of channels to transform.
    pub channels: usize,
    /// Location of channel 0 of point 0.
    pub to: *mut T,
    /// Distance between the 16 points.
    pub point: usize,
    /// Number of contiguous channels, and the distance between two such groups.
    pub group: usize,
    pub group_stride: usize,
}

/// Products of a patch, and the pixels that they become.
#[derive(Clone, Copy)]
pub struct Output<T> {
    pub products: *const T,
    pub point: usize,
    pub channels: usize,
    pub bias: *const T,
    /// Added to the output, at the same offsets; null: nothing.
    pub residual: *const T,
    pub y: *mut T,
    pub row: usize,
    /// Rows and columns of the output inside the image: 1 or 2.
    pub rows: usize,
    pub columns: usize,
}

/// The functions for one instruction set.
///
/// # Safety
/// Every element that the lengths reach must be in bounds; groups are multiples of 16 channels, or of the
/// kernel's width.
#[derive(Clone, Copy)]
pub struct Transforms<T> {
    /// 4×4 pixels → 16 points: Bᵀ d B.
    pub input: unsafe fn(Patch<T>),
    /// 2×2 gradients → 16 points: A dy Aᵀ.
    pub gradient: unsafe fn(Patch<T>),
    /// 16 points → 2×2 pixels: Aᵀ m A.
    pub output: unsafe fn(Output<T>),
}

impl<T: Real> Transforms<T> {
    pub(super) fn portable() -> Self {
        Self { input: input::<Portable<T>>, gradient: gradient::<Portable<T>>, output: output::<Portable<T>> }
    }
}

impl Transforms<f32> {
    #[cfg(target_arch = "x86_64")]
    pub(super) fn at(level: Level) -> Self {
        match level {
            Level::Avx512 => Self { input: avx512::input, gradient: avx512::gradient, output: avx512::output },
            Level::Avx2 => Self { input: avx2::input, gradient: avx2::gradient, output: avx2::output },
            Level::Baseline => Self::portable(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn at(_: Level) -> Self {
        Self::portable()
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! specialise {
    ($name:ident, $features:literal, $vector:ident) => {
        mod $name {
            use super::{Output, Patch};
            use std::arch::x86_64::$vector;

            #[target_feature(enable = $features)]
            pub(super) unsafe fn input(patch: Patch<f32>) {
                // SAFETY: the features are there, the rest is the caller's promise; the same below.
                unsafe { super::input::<$vector>(patch) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn gradient(patch: Patch<f32>) {
                // SAFETY: as above.
                unsafe { super::gradient::<$vector>(patch) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn output(output: Output<f32>) {
                // SAFETY: as above.
                unsafe { super::output::<$vector>(output) }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
specialise!(avx512, "avx512f", __m512);
#[cfg(target_arch = "x86_64")]
specialise!(avx2, "avx2,fma", __m256);

#[inline(always)]
unsafe fn input<V: Vector>(p: Patch<V::Element>) {
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..p.channels).step_by(V::LANES) {
            let mut rows = [[V::zero(); 4]; 4];
            for (i, row) in rows.iter_mut().enumerate() {
                let at = p.pixels.add(i * p.row + c);
                let d: [V; 4] = std::array::from_fn(|j| V::load(at.add(j * p.pixel)));
                *row = input_line(d);
            }
            let to = p.to.add(c / p.group * p.group_stride + c % p.group);
            let column = |j: usize| rows.map(|row| row[j]);
            for j in 0..4 {
                for (i, v) in input_line(column(j)).into_iter().enumerate() {
                    v.store(to.add((4 * i + j) * p.point));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn input_line<V: Vector>(d: [V; 4]) -> [V; 4] {
    // SAFETY: the caller's promise.
    unsafe { [d[0].sub(d[2]), d[1].add(d[2]), d[2].sub(d[1]), d[1].sub(d[3])] }
}

#[inline(always)]
unsafe fn gradient<V: Vector>(p: Patch<V::Element>) {
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..p.channels).step_by(V::LANES) {
            let at = p.pixels.add(c);
            let load = |i: usize| gradient_line([V::load(at.add(i * p.row)), V::load(at.add(i * p.row + p.pixel))]);
            let rows = [load(0), load(1)];
            let to = p.to.add(c / p.group * p.group_stride + c % p.group);
            let column = |j: usize| rows.map(|row| row[j]);
            for j in 0..4 {
                for (i, v) in gradient_line(column(j)).into_iter().enumerate() {
                    v.store(to.add((4 * i + j) * p.point));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn gradient_line<V: Vector>(y: [V; 2]) -> [V; 4] {
    // SAFETY: the caller's promise.
    unsafe { [y[0], y[0].add(y[1]), y[0].sub(y[1]), V::zero().sub(y[1])] }
}

#[inline(always)]
unsafe fn output<V: Vector>(p: Output<V::Element>) {
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..p.channels).step_by(V::LANES) {
            let at = p.products.add(c);
            let mut rows = [[V::zero(); 2]; 4];
            for (i, row) in rows.iter_mut().enumerate() {
                let m: [V; 4] = std::array::from_fn(|j| V::load(at.add((4 * i + j) * p.point)));
                *row = output_line(m);
            }
            let bias = V::load(p.bias.add(c));
            let column = |j: usize| rows.map(|row| row[j]);
            for j in 0..p.columns {
                for (i, v) in output_line(column(j)).into_iter().enumerate().take(p.rows) {
                    let offset = i * p.row + j * p.channels + c;
                    let mut v = v.add(bias);
                    if !p.residual.is_null() {
                        v = v.add(V::load(p.residual.add(offset)));
                    }
                    v.store(p.y.add(offset));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn output_line<V: Vector>(m: [V; 4]) -> [V; 2] {
    // SAFETY: the caller's promise.
    unsafe { [m[0].add(m[1]).add(m[2]), m[1].sub(m[2]).sub(m[3])] }
}
