//! A vector register for the micro-kernels of convolution and attention: AVX-512, AVX2 with FMA, or portable lanes,
//! chosen at run time.

use super::Real;

/// A register of `LANES` numbers.
///
/// # Safety
/// `load` and `store` access `LANES` elements starting at `p`; the functions of a type need its instruction set.
pub(in crate::ops) trait Vector: Copy {
    type Element: Copy;
    const LANES: usize;
    unsafe fn load(p: *const Self::Element) -> Self;
    unsafe fn store(self, p: *mut Self::Element);
    unsafe fn splat(x: Self::Element) -> Self;
    unsafe fn zero() -> Self;
    /// `self * factor + addend`.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
}

/// Portable lanes, for `f64` (only used in gradient checks) and for other processors.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Portable<T>([T; 4]);

impl<T: Real> Vector for Portable<T> {
    type Element = T;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn load(p: *const T) -> Self {
        // SAFETY: the caller vouches for four elements; arrays have their element's alignment.
        unsafe { Self(*p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut T) {
        // SAFETY: as in `load`.
        unsafe { *p.cast() = self.0 }
    }

    #[inline(always)]
    unsafe fn splat(x: T) -> Self {
        Self([x; 4])
    }

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([T::ZERO; 4])
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($register:ty, $lanes:literal, $load:ident, $store:ident, $splat:ident, $fma:ident, $add:ident, $sub:ident) => {
            impl Vector for $register {
                type Element = f32;
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $load(p) }
                }

                #[inline(always)]
                unsafe fn store(self, p: *mut f32) {
                    // SAFETY: the caller's promise.
                    unsafe { $store(p, self) }
                }

                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $splat(x) }
                }

                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $splat(0.0) }
                }

                #[inline(always)]
                unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $fma(self, factor, addend) }
                }

                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $add(self, other) }
                }

                #[inline(always)]
                unsafe fn sub(self, other: Self) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $sub(self, other) }
                }
            }
        };
    }
    vector!(
        __m512,
        16,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        _mm512_sub_ps
    );
    vector!(
        __m256,
        8,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_sub_ps
    );
}
