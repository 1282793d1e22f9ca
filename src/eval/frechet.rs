//! Fréchet distance between two sets of features, each modeled as a Gaussian (arXiv 1706.08500). With features of
//! Inception it is the FID.

use crate::error::{Context, Result, ensure};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// Mean and covariance of features.
pub struct Gaussian {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
}

impl Gaussian {
    /// Fits a Gaussian to `(count, dim)` features.
    ///
    /// # Errors
    /// There are fewer than two features.
    pub fn of(features: &[Vec<f32>]) -> Result<Self> {
        let (count, dim) = (features.len(), features.first().map_or(0, Vec::len));
        ensure!(count > 1, "a covariance needs at least two images");
        let rows = DMatrix::from_fn(count, dim, |row, column| f64::from(features[row][column]));
        let mean = rows.row_mean().transpose();
        let centred = DMatrix::from_fn(count, dim, |row, column| rows[(row, column)] - mean[column]);
        let covariance = centred.tr_mul(&centred) / (count as f64 - 1.0);
        Ok(Self { mean, covariance })
    }

    /// ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½).
    ///
    /// # Errors
    /// The features differ in length, or the eigenvalue iteration does not converge.
    pub fn distance(&self, other: &Self) -> Result<f64> {
        ensure!(self.mean.len() == other.mean.len(), "features of {} and {} values", self.mean.len(), other.mean.len());
        // (Σ₁ Σ₂)^½ and (Σ₁^½ Σ₂ Σ₁^½)^½ have the same trace, and only the second is the root of a symmetric matrix.
        let (values, vectors) = eigen(self.covariance.clone())?;
        let root = &vectors * DMatrix::from_diagonal(&values.map(|value| value.max(0.0).sqrt())) * vectors.transpose();
        let product = &root * &other.covariance * &root;
        let (values, _) = eigen((&product + product.transpose()) / 2.0)?;
        let trace: f64 = values.iter().map(|value| value.max(0.0).sqrt()).sum();
        let between = (&self.mean - &other.mean).norm_squared();
        Ok((between + self.covariance.trace() + other.covariance.trace() - 2.0 * trace).max(0.0))
    }
}

fn eigen(matrix: DMatrix<f64>) -> Result<(DVector<f64>, DMatrix<f64>)> {
    let found = SymmetricEigen::try_new(matrix, f64::EPSILON, 10_000)
        .context("the eigenvalues of the features' covariance do not converge")?;
    Ok((found.eigenvalues, found.eigenvectors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::weights, ops::testing::values};

    /// Against pytorch-fid (scripts/golden_frechet.py).
    #[test]
    fn distance_equals_pytorch_fid() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../tests/golden/similarity.safetensors"), "golden")?;
        let gaussian = |name: &str| Gaussian::of(&golden[&format!("features.{name}")].to_vec2()?);
        let (ours, theirs) = (gaussian("a")?.distance(&gaussian("b")?)?, values(&golden["distance"])[0]);
        // The golden value was computed from f32 features.
        assert!((ours - theirs).abs() < 1e-6 * theirs, "{ours} instead of {theirs}");
        Ok(())
    }

    #[test]
    fn one_dimension_equals_the_formula() -> Result<()> {
        // Means 2 and 5, variances 4 and 9: 3² + (2 - 3)².
        let a = Gaussian::of(&[vec![2.0 - 2f32.sqrt()], vec![2.0 + 2f32.sqrt()]])?;
        let b = Gaussian::of(&[vec![5.0 - 4.5f32.sqrt()], vec![5.0 + 4.5f32.sqrt()]])?;
        assert!((a.distance(&b)? - 10.0).abs() < 1e-5);
        assert!(a.distance(&a)? < 1e-9);
        assert!(Gaussian::of(&[vec![1.0]]).is_err());
        Ok(())
    }
}
