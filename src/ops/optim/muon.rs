//! Muon (K. Jordan et al. 2024): orthogonalized momentum, for the hidden weight matrices of a network.

use super::newton_schulz::newton_schulz;
use crate::{
    config::Precision,
    error::{Result, ensure},
    ops::slices::CHUNK,
};
use rayon::prelude::*;

/// Decay of the Nesterov momentum.
pub(super) const MOMENTUM: f32 = 0.95;

/// Hyperparameters of one step.
#[derive(Debug, Clone, Copy)]
pub struct Muon {
    pub learning_rate: f64,
    /// Decoupled: the parameter shrinks by `learning_rate · weight_decay`.
    pub weight_decay: f64,
    /// Number of equal matrices stacked along the rows of the parameter.
    pub parts: usize,
    /// Precision of the matrix products in the orthogonalization.
    pub precision: Precision,
}

/// Updates the weights `w (rows, columns)` and their momentum with the gradient `scale · g`. The update of each part is
/// its orthogonalized momentum times `sqrt(max(1, rows / columns))`.
///
/// # Errors
/// The sizes differ, or the rows cannot be split into `parts` matrices.
pub fn muon_step(
    w: &mut [f32],
    g: &[f32],
    momentum: &mut [f32],
    (rows, columns): (usize, usize),
    hyper: &Muon,
    scale: f64,
) -> Result<()> {
    let fits = [w.len(), g.len(), momentum.len()] == [rows * columns; 3] && rows.is_multiple_of(hyper.parts);
    ensure!(fits, "sizes of a Muon step");
    let mut direction = look_ahead(g, momentum, scale as f32);
    let rows = rows / hyper.parts;
    for part in direction.chunks_exact_mut(rows * columns) {
        newton_schulz(hyper.precision, part, rows, columns);
    }
    let keep = (1.0 - hyper.learning_rate * hyper.weight_decay) as f32;
    let rate = (hyper.learning_rate * (rows as f64 / columns as f64).max(1.0).sqrt()) as f32;
    w.par_chunks_mut(CHUNK).zip(direction.par_chunks(CHUNK)).for_each(|(w, d)| {
        w.iter_mut().zip(d).for_each(|(w, d)| *w = *w * keep - rate * d);
    });
    Ok(())
}

/// Adds a gradient to the momentum and returns the look-ahead (Nesterov) momentum.
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
    use crate::random::Random;

    const HYPER: Muon = Muon { learning_rate: 0.1, weight_decay: 0.0, parts: 1, precision: Precision::F32 };

    /// The update of weights of zero, divided by the learning rate.
    fn update(grad: &[f32], momentum: &mut [f32], size: (usize, usize), hyper: &Muon, scale: f64) -> Result<Vec<f32>> {
        let mut weights = vec![0.0; grad.len()];
        muon_step(&mut weights, grad, momentum, size, hyper, scale)?;
        Ok(weights.iter().map(|w| -w / hyper.learning_rate as f32).collect())
    }

    #[test]
    fn stacked_matrices_are_updated_separately() -> Result<()> {
        let (rows, columns) = (24, 6);
        let mut random = Random::keyed(3, "packed", 0, 0);
        let packed: Vec<f32> = (0..3 * rows * columns).map(|_| random.normal() as f32).collect();
        let together =
            |parts| update(&packed, &mut [0.0; 3 * 24 * 6], (3 * rows, columns), &Muon { parts, ..HYPER }, 1.0);
        let (as_three, as_one) = (together(3)?, together(1)?);
        for (alone, part) in packed.chunks_exact(rows * columns).zip(as_three.chunks_exact(rows * columns)) {
            let expected = update(alone, &mut [0.0; 24 * 6], (rows, columns), &HYPER, 1.0)?;
            assert_eq!(part, expected);
            // 24 x 6: the columns are nearly orthonormal, times sqrt(24 / 6).
            for column in 0..columns {
                let square: f32 = expected.iter().skip(column).step_by(columns).map(|x| x * x / 4.0).sum();
                assert!((0.4..1.6).contains(&square), "{square}");
            }
        }
        assert_ne!(as_three, as_one);
        Ok(())
    }

    #[test]
    fn nesterov_momentum_and_gradient_clipping() -> Result<()> {
        let mut momentum = [0.0; 4];
        update(&[1.0, 0.0, 0.0, 2.0], &mut momentum, (2, 2), &HYPER, 1.0)?;
        let moved = update(&[0.0, 4.0, -8.0, 0.0], &mut momentum, (2, 2), &HYPER, 0.5)?;
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close(&momentum, &[0.0475, 0.1, -0.2, 0.095]), "{momentum:?}");
        let mut direction = [0.045125, 0.195, -0.39, 0.09025];
        newton_schulz(Precision::F32, &mut direction, 2, 2);
        assert!(close(&moved, &direction), "{moved:?} instead of {direction:?}");
        Ok(())
    }

    #[test]
    fn weight_decay_is_decoupled() -> Result<()> {
        let mut weights = [1.0; 4];
        let hyper = Muon { weight_decay: 0.5, ..HYPER };
        muon_step(&mut weights, &[0.0; 4], &mut [0.0; 4], (2, 2), &hyper, 1.0)?;
        assert_eq!(weights, [0.95; 4]);
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let refused = |momentum: &mut [f32], size, parts| {
            muon_step(&mut [1.0; 6], &[1.0; 6], momentum, size, &Muon { parts, ..HYPER }, 1.0).is_err()
        };
        assert!(refused(&mut [0.0; 5], (2, 3), 1) && refused(&mut [0.0; 6], (2, 2), 1));
        assert!(refused(&mut [0.0; 6], (2, 3), 3) && !refused(&mut [0.0; 6], (2, 3), 2));
    }
}
