//! Fréchet distance between two sets of features, each modeled as a Gaussian (arXiv 1706.08500). With features of
//! Inception it is the FID.

use crate::error::{Context, Result, ensure, failed};
use candle_core::{DType, Tensor};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// Number of features, their mean and their scatter matrix Σ (x − μ)(x − μ)ᵀ, added up batch by batch (Chan et al. 1979), so
/// that features need not be kept.
pub struct Moments {
    count: usize,
    mean: DVector<f64>,
    scatter: DMatrix<f64>,
}

/// Mean and covariance of features.
#[derive(Debug, PartialEq)]
pub struct Gaussian {
    pub mean: DVector<f64>,
    pub covariance: DMatrix<f64>,
}

impl Moments {
    /// The moments of features `(count, dim)`.
    ///
    /// # Errors
    /// The tensor has another shape.
    pub fn of(features: &Tensor) -> Result<Self> {
        let (count, dim) = features.dims2()?;
        let features = features.to_dtype(DType::F64)?;
        let mean = features.mean_keepdim(0)?;
        let centred = features.broadcast_sub(&mean)?;
        let scatter = centred.t()?.matmul(&centred)?.flatten_all()?.to_vec1()?;
        let mean = DVector::from_vec(mean.flatten_all()?.to_vec1()?);
        Ok(Self { count, mean, scatter: DMatrix::from_vec(dim, dim, scatter) })
    }

    /// Adds the features of another set.
    ///
    /// # Errors
    /// They differ in length.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same_length(&self.mean, &other.mean)?;
        let (own, others) = (self.count as f64, other.count as f64);
        let difference = &other.mean - &self.mean;
        self.scatter += &other.scatter;
        self.scatter.ger(own * others / (own + others), &difference, &difference, 1.0);
        self.mean += difference * (others / (own + others));
        self.count += other.count;
        Ok(())
    }

    /// Adds a batch of features `(count, dim)` to a total, which is `None` before the first batch.
    ///
    /// # Errors
    /// The features have another shape, or another length than those before.
    pub fn add_to(total: &mut Option<Self>, features: &Tensor) -> Result<()> {
        let batch = Self::of(features)?;
        match total {
            Some(total) => total.merge(&batch)?,
            None => *total = Some(batch),
        }
        Ok(())
    }

    /// Number of images that were added.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The Gaussian with these moments; its covariance is divided by `count - 1`.
    ///
    /// # Errors
    /// There are fewer than two features.
    pub fn gaussian(self) -> Result<Gaussian> {
        let what = format!("a covariance needs at least two images, not {}", self.count);
        ensure!(self.count > 1, failed(what, "thousands of images are usual"));
        Ok(Gaussian { mean: self.mean, covariance: self.scatter / (self.count as f64 - 1.0) })
    }
}

impl Gaussian {
    /// ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½). Covariances need not have full rank.
    ///
    /// # Errors
    /// The features differ in length, or the eigenvalue iteration does not converge.
    pub fn distance(&self, other: &Self) -> Result<f64> {
        same_length(&self.mean, &other.mean)?;
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

fn same_length(a: &DVector<f64>, b: &DVector<f64>) -> Result<()> {
    let message = format!("features of {} and of {} values cannot be compared", a.len(), b.len());
    ensure!(a.len() == b.len(), failed(message, "both sides must be measured with the same network"));
    Ok(())
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
    use candle_core::Device;

    fn gaussian(features: &Tensor) -> Result<Gaussian> {
        Moments::of(features)?.gaussian()
    }

    fn close(ours: f64, theirs: f64) {
        // The golden values were computed from f32 features.
        assert!((ours - theirs).abs() < 1e-6 * theirs, "{ours} instead of {theirs}");
    }

    /// Against pytorch-fid (scripts/golden_frechet.py).
    #[test]
    fn distance_equals_pytorch_fid() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/similarity.safetensors"), "golden")?;
        let gaussian = |name: &str| gaussian(&golden[&format!("features.{name}")]);
        close(gaussian("a")?.distance(&gaussian("b")?)?, values(&golden["distance"])[0]);
        Ok(())
    }

    /// Against pytorch-fid, also with fewer features than dimensions (scripts/golden_fid.py).
    #[test]
    fn covariances_need_no_full_rank() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        let gaussian = |name: &str| gaussian(&golden[&format!("features.{name}")]);
        for (a, b) in [("a", "b"), ("c", "d"), ("a", "d")] {
            let theirs = values(&golden[&format!("fid.{a}{b}")])[0];
            close(gaussian(a)?.distance(&gaussian(b)?)?, theirs);
            close(gaussian(b)?.distance(&gaussian(a)?)?, theirs);
        }
        assert!(gaussian("c")?.distance(&gaussian("c")?)? < 1e-6);
        assert!(gaussian("a")?.distance(&Moments::of(&golden["logits"])?.gaussian()?).is_err());
        Ok(())
    }

    #[test]
    fn moments_add_up() -> Result<()> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        let all = &golden["features.a"];
        let (rows, _) = all.dims2()?;
        let mut sum = Moments::of(&all.narrow(0, 0, 1)?)?;
        for (from, to) in [(1, 30), (30, 31), (31, rows)] {
            sum.merge(&Moments::of(&all.narrow(0, from, to - from)?)?)?;
        }
        assert_eq!(sum.count(), rows);
        let (sum, whole) = (sum.gaussian()?, gaussian(all)?);
        assert!((&sum.mean - &whole.mean).amax() < 1e-12 && (&sum.covariance - &whole.covariance).amax() < 1e-12);
        Ok(())
    }

    #[test]
    fn one_dimension_equals_the_formula() -> Result<()> {
        let two = |mean: f64, spread: f64| Tensor::new(&[[mean - spread], [mean + spread]], &Device::Cpu);
        // Means 2 and 5, variances 4 and 9: 3² + (2 - 3)².
        let a = gaussian(&two(2.0, 2f64.sqrt())?)?;
        let b = gaussian(&two(5.0, 4.5f64.sqrt())?)?;
        assert!((a.distance(&b)? - 10.0).abs() < 1e-9);
        assert!(a.distance(&a)? < 1e-9);
        assert!(gaussian(&Tensor::new(&[[1.0f64]], &Device::Cpu)?).is_err());
        Ok(())
    }
}
