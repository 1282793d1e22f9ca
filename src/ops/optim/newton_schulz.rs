//! Muon's orthogonalization: Newton-Schulz iterations that move a matrix's singular values towards 1 (K. Jordan,
//! "Muon", 2024, also for the quintic coefficients).

use crate::{
    config::Precision,
    ops::{
        matmul::{
            gemm::gemm_in,
            matrix::{Beta, Matrix},
        },
        simd::{Real, dot, multiversion},
        slices::CHUNK,
    },
};
use rayon::prelude::*;

pub(super) const STEPS: usize = 5;
pub(super) const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);

/// Replaces X (rows, columns) by an approximately orthogonal matrix with the same singular vectors; singular values are
/// within about 0.7..1.2. Products are in `precision`: the iteration corrects its own rounding errors.
pub(super) fn newton_schulz(precision: Precision, x: &mut [f32], rows: usize, columns: usize) {
    let (a, b, c) = COEFFICIENTS;
    let squares: Vec<f64> = x.par_chunks(CHUNK).map(|x| f64::from(sum_of_squares(x))).collect();
    let scale = 1.0 / (squares.iter().sum::<f64>().sqrt() as f32 + 1e-7);
    x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|x| *x *= scale));

    // `a X + (b A + c A²) X` with `A = X Xᵀ`; for a tall X the mirrored form, so that A is as small as possible.
    let tall = rows > columns;
    let side = rows.min(columns);
    let (mut gram, mut polynomial) = (vec![0f32; side * side], vec![0f32; side * side]);
    let mut next = vec![0f32; x.len()];
    for _ in 0..STEPS {
        let matrix = Matrix::new(x, rows, columns);
        let (left, right) = if tall { (matrix.t(), matrix) } else { (matrix, matrix.t()) };
        gemm_in(precision, &mut gram, Beta::Zero, 1.0, left, right);
        let square = Matrix::new(&gram, side, side);
        polynomial.par_chunks_mut(CHUNK).zip(gram.par_chunks(CHUNK)).for_each(|(p, g)| {
            p.iter_mut().zip(g).for_each(|(p, g)| *p = b * g);
        });
        gemm_in(precision, &mut polynomial, Beta::One, c, square, square);
        next.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(n, x)| {
            n.iter_mut().zip(x).for_each(|(n, x)| *n = a * x);
        });
        let polynomial = Matrix::new(&polynomial, side, side);
        let (left, right) = if tall { (matrix, polynomial) } else { (polynomial, matrix) };
        gemm_in(precision, &mut next, Beta::One, 1.0, left, right);
        x.copy_from_slice(&next);
    }
}

multiversion! {
    fn sum_of_squares<T: Real, const FMA: bool>(x: &[T]) -> T {
        dot::<T, FMA>(x, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::testing::{normal, values},
    };
    use candle_core::{DType, Tensor};

    fn orthogonal(precision: Precision, matrix: &Tensor) -> Result<Vec<f32>> {
        let (rows, columns) = matrix.dims2()?;
        let mut x = matrix.flatten_all()?.to_vec1()?;
        newton_schulz(precision, &mut x, rows, columns);
        Ok(x)
    }

    /// The same from stock candle ops.
    fn composed(matrix: &Tensor) -> Result<Tensor> {
        let (a, b, c) = COEFFICIENTS;
        let norm = (matrix.sqr()?.sum_all()?.sqrt()? + 1e-7)?;
        let mut x = matrix.broadcast_div(&norm)?;
        for _ in 0..STEPS {
            let gram = x.t()?.matmul(&x)?;
            let step = ((&gram * f64::from(b))? + (gram.matmul(&gram)? * f64::from(c))?)?;
            x = ((&x * f64::from(a))? + x.matmul(&step)?)?;
        }
        Ok(x)
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        for shape in [[1, 1], [5, 24], [40, 17], [16, 16]] {
            let x = normal("x", &shape, DType::F32);
            for (a, b) in orthogonal(Precision::F32, &x)?.iter().zip(values(&composed(&x)?)) {
                assert!((f64::from(*a) - b).abs() < 1e-4, "{shape:?}: {a} instead of {b}");
            }
        }
        Ok(())
    }

    #[test]
    fn singular_values_come_close_to_one() -> Result<()> {
        let shapes = [[24, 24], [16, 64], [64, 16]];
        for (precision, shape) in [Precision::F32, Precision::Bf16].into_iter().flat_map(|p| shapes.map(|s| (p, s))) {
            let x = normal("x", &shape, DType::F32);
            let y = Tensor::from_vec(orthogonal(precision, &x)?, &shape[..], x.device())?;
            // For a flat Y with singular values close to 1, Y Yᵀ is close to the identity matrix.
            let flat = if shape[0] > shape[1] { y.t()?.contiguous()? } else { y };
            let gram = flat.matmul(&flat.t()?)?.to_vec2::<f32>()?;
            let trace: f32 = (0..gram.len()).map(|i| gram[i][i]).sum::<f32>() / gram.len() as f32;
            assert!((0.6..1.3).contains(&trace), "{shape:?}: {trace}");
            let off: f32 = (0..gram.len())
                .flat_map(|i| (0..i).map(move |j| (i, j)))
                .map(|(i, j)| gram[i][j].abs())
                .fold(0.0, f32::max);
            assert!(off < 0.45, "{shape:?}: {off}");
        }
        Ok(())
    }
}
