//! Muon where the state is on a device, by stock ops: nearly all of its time is in matrix products.

use super::{
    muon::{MOMENTUM, Muon},
    newton_schulz::{COEFFICIENTS, STEPS},
};
use crate::{
    config::Precision,
    error::{Result, ensure},
};
use candle_core::{DType, Tensor};

/// As [`muon_step`](super::muon_step) of flat f32 tensors on one device: `w` and `momentum` become new tensors.
///
/// # Errors
/// The sizes differ, or the device is out of memory.
pub fn muon_step_on_device(
    w: &mut Tensor,
    g: &Tensor,
    momentum: &mut Tensor,
    (rows, columns): (usize, usize),
    hyper: &Muon,
    scale: f64,
) -> Result<()> {
    let sizes = [w.dims(), g.dims(), momentum.dims()];
    ensure!(sizes == [[rows * columns]; 3] && rows.is_multiple_of(hyper.parts), "sizes of a Muon step");
    let decay = f64::from(MOMENTUM);
    let new = (g * ((1.0 - decay) * scale))?;
    *momentum = ((&*momentum * decay)? + &new)?;
    let ahead = ((&*momentum * decay)? + new)?.reshape((hyper.parts, rows / hyper.parts, columns))?;
    let direction = newton_schulz(&ahead, hyper.precision)?.flatten_all()?;
    let keep = 1.0 - hyper.learning_rate * hyper.weight_decay;
    let rate = hyper.learning_rate * ((rows / hyper.parts) as f64 / columns as f64).max(1.0).sqrt();
    *w = ((&*w * keep)? - (direction * rate)?)?;
    Ok(())
}

/// As on the host, of each matrix of `x (matrices, rows, columns)`, f32. In lower precision all of the iteration is rounded,
/// as in the original.
fn newton_schulz(x: &Tensor, precision: Precision) -> candle_core::Result<Tensor> {
    let dtype = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    };
    let (a, b, c) = COEFFICIENTS;
    let (a, b, c) = (f64::from(a), f64::from(b), f64::from(c));
    let norm = (x.sqr()?.sum_keepdim(2)?.sum_keepdim(1)?.sqrt()? + 1e-7)?;
    let mut x = x.broadcast_div(&norm)?.to_dtype(dtype)?;
    let tall = x.dim(1)? > x.dim(2)?;
    for _ in 0..STEPS {
        let gram = if tall { x.t()?.matmul(&x)? } else { x.matmul(&x.t()?)? };
        let polynomial = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
        let turned = if tall { x.matmul(&polynomial)? } else { polynomial.matmul(&x)? };
        x = ((x * a)? + turned)?;
    }
    x.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{optim::muon_step, testing::normal};

    #[test]
    fn equals_the_step_on_the_host() -> Result<()> {
        for (size, parts) in [((24, 6), 1), ((24, 6), 3), ((5, 9), 1), ((4, 4), 2)] {
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::F16, 1e-2)] {
                let hyper = Muon { learning_rate: 0.1, weight_decay: 0.5, parts, precision };
                let flat = |name: &str| normal(name, &[size.0 * size.1], DType::F32).as_tensor().clone();
                let (mut w, mut momentum) = (flat("w"), flat("w").zeros_like()?);
                let (mut host_w, mut host_momentum) = (w.to_vec1::<f32>()?, momentum.to_vec1::<f32>()?);
                for step in 0..2 {
                    let g = flat(&format!("g{step}"));
                    muon_step_on_device(&mut w, &g, &mut momentum, size, &hyper, 0.5)?;
                    muon_step(&mut host_w, &g.to_vec1::<f32>()?, &mut host_momentum, size, &hyper, 0.5)?;
                }
                for (tensor, host) in [(&w, &host_w), (&momentum, &host_momentum)] {
                    let close = |(a, b): (&f32, &f32)| (a - b).abs() < tolerance;
                    assert!(tensor.to_vec1::<f32>()?.iter().zip(host).all(close), "{size:?} {parts} {precision:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() -> Result<()> {
        let tensor = |len: usize| Tensor::ones(len, DType::F32, &candle_core::Device::Cpu);
        let refused = |momentum: usize, size, parts| -> Result<bool> {
            let hyper = Muon { learning_rate: 0.1, weight_decay: 0.0, parts, precision: Precision::F32 };
            let (mut w, mut momentum) = (tensor(6)?, tensor(momentum)?);
            Ok(muon_step_on_device(&mut w, &tensor(6)?, &mut momentum, size, &hyper, 1.0).is_err())
        };
        assert!(refused(5, (2, 3), 1)? && refused(6, (2, 2), 1)? && refused(6, (3, 2), 2)? && !refused(6, (2, 3), 2)?);
        Ok(())
    }
}
