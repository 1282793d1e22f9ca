//! Full single-head self-attention over the positions of an image, as in VQGAN at its lowest resolution: forward and
//! backward on slices, one task per image.

use crate::ops::{
    matmul::{
        gemm::gemm_serial,
        matrix::{Beta, Matrix},
    },
    simd::{self, Real, multiversion},
};
use rayon::prelude::*;

/// Queries, keys and values, each `(images, positions, channels)`.
#[derive(Clone, Copy)]
pub struct Heads<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub positions: usize,
    pub channels: usize,
}

impl<'a, T: Real> Heads<'a, T> {
    fn image(&self, i: usize) -> [Matrix<'a, T>; 3] {
        let size = self.positions * self.channels;
        [self.q, self.k, self.v].map(|x| Matrix::new(&x[i * size..(i + 1) * size], self.positions, self.channels))
    }

    fn scale(&self) -> f64 {
        (self.channels as f64).powf(-0.5)
    }

    /// softmax(q kᵀ / √channels), `(positions, positions)`.
    fn probabilities(&self, q: Matrix<T>, k: Matrix<T>) -> Vec<T> {
        let mut p = vec![T::ZERO; self.positions * self.positions];
        gemm_serial(&mut p, self.positions, Beta::Zero, self.scale(), q, k.t());
        p.chunks_exact_mut(self.positions).for_each(softmax);
        p
    }
}

/// Writes softmax(q kᵀ / √channels) v.
pub fn forward<T: Real>(heads: Heads<T>, y: &mut [T]) {
    y.par_chunks_mut(heads.positions * heads.channels).enumerate().for_each(|(i, y)| {
        let [q, k, v] = heads.image(i);
        let p = heads.probabilities(q, k);
        gemm_serial(y, heads.channels, Beta::Zero, 1.0, Matrix::new(&p, heads.positions, heads.positions), v);
    });
}

/// Writes the gradients of q, k and v.
pub fn backward<T: Real>(heads: Heads<T>, dy: &[T], [dq, dk, dv]: [&mut [T]; 3]) {
    let (positions, channels, size) = (heads.positions, heads.channels, heads.positions * heads.channels);
    let gradients = dq.par_chunks_mut(size).zip(dk.par_chunks_mut(size)).zip(dv.par_chunks_mut(size));
    gradients.zip(dy.par_chunks(size)).enumerate().for_each(|(i, (((dq, dk), dv), dy))| {
        let [q, k, v] = heads.image(i);
        let p = heads.probabilities(q, k);
        let dy = Matrix::new(dy, positions, channels);
        gemm_serial(dv, channels, Beta::Zero, 1.0, Matrix::new(&p, positions, positions).t(), dy);
        let mut ds = vec![T::ZERO; p.len()];
        gemm_serial(&mut ds, positions, Beta::Zero, 1.0, dy, v.t());
        ds.chunks_exact_mut(positions).zip(p.chunks_exact(positions)).for_each(|(ds, p)| through_softmax(ds, p));
        let ds = Matrix::new(&ds, positions, positions);
        gemm_serial(dq, channels, Beta::Zero, heads.scale(), ds, k);
        gemm_serial(dk, channels, Beta::Zero, heads.scale(), ds.t(), q);
    });
}

multiversion! {
    /// Softmax of a row of scores, in place.
    fn softmax<T: Real, const FMA: bool>(row: &mut [T]) {
        let largest = simd::max(row);
        row.iter_mut().for_each(|x| *x = Real::exp(*x - largest));
        let factor = T::ONE / simd::sum(row);
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

multiversion! {
    /// Backward pass of the softmax of a row, in place: gradients of probabilities to gradients of scores.
    fn through_softmax<T: Real, const FMA: bool>(d: &mut [T], p: &[T]) {
        let mean = simd::dot::<T, FMA>(d, p);
        d.iter_mut().zip(p).for_each(|(d, &p)| *d = p * (*d - mean));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::testing::{at_each_level, normal, values},
    };
    use candle_core::{D, DType};

    #[test]
    fn equals_stock_ops() -> Result<()> {
        at_each_level(|| {
            for (images, positions, channels) in [(1, 1, 1), (2, 5, 3), (3, 33, 40)] {
                let [q, k, v] = ["q", "k", "v"].map(|name| normal(name, &[images, positions, channels], DType::F64));
                let scores = (q.matmul(&k.t()?)? * (channels as f64).powf(-0.5))?.exp()?;
                let y = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?.matmul(&v)?;
                let dy = normal("dy", y.dims(), DType::F64);
                let store = (&y * dy.as_tensor())?.sum_all()?.backward()?;

                let vectors = [&q, &k, &v].map(|var| values(var));
                let [q_values, k_values, v_values] = &vectors;
                let heads = Heads { q: q_values, k: k_values, v: v_values, positions, channels };
                let [mut ours, mut dq, mut dk, mut dv] = [(); 4].map(|()| vec![f64::NAN; q_values.len()]);
                forward(heads, &mut ours);
                backward(heads, &values(&dy), [&mut dq, &mut dk, &mut dv]);
                let gradient = |var| store.get(var).map(values).unwrap_or_default();
                let pairs = [(ours, values(&y)), (dq, gradient(&q)), (dk, gradient(&k)), (dv, gradient(&v))];
                for (ours, theirs) in pairs {
                    assert_eq!(ours.len(), theirs.len());
                    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-10));
                }
            }
            Ok(())
        })
    }
}
