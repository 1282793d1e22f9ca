//! Muon's orthogonalisation: Newton-Schulz iterations that push a matrix's singular values towards 1
//! (K. Jordan, "Muon", 2024; quintic coefficients from there).

use super::{
    gemm::{Matrix, Onto, gemm},
    with_slice,
};
use crate::error::Result;
use candle_core::Tensor;

const STEPS: usize = 5;
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);

/// An approximately orthogonal matrix (all singular values within about 0.7..1.2) with the singular
/// vectors of `matrix: (rows, columns)`, which is `f32`.
pub fn newton_schulz(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    if !matrix.device().is_cpu() {
        return composed(matrix);
    }
    // The products are of the shorter side: work on the flat orientation.
    let tall = rows > columns;
    let flat = if tall { matrix.t()?.contiguous()? } else { matrix.contiguous()? };
    let (short, long) = (rows.min(columns), rows.max(columns));
    let orthogonal = with_slice(&flat, |x: &[f32]| iterate(x, short, long))?;
    let orthogonal = Tensor::from_vec(orthogonal, (short, long), matrix.device())?;
    Ok(if tall { orthogonal.t()?.contiguous()? } else { orthogonal })
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

/// `X ← a X + (b A + c A²) X` with `A = X Xᵀ`.
fn iterate(start: &[f32], short: usize, long: usize) -> Vec<f32> {
    let (a, b, c) = COEFFICIENTS;
    let norm = start.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt() as f32 + 1e-7;
    let mut x: Vec<f32> = start.iter().map(|x| x / norm).collect();
    let (mut gram, mut square) = (vec![0f32; short * short], vec![0f32; short * short]);
    for _ in 0..STEPS {
        let matrix = Matrix::new(&x, short, long);
        gemm(&mut gram, Onto::Nothing, 1.0, matrix, matrix.t());
        let gram_matrix = Matrix::new(&gram, short, short);
        gemm(&mut square, Onto::Nothing, 1.0, gram_matrix, gram_matrix);
        for (s, g) in square.iter_mut().zip(&gram) {
            *s = b * g + c * *s;
        }
        let mut next: Vec<f32> = x.iter().map(|x| a * x).collect();
        gemm(&mut next, Onto::Old, 1.0, Matrix::new(&square, short, short), Matrix::new(&x, short, long));
        x = next;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{normal, values};
    use candle_core::DType;

    #[test]
    fn fused_is_composed() -> Result<()> {
        for shape in [[1, 1], [5, 24], [40, 17], [16, 16]] {
            let x = normal("x", &shape, DType::F32);
            for (a, b) in values(&newton_schulz(&x)?).iter().zip(values(&composed(&x)?)) {
                assert!((a - b).abs() < 1e-4, "{shape:?}: {a} instead of {b}");
            }
        }
        Ok(())
    }

    #[test]
    fn singular_values_come_close_to_one() -> Result<()> {
        for shape in [[24, 24], [16, 64], [64, 16]] {
            let x = normal("x", &shape, DType::F32);
            let y = newton_schulz(&x)?;
            assert_eq!(y.dims(), shape);
            // For a flat Y with singular values near 1, Y Yᵀ is near the identity in every direction.
            let flat = if shape[0] > shape[1] { y.t()? } else { y };
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
