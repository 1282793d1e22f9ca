//! The scalar type of the kernels, and kernels compiled for several instruction sets.
//!
//! A function written with [`multiversion!`] is compiled for AVX-512, for AVX2 + FMA and for the target's baseline; the
//! best version for the processor is chosen at run time. The compiler vectorizes plain loops; sums need the explicit
//! lanes of [`dot`] and [`sum`], because it may not reorder float additions.
//!
//! Parallel loops must be outside of these functions: a closure called by rayon does not inherit the instruction set.

pub(super) mod vector;

use candle_core::{CpuStorage, WithDType};
use std::ops::Neg;

/// `f32`, or `f64` for gradient checks.
pub trait Real: WithDType + Neg<Output = Self> {
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    /// `self * b + c`, rounded once if `FMA` says that the processor has fused multiply-add.
    fn fma<const FMA: bool>(self, b: Self, c: Self) -> Self;

    /// e to this power. For `f32` a vectorizable approximation (2 ulp) that gives 0 below -87.3 and stays finite above
    /// 88.3.
    fn exp(self) -> Self;

    fn sqrt(self) -> Self;

    /// The elements of a storage of this type.
    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn fma<const FMA: bool>(self, b: Self, c: Self) -> Self {
        if FMA { self.mul_add(b, c) } else { self * b + c }
    }

    /// 2^n · e^r with |r| ≤ ln 2 / 2 (Cephes `expf`). The rounding constant leaves n in the low bits of the mantissa.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
        let x = if self > 88.3 { 88.3 } else { self };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
        let mut p = 1.987_569_1e-4;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p * r + c;
        }
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
        let y = (p * r * r + r + 1.0) * power;
        if self < -87.3 { 0.0 } else { y }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(all) = storage { Some(all) } else { None }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn fma<const FMA: bool>(self, b: Self, c: Self) -> Self {
        if FMA { self.mul_add(b, c) } else { self * b + c }
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }

    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F64(all) = storage { Some(all) } else { None }
    }
}

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Baseline,
    Avx2,
    Avx512,
}

/// The best level of this processor.
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = tests::FORCED.get() {
        return level;
    }
    #[cfg(target_arch = "x86_64")]
    {
        let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        if fma && wide {
            return Level::Avx512;
        }
        if fma {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// Compiles a function for every [`Level`] and calls the best one. Write it as
/// `multiversion! { pub fn name<T: Real, const FMA: bool>(x: &mut [T]) -> T { .. } }`; callers only give `T`. The body
/// passes
/// `FMA` on to [`Real::fma`] and to `#[inline(always)]` helpers such as [`dot`].
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$T:ident: $bound:path, const FMA: bool>(
        $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name<$T: $bound>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$T: $bound, const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")]
                fn avx512<$T: $bound>($($arg: $ty),*) $(-> $ret)? {
                    body::<$T, true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$T: $bound>($($arg: $ty),*) $(-> $ret)? {
                    body::<$T, true>($($arg),*)
                }
                match $crate::ops::simd::level() {
                    // SAFETY: `level` answers only what the processor has.
                    $crate::ops::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::ops::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::ops::simd::Level::Baseline => {}
                }
            }
            body::<$T, { cfg!(any(target_feature = "fma", target_arch = "aarch64")) }>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Number of independent sums of a reduction, so that it fills vector registers.
const LANES: usize = 32;

/// Sums lanes pairwise.
#[inline(always)]
pub fn add_lanes<T: Real, const N: usize>(mut lanes: [T; N]) -> T {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest of the lanes.
#[inline(always)]
pub fn max_lanes<T: Real, const N: usize>(mut lanes: [T; N]) -> T {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// lanes += a·b.
#[inline(always)]
pub fn fma_lanes<T: Real, const FMA: bool, const N: usize>(lanes: &mut [T; N], a: &[T; N], b: &[T; N]) {
    for i in 0..N {
        lanes[i] = a[i].fma::<FMA>(b[i], lanes[i]);
    }
}

/// total + a·b, for the remainder after whole lanes.
#[inline(always)]
pub fn fma_rest<T: Real, const FMA: bool>(mut total: T, a: &[T], b: &[T]) -> T {
    for (&a, &b) in a.iter().zip(b) {
        total = a.fma::<FMA>(b, total);
    }
    total
}

/// Σ aᵢ·bᵢ over the shorter length.
#[inline(always)]
pub fn dot<T: Real, const FMA: bool>(a: &[T], b: &[T]) -> T {
    let n = a.len().min(b.len());
    let ((a, a_rest), (b, b_rest)) = (a[..n].as_chunks::<LANES>(), b[..n].as_chunks::<LANES>());
    let mut lanes = [T::ZERO; LANES];
    for (a, b) in a.iter().zip(b) {
        fma_lanes::<T, FMA, LANES>(&mut lanes, a, b);
    }
    fma_rest::<T, FMA>(add_lanes(lanes), a_rest, b_rest)
}

/// Σ xᵢ.
#[inline(always)]
pub fn sum<T: Real>(x: &[T]) -> T {
    let (x, rest) = x.as_chunks::<LANES>();
    let mut lanes = [T::ZERO; LANES];
    for x in x {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    let mut total = add_lanes(lanes);
    for &x in rest {
        total += x;
    }
    total
}

/// The largest element; -∞ for an empty slice. NaN is ignored.
#[inline(always)]
pub fn max<T: Real>(x: &[T]) -> T {
    let (x, rest) = x.as_chunks::<LANES>();
    let mut lanes = [T::NEG_INFINITY; LANES];
    for x in x {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    let mut largest = max_lanes(lanes);
    for &x in rest {
        largest = if x > largest { x } else { largest };
    }
    largest
}

/// y += a·x.
#[inline(always)]
pub fn axpy<T: Real, const FMA: bool>(y: &mut [T], a: T, x: &[T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.fma::<FMA>(x, *y);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// Overrides the level for kernels called on this thread, in tests.
        pub static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
    }

    multiversion! {
        fn exp_all<T: Real, const FMA: bool>(x: &mut [T]) {
            x.iter_mut().for_each(|x| *x = Real::exp(*x));
        }
    }

    multiversion! {
        fn dot_dispatched<T: Real, const FMA: bool>(a: &[T], b: &[T]) -> T {
            dot::<T, FMA>(a, b)
        }
    }

    fn each_level(test: impl Fn(Level)) {
        let best = level();
        for l in [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|&l| l <= best) {
            FORCED.set(Some(l));
            test(l);
            FORCED.set(None);
        }
    }

    #[test]
    fn exp_is_accurate_at_every_level() {
        each_level(|level| {
            let x: Vec<f32> = (-87_300..88_300).map(|i| i as f32 / 1000.0).collect();
            let mut y = x.clone();
            exp_all(&mut y);
            for (x, y) in x.iter().zip(&y) {
                let expected = f64::from(*x).exp();
                assert!((f64::from(*y) / expected - 1.0).abs() < 3e-7, "{level:?}: exp({x}) = {y}");
            }
            let mut special = [f32::NEG_INFINITY, -100.0, 0.0, 1000.0, f32::NAN];
            exp_all(&mut special);
            assert_eq!(special[..3], [0.0, 0.0, 1.0]);
            assert!(special[3] > 1e38 && special[3].is_finite() && special[4].is_nan());
        });
    }

    #[test]
    fn dot_and_sum_are_right_for_every_length_and_level() {
        each_level(|level| {
            for n in [0, 1, 31, 32, 33, 64, 95, 200] {
                let a: Vec<f64> = (0..n).map(|i| (i % 7) as f64 - 2.0).collect();
                let b: Vec<f64> = (0..n).map(|i| (i % 5) as f64 - 1.0).collect();
                let expected: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
                assert_eq!(dot_dispatched(&a, &b), expected, "{level:?}, {n} elements");
                assert_eq!(sum(&a), a.iter().sum::<f64>());
                assert_eq!(max(&a), a.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            }
        });
    }
}
