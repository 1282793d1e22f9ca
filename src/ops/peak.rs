//! Measures the peak FLOP/s of this machine with multiply-adds on numbers in registers or in the L1 cache.

use super::{
    matmul::{
        bf16::{
            tile::{LINES, SIDE, STEPS, Tile},
            unit::Bf16Unit,
        },
        gemm::gemm_serial,
        matrix::{Beta, Matrix},
    },
    simd::{Real, multiversion},
};
use crate::config::Precision;
use std::{hint::black_box, time::Instant};

/// Peak FLOP/s (a multiply-add counts as two) of products in `precision` on all threads of the pool; the best of a few
/// short runs.
pub fn peak_flops(precision: Precision) -> f64 {
    let once = || match Bf16Unit::for_precision(precision) {
        Some(unit) => tiles(unit),
        None => narrow_and_wide().max(product()),
    };
    (0..TRIES).map(|_| once()).fold(0.0, f64::max)
}

const TRIES: usize = 5;
const ROUNDS: usize = 1 << 20;

/// Products of tiles whose factors fit in the L1 cache.
fn tiles(unit: Bf16Unit) -> f64 {
    const BLOCKS: usize = 8;
    let rounds = ROUNDS / (BLOCKS * STEPS);
    on_all_threads(2.0 * (SIDE * SIDE * STEPS * BLOCKS * rounds) as f64, || {
        let panel = [[Tile([[0; LINES]; LINES]); 2]; BLOCKS];
        let mut c = [0f32; SIDE * SIDE];
        let ready = unit.ready(LINES);
        for _ in 0..rounds {
            // SAFETY: ready for 16 rows; `c` has 32 rows of 32.
            unsafe { ready.square(black_box(&panel), &panel, c.as_mut_ptr(), SIDE, Beta::Zero) }
        }
        black_box(&c);
    })
}

/// A matrix product that fits in the L2 cache; its kernel does not depend on compiler optimizations.
fn product() -> f64 {
    const SIDE: usize = 192;
    let rounds = ROUNDS / SIDE / 64;
    on_all_threads(2.0 * (SIDE * SIDE * SIDE * rounds) as f64, || {
        let (a, mut c) = ([1f32; SIDE * SIDE], [0f32; SIDE * SIDE]);
        let a = Matrix::new(&a, SIDE, SIDE);
        (0..rounds).for_each(|_| gemm_serial(black_box(&mut c), SIDE, Beta::Zero, 1.0, a, a));
    })
}

fn narrow_and_wide() -> f64 {
    measure(96, chains_of_96::<f32>).max(measure(256, chains_of_256::<f32>))
}

/// Each thread runs `chains` on `width` values.
fn measure(width: usize, chains: fn(f32, f32, usize) -> f32) -> f64 {
    on_all_threads(2.0 * (width * ROUNDS) as f64, || {
        black_box(chains(black_box(0.999), black_box(0.001), ROUNDS));
    })
}

/// FLOP/s, if each thread does `operations` in `run`.
fn on_all_threads(operations: f64, run: impl Fn() + Sync) -> f64 {
    let begun = Instant::now();
    rayon::broadcast(|_| run());
    operations * rayon::current_num_threads() as f64 / begun.elapsed().as_secs_f64()
}

multiversion! {
    /// Twelve AVX2 registers: enough to hide the latency of an addition, and few enough to fit.
    fn chains_of_96<T: Real, const FMA: bool>(scale: T, shift: T, rounds: usize) -> T {
        chains::<T, FMA, 96>(scale, shift, rounds)
    }
}

multiversion! {
    /// Sixteen AVX-512 registers.
    fn chains_of_256<T: Real, const FMA: bool>(scale: T, shift: T, rounds: usize) -> T {
        chains::<T, FMA, 256>(scale, shift, rounds)
    }
}

/// x ← scale · x + shift, over `N` values at once.
#[inline(always)]
fn chains<T: Real, const FMA: bool, const N: usize>(scale: T, shift: T, rounds: usize) -> T {
    let mut x = [T::ONE; N];
    for _ in 0..rounds {
        for x in &mut x {
            *x = scale.fma::<FMA>(*x, shift);
        }
    }
    x.into_iter().fold(T::ZERO, |sum, x| sum + x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_compute_and_the_peak_is_positive() {
        assert_eq!(chains_of_96::<f64>(0.5, 1.0, 2), 96.0 * 1.75);
        assert_eq!(chains_of_256::<f64>(0.5, 1.0, 1), 256.0 * 1.5);
        assert!(peak_flops(Precision::F32) > 0.0 && peak_flops(Precision::Bf16) > 0.0);
    }
}
