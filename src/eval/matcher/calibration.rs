//! Calibration of a matcher's scores: logistic regression of whether an image and a text are a pair on their cosine
//! (Platt 1999, with the numerically sound Newton iteration of Lin, Lin and Weng 2007).

use super::{
    super::choose,
    Samples,
    pairs::{Pair, half_shuffled},
    reliability::Reliability,
};
use crate::error::{Result, ensure, failed};
use serde::Serialize;

/// Fewest samples that are calibrated on: half of them are fitted.
const FEWEST: usize = 20;
/// Added to the diagonal of the Hessian matrix.
const RIDGE: f64 = 1e-9;
const ITERATIONS: usize = 200;
const HALVINGS: i32 = 200;

/// A fitted calibration, and how well it does on other samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibration {
    /// Slope a and offset b of the score σ(a · cosine + b).
    pub calibration: [f64; 2],
    /// Samples that it was fitted on.
    pub fitted_on: usize,
    /// On the samples that it was not fitted on.
    pub reliability: Reliability,
}

/// Fits the calibration on half of the samples, chosen by `seed`, and measures it on the other half.
///
/// # Errors
/// There are too few samples, or pairs have no higher cosines than others.
pub fn calibrate(samples: &Samples, seed: u64) -> Result<Calibration> {
    let total = samples.captions.len();
    let message = format!("{total} samples are too few for a calibration, which takes at least {FEWEST}");
    ensure!(total >= FEWEST, failed(message, "give more data with --data; a thousand samples are enough"));
    let order = choose(total, total, seed, "calibration halves", 0);
    let (fitted, held_out) = order.split_at(total / 2);
    let [slope, offset] = fit(&half_shuffled(samples, fitted, seed)?)?;
    let message = "the cosines of pairs are no higher than those of shuffled pairs: there is nothing to calibrate";
    ensure!(slope > 0.0, failed(message, "train the model further, or check that the captions fit the images"));
    let held_out = half_shuffled(samples, held_out, seed)?;
    let reliability = Reliability::new(&held_out, |cosine| sigmoid(slope * cosine + offset));
    Ok(Calibration { calibration: [slope, offset], fitted_on: fitted.len(), reliability })
}

/// The slope and the offset that make `pairs` most likely.
///
/// # Errors
/// All cosines are equal.
pub fn fit(pairs: &[Pair]) -> Result<[f64; 2]> {
    let count = pairs.len().max(1) as f64;
    let mean = pairs.iter().map(|pair| pair.cosine).sum::<f64>() / count;
    let deviation = (pairs.iter().map(|pair| (pair.cosine - mean).powi(2)).sum::<f64>() / count).sqrt();
    let message = "all cosines are equal: the model does not tell its inputs apart";
    ensure!(deviation > 1e-7, failed(message, "train the model further, or give other data"));
    // Platt's targets, which stay finite where a threshold separates all pairs from all others.
    let of_pairs = pairs.iter().filter(|pair| pair.is_pair).count() as f64;
    let (high, low) = ((of_pairs + 1.0) / (of_pairs + 2.0), 1.0 / (count - of_pairs + 2.0));
    let points: Vec<[f64; 2]> =
        pairs.iter().map(|pair| [(pair.cosine - mean) / deviation, if pair.is_pair { high } else { low }]).collect();
    let [slope, offset] = newton(&points, [0.0, 0.0]);
    Ok([slope / deviation, offset - slope * mean / deviation])
}

/// Minimizes the cross-entropy of σ(a x + b) with the targets of `points`, each x and its target: Newton's method with
/// halved steps. The function is convex, so that every start leads to the same minimum.
fn newton(points: &[[f64; 2]], start: [f64; 2]) -> [f64; 2] {
    let loss = |[a, b]: [f64; 2]| -> f64 {
        let term = |[x, target]: &[f64; 2]| {
            let z = a * x + b;
            z.max(0.0) + (-z.abs()).exp().ln_1p() - target * z
        };
        points.iter().map(term).sum()
    };
    let (mut at, mut value) = (start, loss(start));
    for _ in 0..ITERATIONS {
        let (mut gradient, mut hessian) = ([0.0; 2], [RIDGE, 0.0, RIDGE]);
        for [x, target] in points {
            let p = sigmoid(at[0] * x + at[1]);
            let (error, weight) = (p - target, p * (1.0 - p));
            gradient = [gradient[0] + error * x, gradient[1] + error];
            hessian = [hessian[0] + weight * x * x, hessian[1] + weight * x, hessian[2] + weight];
        }
        if gradient.iter().all(|part| part.abs() < 1e-10 * points.len() as f64) {
            break;
        }
        let [xx, x, one] = hessian;
        let determinant = xx * one - x * x;
        let step =
            [-(one * gradient[0] - x * gradient[1]) / determinant, -(xx * gradient[1] - x * gradient[0]) / determinant];
        let descent = step[0] * gradient[0] + step[1] * gradient[1];
        let shorter = (0..HALVINGS).map(|halvings| 0.5_f64.powi(halvings)).find_map(|length| {
            let next = [at[0] + length * step[0], at[1] + length * step[1]];
            let value_there = loss(next);
            (value_there < value + 1e-4 * length * descent).then_some((next, value_there))
        });
        // Rounding: no step is better.
        let Some(next) = shorter else { break };
        (at, value) = next;
    }
    at
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(of_pairs: &[f64], others: &[f64]) -> Vec<Pair> {
        let with = |is_pair| move |cosine: &f64| Pair { cosine: *cosine, is_pair };
        of_pairs.iter().map(with(true)).chain(others.iter().map(with(false))).collect()
    }

    #[test]
    fn the_minimum_is_found_from_any_start() {
        let points: Vec<[f64; 2]> =
            [(-1.5, 0.1), (-0.5, 0.1), (0.2, 0.9), (-0.1, 0.9), (0.6, 0.1), (1.4, 0.9)].map(|(x, t)| [x, t]).into();
        let [a, b] = newton(&points, [0.0, 0.0]);
        for start in [[40.0, -40.0], [-300.0, 10.0], [1e3, 1e3], [-7.0, 0.0]] {
            let [c, d] = newton(&points, start);
            assert!((a - c).abs() < 1e-6 && (b - d).abs() < 1e-6, "{start:?}: {c} {d} instead of {a} {b}");
        }
    }

    #[test]
    fn known_odds_are_found() {
        // Cosines uniform in 0..1; the share of pairs at x is σ(8 x - 3).
        let mut random = crate::random::Random::keyed(1, "calibration", 0, 0);
        let draw = |_| {
            let cosine = random.unit();
            Pair { cosine, is_pair: random.unit() < sigmoid(8.0 * cosine - 3.0) }
        };
        let [slope, offset] = fit(&(0..40_000).map(draw).collect::<Vec<_>>()).unwrap();
        assert!((slope - 8.0).abs() < 0.2 && (offset + 3.0).abs() < 0.1, "{slope} {offset}");
    }

    #[test]
    fn perfect_separation_does_not_diverge() {
        let [slope, offset] = fit(&pairs(&[0.41; 50], &[0.40; 50])).unwrap();
        assert!(slope.is_finite() && slope > 0.0 && (slope * 0.405 + offset).abs() < 1e-6, "{slope} {offset}");
        // As Platt's targets say: (50 + 1) / (50 + 2).
        assert!((sigmoid(slope * 0.41 + offset) - 51.0 / 52.0).abs() < 1e-6);
        assert!(fit(&pairs(&[0.1, 0.2], &[0.3, 0.4])).unwrap()[0] < 0.0);
        assert!(fit(&pairs(&[0.5; 9], &[0.5; 9])).is_err());
        assert!(fit(&[]).is_err());
    }
}
