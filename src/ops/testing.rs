//! Checks that every op passes: fused ≡ composed, gradient ≡ finite differences, one thread ≡ many.

use super::{
    matmul::bf16::unit::Bf16Unit,
    simd::{Level, level, tests::FORCED},
};
use crate::{error::Result, random::Random};
use candle_core::{DType, Device, Tensor, Var};

/// A variable of standard normal numbers.
pub fn normal(name: &str, shape: &[usize], dtype: DType) -> Var {
    let mut random = Random::keyed(3, name, 0, 0);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| random.normal()).collect();
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype));
    tensor.and_then(|t| Var::from_tensor(&t)).expect("a test tensor")
}

pub fn values(x: &Tensor) -> Vec<f64> {
    let flat = x.flatten_all().and_then(|x| x.to_dtype(DType::F64)).and_then(|x| x.to_vec1());
    flat.expect("the values of a tensor")
}

/// A scalar in which every element of `y` has its own weight.
fn weighed(y: &Tensor) -> Result<Tensor> {
    let weights = normal("weights of the outputs", y.dims(), y.dtype()).detach();
    Ok((y * weights)?.sum_all()?)
}

/// The output and the gradients of all variables.
fn output_and_gradients(vars: &[Var], f: &dyn Fn(&[Tensor]) -> Result<Tensor>) -> Result<Vec<Vec<f64>>> {
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors)?;
    let gradients = weighed(&y)?.backward()?;
    let mut all = vec![values(&y)];
    for var in vars {
        all.push(values(gradients.get(var).expect("every variable has a gradient")));
    }
    Ok(all)
}

/// Asserts that two functions agree in output and gradients, relative to the largest element.
pub fn assert_same(
    vars: &[Var],
    tolerance: f64,
    fused: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    composed: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let (a, b) = (output_and_gradients(vars, fused)?, output_and_gradients(vars, composed)?);
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert_eq!(a.len(), b.len());
        let scale = b.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= tolerance * scale, "part {i}: {a} instead of {b}");
        }
    }
    Ok(())
}

/// Asserts that the gradients equal central differences; the variables must be f64.
pub fn assert_gradients(vars: &[Var], f: &dyn Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let analytic = output_and_gradients(vars, f)?;
    for (i, var) in vars.iter().enumerate() {
        for (j, &gradient) in analytic[i + 1].iter().enumerate() {
            let at = |delta: f64| -> Result<f64> {
                let mut tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
                let mut moved = values(var);
                moved[j] += delta;
                tensors[i] = Tensor::from_vec(moved, var.shape(), &Device::Cpu)?;
                Ok(weighed(&f(&tensors)?)?.to_scalar()?)
            };
            let numeric = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
            let error = (gradient - numeric).abs() / (1.0 + numeric.abs());
            assert!(error < 1e-6, "variable {i}, element {j}: {gradient}, numerically {numeric}");
        }
    }
    Ok(())
}

/// Asserts that output and gradients are the same bits on one thread and on four.
pub fn assert_thread_independent(vars: &[Var], f: &(dyn Fn(&[Tensor]) -> Result<Tensor> + Sync)) -> Result<()> {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| output_and_gradients(vars, f))
    };
    let (one, four) = (on(1)?, on(4)?);
    for (i, (a, b)) in one.iter().zip(&four).enumerate() {
        assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "part {i} depends on the threads");
    }
    Ok(())
}

/// Runs a check with the kernels of every instruction set that this processor has.
pub fn at_each_level(check: impl Fn() -> Result<()> + Sync) -> Result<()> {
    for forced in [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|&l| l <= level()) {
        // One thread, so that all tasks run where the level is forced.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        pool.install(|| {
            FORCED.set(Some(forced));
            check()
        })?;
    }
    Ok(())
}

/// Weights by the formula of `scripts/golden_weights.py`: even in ±`scale` / 2, keyed by name and place.
pub fn hashed(name: &str, shape: &[usize], scale: f64) -> Tensor {
    let salt = !name.bytes().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    });
    let value = |i: u32| {
        let mut h = i.wrapping_mul(2_654_435_761).wrapping_add(salt);
        h ^= h >> 15;
        h = h.wrapping_mul(2_246_822_519);
        h ^= h >> 13;
        ((f64::from(h >> 8) / f64::from(1 << 24) - 0.5) * scale) as f32
    };
    let count = shape.iter().product::<usize>() as u32;
    Tensor::from_vec((0..count).map(value).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
}

/// AMX, if only in software, and what this processor has besides.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub fn with_each_unit(test: impl Fn(Bf16Unit)) {
    super::matmul::bf16::amx_emulator::with_amx(|| {
        test(Bf16Unit::Amx(super::matmul::bf16::amx::Amx::get().expect("AMX, if only in software")))
    });
    if let Some(unit) = super::matmul::bf16::avx512::Avx512Bf16::get() {
        test(Bf16Unit::Avx512(unit));
    }
}
