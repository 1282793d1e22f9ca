//! The nearest codebook entry of each vector: argmin of `‖z‖² - 2 z·c + ‖c‖²`, where `‖z‖²` is the same for all
//! entries. It has no gradient: the quantizer uses a straight-through gradient.

use super::{
    matmul::{
        gemm::gemm_serial,
        matrix::{Beta, Matrix},
    },
    slices::with_slice,
};
use crate::error::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Number of vectors that one task compares with the whole codebook.
const ROWS: usize = 32;

/// Index `(rows)` u32 of the nearest code of `codebook (codes, dim)` for each vector of `z (rows, dim)`; ties go to the
/// lowest index.
pub fn nearest_code(z: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    let ((rows, dim), (codes, code_dim)) = (z.dims2()?, codebook.dims2()?);
    ensure!(dim == code_dim && codes > 0, "vectors of {dim} numbers for a codebook of {codes} x {code_dim}");
    let cpu = |t: &Tensor| t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let (z_cpu, codebook) = (cpu(z)?, cpu(codebook)?);
    let mut nearest = vec![0u32; rows];
    with_slice(&codebook, |codebook: &[f32]| {
        let squares: Vec<f32> = codebook.chunks_exact(dim).map(|c| c.iter().map(|x| x * x).sum()).collect();
        let codebook = Matrix::new(codebook, codes, dim).t();
        with_slice(&z_cpu, |z: &[f32]| {
            nearest.par_chunks_mut(ROWS).zip(z.par_chunks(ROWS * dim)).for_each(|(nearest, z)| {
                let mut products = vec![0f32; nearest.len() * codes];
                let z = Matrix::new(z, nearest.len(), dim);
                gemm_serial(&mut products, codes, Beta::Zero, 1.0, z, codebook);
                for (nearest, products) in nearest.iter_mut().zip(products.chunks_exact(codes)) {
                    *nearest = argmin(products, &squares);
                }
            });
        })
    })??;
    Ok(Tensor::from_vec(nearest, rows, z.device())?)
}

fn argmin(products: &[f32], squares: &[f32]) -> u32 {
    let (mut best, mut index) = (f32::INFINITY, 0);
    for (i, (product, square)) in products.iter().zip(squares).enumerate() {
        let distance = square - 2.0 * product;
        if distance < best {
            (best, index) = (distance, i);
        }
    }
    index as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn finds_the_nearest_by_definition() -> Result<()> {
        for (rows, codes, dim) in [(1, 1, 1), (70, 33, 5), (33, 200, 8)] {
            let (z, book) = (normal("z", &[rows, dim], DType::F32), normal("book", &[codes, dim], DType::F32));
            let (zs, books) = (z.to_vec2::<f32>()?, book.to_vec2::<f32>()?);
            let found = nearest_code(&z, &book)?.to_vec1::<u32>()?;
            for (z, found) in zs.iter().zip(found) {
                let distance = |c: &Vec<f32>| z.iter().zip(c).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
                let best = books.iter().map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(&books[found as usize]) <= best + 1e-5);
            }
        }
        let twins = Tensor::new(&[[1f32, 0.0], [1.0, 0.0]], &Device::Cpu)?;
        assert_eq!(nearest_code(&twins, &twins)?.to_vec1::<u32>()?, [0, 0]);
        Ok(())
    }
}
