//! The machine's speed limit: f32 multiply-adds that never leave the registers.

use super::simd::{Real, multiversion};
use std::{hint::black_box, time::Instant};

/// f32 operations a second (a multiply-add counts two) on all threads of the pool together; the best of a few short tries.
pub fn peak_flops() -> f64 {
    (0..TRIES).map(|_| narrow_and_wide()).fold(0.0, f64::max)
}

const TRIES: usize = 5;
const ROUNDS: usize = 1 << 20;

fn narrow_and_wide() -> f64 {
    measure(96, chains_of_96::<f32>).max(measure(256, chains_of_256::<f32>))
}

/// Each thread runs `chains` on `width` values for itself.
fn measure(width: usize, chains: fn(f32, f32, usize) -> f32) -> f64 {
    let begun = Instant::now();
    rayon::broadcast(|_| black_box(chains(black_box(0.999), black_box(0.001), ROUNDS)));
    let operations = 2.0 * (width * ROUNDS * rayon::current_num_threads()) as f64;
    operations / begun.elapsed().as_secs_f64()
}

multiversion! {
    /// Twelve AVX2 registers: enough to hide the latency of an addition, few enough to fit.
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
        assert!(peak_flops() > 0.0);
    }
}
