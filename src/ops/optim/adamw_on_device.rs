//! AdamW where the state is on a device: by stock ops, or by the kernel of adamw.cu.

use super::{
    adamw::{AdamW, Factors},
    adamw_cuda,
};
use crate::{
    error::{Result, ensure},
    ops::cuda,
    runtime::Kernels,
};
use candle_core::Tensor;

/// As [`adamw_step`](super::adamw_step) of flat f32 tensors on one device: `w`, `m` and `v` become new tensors.
///
/// # Errors
/// The lengths differ, or the device is out of memory.
pub fn adamw_step_on_device(
    w: &mut Tensor,
    g: &Tensor,
    [m, v]: [&mut Tensor; 2],
    hyper: &AdamW,
    scale: f64,
    kernels: Kernels,
) -> Result<()> {
    ensure!([g.dims(), m.dims(), v.dims()] == [w.dims(); 3], "sizes of an AdamW step");
    [*w, *m, *v] = match cuda::takes(kernels, &[w, g, m, v]) {
        true => adamw_cuda::step([w, g, m, v], &Factors::of(hyper, scale))?,
        false => composed([w, g, m, v], &Factors::of(hyper, scale))?,
    };
    Ok(())
}

/// By stock ops.
fn composed([w, g, m, v]: [&Tensor; 4], f: &Factors<f64>) -> candle_core::Result<[Tensor; 3]> {
    let g = (g * f.scale)?;
    let m = ((m * f.beta1)? + (&g * f.one_minus_beta1)?)?;
    let v = ((v * f.beta2)? + (g.sqr()? * f.one_minus_beta2)?)?;
    let step = (&m * f.rate)?.div(&v.sqrt()?.affine(f.root_correction2, f.eps)?)?;
    Ok([((w * f.keep)? - step)?, m, v])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{cuda::emulator, optim::adamw_step, testing::normal};
    use candle_core::DType;

    #[test]
    fn equals_the_step_on_the_host() -> Result<()> {
        for kernels in [Kernels::Stock, Kernels::Fused] {
            if kernels == Kernels::Fused && !emulator::available() {
                continue;
            }
            // Less than a warp, and several blocks with a rest.
            for len in [1, 31, 2 * 1024 + 77] {
                let flat = |name: &str| normal(name, &[len], DType::F32).as_tensor().clone();
                let (mut w, mut m, mut v) = (flat("w"), flat("m").zeros_like()?, flat("v").zeros_like()?);
                let mut host = [&w, &m, &v].map(|tensor| tensor.to_vec1::<f32>().unwrap());
                for step in 1..=4 {
                    let g = flat(&format!("g{step}"));
                    let hyper =
                        AdamW { learning_rate: 0.01, beta1: 0.9, beta2: 0.96, eps: 1e-8, weight_decay: 0.1, step };
                    let launches = emulator::launches();
                    adamw_step_on_device(&mut w, &g, [&mut m, &mut v], &hyper, 0.5, kernels)?;
                    assert_eq!(emulator::launches() > launches, kernels == Kernels::Fused);
                    let [w, m, v] = &mut host;
                    adamw_step(w, &g.to_vec1::<f32>()?, [m, v], None, &hyper, 0.5)?;
                }
                for (tensor, host) in [&w, &m, &v].into_iter().zip(&host) {
                    let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
                    assert!(tensor.to_vec1::<f32>()?.iter().zip(host).all(close), "{kernels:?} {len}");
                }
            }
        }
        let tensor = |len: usize| Tensor::zeros(len, DType::F32, &candle_core::Device::Cpu);
        let hyper = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, step: 1 };
        let (mut w, mut m, mut v) = (tensor(3)?, tensor(3)?, tensor(3)?);
        let refused = adamw_step_on_device(&mut w, &tensor(2)?, [&mut m, &mut v], &hyper, 1.0, Kernels::Stock);
        assert!(refused.is_err());
        Ok(())
    }
}
