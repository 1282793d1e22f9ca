//! General matrix product on slices, through the `gemm` crate (packed, AVX-512 if available).

pub use super::matrix::{Beta, Matrix};
use super::{
    bf16::{gemm::gemm_bf16, unit::Bf16Unit},
    epilogue::Epilogue,
    matrix::SERIAL_WORK,
};
use crate::{
    config::Precision,
    ops::{simd::Real, slices::CHUNK},
};
use gemm::Parallelism;
use half::{f16, slice::HalfFloatSliceExt, vec::HalfFloatVecExt};
use rayon::prelude::*;

/// C = alpha·A·B (+ C), on all threads if there is enough work. `c` is row-major `a.rows × b.columns`.
pub fn gemm<T: Real>(c: &mut [T], beta: Beta, alpha: f64, a: Matrix<T>, b: Matrix<T>) {
    let work = a.rows * a.columns * b.columns;
    let serial = work < SERIAL_WORK || rayon::current_num_threads() == 1;
    let columns = b.columns;
    product(c, columns, beta, alpha, a, b, if serial { Parallelism::None } else { Parallelism::Rayon(0) });
}

/// [`gemm()`] of f32 matrices, computed in `precision`: bf16 only if there is a [`Bf16Unit`]. f16 rounds the factors as
/// a GPU would (to infinity beyond 65504) and is no faster.
pub fn gemm_in(precision: Precision, c: &mut [f32], beta: Beta, alpha: f32, a: Matrix<f32>, b: Matrix<f32>) {
    match Bf16Unit::for_precision(precision) {
        Some(unit) => gemm_bf16(unit, c, beta, alpha, a, b, Epilogue::NONE),
        None if precision == Precision::F16 => {
            let [x, y] = [a.data, b.data].map(rounded_to_f16);
            gemm(c, beta, f64::from(alpha), Matrix { data: &x, ..a }, Matrix { data: &y, ..b });
        }
        None => gemm(c, beta, f64::from(alpha), a, b),
    }
}

/// Factors rounded to f16; beyond 65504 they become infinite.
pub(in crate::ops) fn rounded_to_f16<T: Real>(x: &[T]) -> Vec<T> {
    let round = |x: &[T]| {
        let x: Vec<f32> = x.iter().map(|x| x.to_f64() as f32).collect();
        Vec::<f16>::from_f32_slice(&x).to_f32_vec().into_iter().map(|x| T::from_f64(f64::from(x)))
    };
    x.par_chunks(CHUNK).flat_map_iter(round).collect()
}

/// [`gemm()`] on the calling thread, for loops that are already parallel. Rows of C are `stride` elements apart.
pub fn gemm_serial<T: Real>(c: &mut [T], stride: usize, beta: Beta, alpha: f64, a: Matrix<T>, b: Matrix<T>) {
    product(c, stride, beta, alpha, a, b, Parallelism::None);
}

fn product<T: Real>(
    c: &mut [T],
    stride: usize,
    beta: Beta,
    alpha: f64,
    a: Matrix<T>,
    b: Matrix<T>,
    parallelism: Parallelism,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner sizes differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && c.len() >= (m - 1) * stride + n, "destination out of bounds");
    // SAFETY: `Matrix` and the assertions above keep every access inside the three slices; `c` is not aliased.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride as isize,
            beta == Beta::One,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::from_f64(alpha),
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn f16_products_have_rounded_factors() {
        let (m, k, n) = (70, 130, 50);
        let mut random = Random::keyed(5, "f16", 0, 0);
        let [mut a, b] = [m * k, n * k].map(|len| (0..len).map(|_| random.normal() as f32).collect::<Vec<f32>>());
        let product = |a: &[f32]| {
            let mut c = vec![1.0; m * n];
            gemm_in(Precision::F16, &mut c, Beta::One, 0.5, Matrix::new(a, m, k), Matrix::new(&b, n, k).t());
            c
        };
        let half = |x: f32| f16::from_f32(x).to_f64();
        for (i, got) in product(&a).iter().enumerate() {
            let (row, column) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
            let expected = 1.0 + 0.5 * row.iter().zip(column).map(|(a, b)| half(*a) * half(*b)).sum::<f64>();
            let exact = 1.0 + 0.5 * row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            assert!((f64::from(*got) - expected).abs() < 2e-5, "{got} {expected}");
            assert!((expected - exact).abs() < 2e-2);
        }
        a[3] = 65_520.0;
        assert!(product(&a)[..n].iter().all(|c| !c.is_finite()));
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one.install(|| product(&b[..].repeat(2)[..m * k])), product(&b[..].repeat(2)[..m * k]));
    }
}
