//! Muon (K. Jordan et al. 2024): momentum, orthogonalised, for the matrices of a network's middle.

use super::{
    CHUNK,
    newton_schulz::newton_schulz,
    slices::{with_slice, with_slice_mut},
};
use crate::{
    config::Precision,
    error::{Result, ensure},
};
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

/// Decay of the momentum, which looks ahead as Nesterov's does.
const MOMENTUM: f32 = 0.95;

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
pub struct Muon {
    pub learning_rate: f64,
    /// Decoupled: the parameter shrinks by `learning_rate · weight_decay`.
    pub weight_decay: f64,
    /// Matrices of equal size that the parameter holds one below the other.
    pub parts: usize,
    /// Of the products in the orthogonalisation.
    pub precision: Precision,
}

/// Updates `param (rows, columns)` and its momentum with `scale · grad`: each part moves along its orthogonalised
/// direction, times `sqrt(max(1, rows / columns))`. The momentum is on the host whatever the device.
pub fn muon_step(param: &Var, grad: &Tensor, momentum: &mut [f32], hyper: &Muon, scale: f64) -> Result<()> {
    let (rows, columns) = param.dims2()?;
    let fits = grad.dims() == param.dims() && momentum.len() == rows * columns && rows.is_multiple_of(hyper.parts);
    ensure!(fits, "sizes of a Muon step");
    if !param.device().is_cpu() {
        let host = Var::from_tensor(&param.to_device(&Device::Cpu)?)?;
        muon_step(&host, &grad.to_device(&Device::Cpu)?, momentum, hyper, scale)?;
        return Ok(param.set(&host.to_device(param.device())?)?);
    }
    let mut direction = with_slice(grad, |grad: &[f32]| look_ahead(grad, momentum, scale as f32))?;
    let rows = rows / hyper.parts;
    for part in direction.chunks_exact_mut(rows * columns) {
        newton_schulz(hyper.precision, part, rows, columns);
    }
    let keep = (1.0 - hyper.learning_rate * hyper.weight_decay) as f32;
    let rate = (hyper.learning_rate * (rows as f64 / columns as f64).max(1.0).sqrt()) as f32;
    with_slice_mut(param, |w: &mut [f32]| {
        w.par_chunks_mut(CHUNK).zip(direction.par_chunks(CHUNK)).for_each(|(w, d)| {
            w.iter_mut().zip(d).for_each(|(w, d)| *w = *w * keep - rate * d);
        });
    })?;
    Ok(())
}

/// Takes a gradient into the momentum and returns where that will be one step later.
fn look_ahead(grad: &[f32], momentum: &mut [f32], scale: f32) -> Vec<f32> {
    let mut ahead = vec![0.0; grad.len()];
    let parts = ahead.par_chunks_mut(CHUNK).zip(momentum.par_chunks_mut(CHUNK)).zip(grad.par_chunks(CHUNK));
    parts.for_each(|((ahead, momentum), grad)| {
        for ((a, m), g) in ahead.iter_mut().zip(momentum).zip(grad) {
            let new = (1.0 - MOMENTUM) * scale * g;
            *m = MOMENTUM * *m + new;
            *a = MOMENTUM * *m + new;
        }
    });
    ahead
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::normal;
    use candle_core::DType;

    const HYPER: Muon = Muon { learning_rate: 0.1, weight_decay: 0.0, parts: 1, precision: Precision::F32 };

    /// What a step takes from a parameter of zeros, divided by the learning rate.
    fn update(grad: &Tensor, momentum: &mut [f32], hyper: &Muon, scale: f64) -> Result<Vec<f32>> {
        let param = Var::zeros(grad.dims(), DType::F32, grad.device())?;
        muon_step(&param, grad, momentum, hyper, scale)?;
        Ok((param.as_tensor() * (-1.0 / hyper.learning_rate))?.flatten_all()?.to_vec1()?)
    }

    #[test]
    fn packed_matrices_are_treated_one_by_one() -> Result<()> {
        let (rows, columns) = (24, 6);
        let packed = normal("packed", &[3 * rows, columns], DType::F32).as_tensor().detach();
        let together = update(&packed, &mut [0.0; 3 * 24 * 6], &Muon { parts: 3, ..HYPER }, 1.0)?;
        for (third, together) in together.chunks_exact(rows * columns).enumerate() {
            let alone = packed.narrow(0, third * rows, rows)?.contiguous()?;
            let expected = update(&alone, &mut [0.0; 24 * 6], &HYPER, 1.0)?;
            assert_eq!(together, expected);
            // 24 x 6: the columns are nearly orthonormal, times sqrt(24 / 6).
            for column in 0..columns {
                let square: f32 = expected.iter().skip(column).step_by(columns).map(|x| x * x / 4.0).sum();
                assert!((0.4..1.6).contains(&square), "{square}");
            }
        }
        assert_ne!(together, update(&packed, &mut [0.0; 3 * 24 * 6], &HYPER, 1.0)?);
        Ok(())
    }

    #[test]
    fn momentum_looks_ahead_and_gradients_are_clipped() -> Result<()> {
        let first = Tensor::new(&[[1f32, 0.0], [0.0, 2.0]], &Device::Cpu)?;
        let second = Tensor::new(&[[0f32, 4.0], [-8.0, 0.0]], &Device::Cpu)?;
        let mut momentum = [0.0; 4];
        update(&first, &mut momentum, &HYPER, 1.0)?;
        let moved = update(&second, &mut momentum, &HYPER, 0.5)?;
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close(&momentum, &[0.0475, 0.1, -0.2, 0.095]), "{momentum:?}");
        let mut direction = [0.045125, 0.195, -0.39, 0.09025];
        newton_schulz(Precision::F32, &mut direction, 2, 2);
        assert!(close(&moved, &direction), "{moved:?} instead of {direction:?}");
        Ok(())
    }

    #[test]
    fn weights_decay_beside_the_step() -> Result<()> {
        let param = Var::ones((2, 2), DType::F32, &Device::Cpu)?;
        let still = Tensor::zeros((2, 2), DType::F32, &Device::Cpu)?;
        muon_step(&param, &still, &mut [0.0; 4], &Muon { weight_decay: 0.5, ..HYPER }, 1.0)?;
        assert_eq!(param.flatten_all()?.to_vec1::<f32>()?, [0.95; 4]);
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() -> Result<()> {
        let param = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
        let grad = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
        assert!(muon_step(&param, &grad, &mut [0.0; 5], &HYPER, 1.0).is_err());
        assert!(muon_step(&param, &grad.t()?, &mut [0.0; 6], &HYPER, 1.0).is_err());
        assert!(muon_step(&param, &grad, &mut [0.0; 6], &Muon { parts: 3, ..HYPER }, 1.0).is_err());
        Ok(())
    }
}
