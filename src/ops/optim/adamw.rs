//! AdamW (arXiv 1711.05101) in one pass over parameter, gradient and moments, and the parameter's copy in bf16.

use crate::{
    error::{Result, ensure},
    ops::{
        simd::{Real, multiversion},
        slices::CHUNK,
    },
};
use half::{bf16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// Hyperparameters of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Decoupled: the parameter shrinks by `learning_rate · weight_decay`.
    pub weight_decay: f64,
    /// Counted from 1, for the moments' bias correction.
    pub step: u64,
}

/// The factors of the inner loop, in the kernel's precision.
pub(super) struct Factors<T> {
    pub keep: T,
    pub rate: T,
    pub beta1: T,
    pub one_minus_beta1: T,
    pub beta2: T,
    pub one_minus_beta2: T,
    pub scale: T,
    pub eps: T,
    pub root_correction2: T,
}

impl<T: Real> Factors<T> {
    pub fn of(hyper: &AdamW, scale: f64) -> Self {
        let AdamW { learning_rate, beta1, beta2, eps, weight_decay, step } = *hyper;
        let steps = i32::try_from(step).unwrap_or(i32::MAX);
        Self {
            keep: T::from_f64(1.0 - learning_rate * weight_decay),
            rate: T::from_f64(learning_rate / (1.0 - beta1.powi(steps))),
            beta1: T::from_f64(beta1),
            one_minus_beta1: T::from_f64(1.0 - beta1),
            beta2: T::from_f64(beta2),
            one_minus_beta2: T::from_f64(1.0 - beta2),
            scale: T::from_f64(scale),
            eps: T::from_f64(eps),
            root_correction2: T::from_f64(1.0 / (1.0 - beta2.powi(steps)).sqrt()),
        }
    }
}

multiversion! {
    fn update<T: Real, const FMA: bool>(w: &mut [T], g: &[T], m: &mut [T], v: &mut [T], f: &Factors<T>) {
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
            let g = *g * f.scale;
            *m = f.beta1 * *m + f.one_minus_beta1 * g;
            *v = f.beta2 * *v + f.one_minus_beta2 * g * g;
            *w = *w * f.keep - f.rate * *m / (v.sqrt() * f.root_correction2 + f.eps);
        }
    }
}

/// Updates the weights `w` and their moments with the gradient `scale · g` (`scale` clips the global norm). `rounded`,
/// if given, receives the new weights in bf16.
///
/// # Errors
/// The lengths differ.
pub fn adamw_step(
    w: &mut [f32],
    g: &[f32],
    [m, v]: [&mut [f32]; 2],
    rounded: Option<&mut [bf16]>,
    hyper: &AdamW,
    scale: f64,
) -> Result<()> {
    ensure!([g.len(), m.len(), v.len()] == [w.len(); 3], "sizes of an AdamW step");
    ensure!(rounded.as_ref().is_none_or(|rounded| rounded.len() == w.len()), "size of rounded weights");
    let factors = Factors::of(hyper, scale);
    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    let chunks = w.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(moments);
    match rounded {
        None => chunks.for_each(|((w, g), (m, v))| update(w, g, m, v, &factors)),
        Some(rounded) => chunks.zip(rounded.par_chunks_mut(CHUNK)).for_each(|(((w, g), (m, v)), rounded)| {
            update(w, g, m, v, &factors);
            rounded.convert_from_f32_slice(w);
        }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// The formulas of the paper, one number at a time, in f64.
    #[test]
    fn equals_the_formulas() -> Result<()> {
        let count = 2 * CHUNK + 77;
        let normal = |purpose, step| {
            let mut random = Random::keyed(5, purpose, step, 0);
            (0..count).map(|_| random.normal() as f32).collect::<Vec<f32>>()
        };
        let mut w = normal("weights", 0);
        let mut expected: Vec<f64> = w.iter().copied().map(f64::from).collect();
        let (mut m, mut v) = (vec![0f32; count], vec![0f32; count]);
        let mut rounded = vec![bf16::ZERO; count];
        let (mut em, mut ev) = (vec![0f64; count], vec![0f64; count]);
        for step in 1..=4 {
            let g = normal("gradient", step);
            let hyper = AdamW { learning_rate: 0.01, beta1: 0.9, beta2: 0.96, eps: 1e-8, weight_decay: 0.1, step };
            adamw_step(&mut w, &g, [&mut m, &mut v], Some(&mut rounded), &hyper, 0.5)?;
            assert!(rounded.iter().zip(&w).all(|(rounded, w)| *rounded == bf16::from_f32(*w)));
            for i in 0..count {
                let g = f64::from(g[i]) * 0.5;
                em[i] = 0.9 * em[i] + 0.1 * g;
                ev[i] = 0.96 * ev[i] + 0.04 * g * g;
                let (mh, vh) = (em[i] / (1.0 - 0.9f64.powi(step as i32)), ev[i] / (1.0 - 0.96f64.powi(step as i32)));
                expected[i] -= 0.01 * 0.1 * expected[i];
                expected[i] -= 0.01 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (a, b) in w.iter().zip(&expected) {
            assert!((f64::from(*a) - b).abs() < 1e-5, "{a} {b}");
        }
        Ok(())
    }
}
