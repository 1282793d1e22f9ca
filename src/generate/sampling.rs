//! From logits to a token: guidance, temperature, top-k and top-p. Pure functions over one row of logits.

use crate::{
    config::{self, Schedule},
    error::{Result, ensure},
    ops::softmax::{BLOCK, exp_sums, greatest, log_sum_exp, term},
};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// How a token is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Sampling temperature: divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// How the temperature changes from the first code of an image to the last, where it is `temperature`.
    #[serde(default)]
    pub temperature_schedule: Schedule,
    /// Temperature of the first code with a schedule.
    #[serde(default = "one")]
    pub temperature_start: f64,
    /// Top-k sampling: sample only from the K most likely tokens; 0: from all.
    pub top_k: usize,
    /// Nucleus sampling: sample only from the most likely tokens whose probabilities add up to this; 1: from all.
    pub top_p: f64,
    /// Classifier-free guidance scale; 1: no guidance.
    pub guidance: f64,
    /// How the guidance scale changes from the first code of an image to the last, where it is `guidance`.
    #[serde(default)]
    pub guidance_schedule: Schedule,
    /// Guidance scale of the first code with a schedule.
    #[serde(default = "one")]
    pub guidance_start: f64,
}

/// What a schedule starts from unless something else is given: the model's own distribution.
fn one() -> f64 {
    1.0
}

impl From<&config::Sample> for Sampling {
    fn from(sample: &config::Sample) -> Self {
        Self {
            temperature: sample.temperature,
            temperature_schedule: sample.temperature_schedule,
            temperature_start: sample.temperature_start,
            top_k: sample.top_k,
            top_p: sample.top_p,
            guidance: sample.guidance,
            guidance_schedule: sample.guidance_schedule,
            guidance_start: sample.guidance_start,
        }
    }
}

impl Sampling {
    /// Greedy decoding: always the most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        temperature_schedule: Schedule::Constant,
        temperature_start: 1.0,
        top_k: 0,
        top_p: 1.0,
        guidance: 1.0,
        guidance_schedule: Schedule::Constant,
        guidance_start: 1.0,
    };

    /// Whether any code of an image is drawn with guidance.
    pub fn is_guided(&self) -> bool {
        self.guidance != 1.0 || (self.guidance_schedule != Schedule::Constant && self.guidance_start != 1.0)
    }

    /// The settings of the code at `position` of the `count` codes of an image, without schedules. They are the same in
    /// any batch, and constant settings stay as they are.
    pub fn at(&self, position: usize, count: usize) -> Self {
        let progress = position as f64 / count.saturating_sub(1).max(1) as f64;
        Self {
            temperature: self.temperature_schedule.value(self.temperature_start, self.temperature, progress),
            temperature_schedule: Schedule::Constant,
            guidance: self.guidance_schedule.value(self.guidance_start, self.guidance, progress),
            guidance_schedule: Schedule::Constant,
            ..*self
        }
    }

    /// Samples a token; `unit` in `0..1` is the random number. Tokens at −∞ are never sampled, and ties go to the lower
    /// id.
    ///
    /// # Errors
    /// A logit is NaN or +∞, or all are −∞.
    pub fn draw(&self, logits: &[f32], unit: f64) -> Result<u32> {
        let top = greatest(logits);
        let sound = top.is_finite() && !logits.iter().fold(false, |nan, l| nan | l.is_nan());
        ensure!(sound, "the model's predictions are not finite numbers; its weights are damaged");
        if self.temperature == 0.0 {
            return Ok(logits.iter().position(|&l| l == top).unwrap_or(0) as u32);
        }
        // Clamped to be finite and above 0: otherwise the largest logit or one at −∞ would give NaN.
        let scale = (1.0 / self.temperature).clamp(f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)) as f32;
        if self.top_p >= 1.0 && (self.top_k == 0 || self.top_k >= logits.len()) {
            return Ok(draw_from_all(logits, top, scale, unit));
        }
        let mut kept: Vec<u32> = (0..logits.len() as u32).filter(|&i| logits[i as usize] > f32::NEG_INFINITY).collect();
        if self.top_k > 0 && self.top_k < kept.len() {
            kept.select_nth_unstable_by(self.top_k - 1, likelier(logits));
            kept.truncate(self.top_k);
            kept.sort_unstable();
        }
        let mut weights = kept.iter().map(|&token| f64::from(term(logits[token as usize], top, scale))).collect();
        if self.top_p < 1.0 {
            (kept, weights) = nucleus(kept, weights, self.top_p);
        }
        Ok(kept[pick(&weights, unit)])
    }
}

/// Samples from all tokens by exp(scale · (logit − top)): first a block of tokens by its sum, then a token of the
/// block.
fn draw_from_all(logits: &[f32], top: f32, scale: f32, unit: f64) -> u32 {
    let sums: Vec<f64> = exp_sums(logits, top, scale).into_iter().map(f64::from).collect();
    let block = pick(&sums, unit);
    let rest = (unit * sums.iter().sum::<f64>() - sums[..block].iter().sum::<f64>()).max(0.0);
    let logits = &logits[block * BLOCK..logits.len().min((block + 1) * BLOCK)];
    let weights: Vec<f64> = logits.iter().map(|&l| f64::from(term(l, top, scale))).collect();
    (block * BLOCK + passed(&weights, rest)) as u32
}

/// Classifier-free guidance: `conditional` becomes unconditional + scale · (conditional − unconditional).
pub fn guide(conditional: &mut [f32], unconditional: &[f32], scale: f64) {
    for (c, &u) in conditional.iter_mut().zip(unconditional) {
        *c = u + scale as f32 * (*c - u);
    }
}

/// Log probability of each token: logits − ln Σ exp(logits).
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let normalizer = log_sum_exp(logits);
    logits.iter().map(|&l| (f64::from(l) - normalizer) as f32).collect()
}

/// Orders tokens by decreasing logit; ties by increasing id.
pub fn likelier(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    |&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// The smallest set of most likely tokens whose weights make up the share `p` of the sum; at least one token.
fn nucleus(tokens: Vec<u32>, weights: Vec<f64>, p: f64) -> (Vec<u32>, Vec<f64>) {
    let wanted = p * weights.iter().sum::<f64>();
    let mut order: Vec<(u32, f64)> = tokens.into_iter().zip(weights).collect();
    let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    // A few tokens make up most shares, so only those are sorted at first.
    let mut head = 64;
    while head < order.len() {
        order.select_nth_unstable_by(head, likelier);
        if order[..head].iter().map(|(_, weight)| weight).sum::<f64>() >= wanted {
            order.truncate(head);
        }
        head *= 4;
    }
    order.sort_unstable_by(likelier);
    let mut mass = 0.0;
    let before = order.iter().take_while(|(_, weight)| {
        let more = mass < wanted;
        mass += weight;
        more
    });
    let count = before.count().max(1);
    order.truncate(count);
    order.into_iter().unzip()
}

/// The index at which the running sum of `weights` exceeds `unit` of their total.
fn pick(weights: &[f64], unit: f64) -> usize {
    passed(weights, unit * weights.iter().sum::<f64>())
}

/// The index at which the running sum of `weights` exceeds `target`.
fn passed(weights: &[f64], target: f64) -> usize {
    let mut sum = 0.0;
    let passed = weights.iter().position(|weight| {
        sum += weight;
        sum > target
    });
    // Rounding may leave the sum slightly below `target`; even then a weight of 0 must not be taken.
    passed.or_else(|| weights.iter().rposition(|&weight| weight > 0.0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const ALL: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

    /// Every token that is sampled for `steps` evenly spaced values of `unit`.
    fn drawn(sampling: Sampling, logits: &[f32], steps: usize) -> BTreeSet<u32> {
        (0..steps).map(|i| sampling.draw(logits, i as f64 / steps as f64).unwrap()).collect()
    }

    fn probabilities(logits: &[f32], temperature: f64) -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|x| x / sum).collect()
    }

    fn sorted(logits: &[f32]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap()); // stable: ties by token
        order
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn top_k_samples_from_the_k_most_likely(logits in prop::collection::vec(-2i8..2, 1..12), k in 1usize..14) {
            let logits: Vec<f32> = logits.into_iter().map(|l| f32::from(l) / 2.0).collect();
            let expected: BTreeSet<u32> = sorted(&logits).into_iter().take(k).collect();
            prop_assert_eq!(drawn(Sampling { top_k: k, ..ALL }, &logits, 2000), expected);
        }

        #[test]
        fn top_p_samples_from_the_smallest_set_that_makes_up_p(
            logits in prop::collection::vec(-1.0f32..1.0, 1..12), p in 0.05f64..0.95, temperature in 0.7f64..2.0,
        ) {
            let probability = probabilities(&logits, temperature);
            let (mut expected, mut mass) = (BTreeSet::new(), 0.0);
            for token in sorted(&logits) {
                prop_assume!((mass - p).abs() > 1e-6);
                if mass >= p { break; }
                expected.insert(token);
                mass += probability[token as usize];
            }
            prop_assert_eq!(drawn(Sampling { top_p: p, temperature, ..ALL }, &logits, 2000), expected);
        }

        #[test]
        fn temperature_0_takes_the_first_of_the_most_likely(logits in prop::collection::vec(-3i8..3, 1..12), unit in 0.0f64..1.0) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            prop_assert_eq!(Sampling::GREEDY.draw(&logits, unit).unwrap(), sorted(&logits)[0]);
        }

        #[test]
        fn log_softmax_sums_to_one(logits in prop::collection::vec(-80.0f32..80.0, 1..40)) {
            let log_p = log_softmax(&logits);
            let sum: f64 = log_p.iter().map(|&l| f64::from(l).exp()).sum();
            prop_assert!((sum - 1.0).abs() < 1e-4);
            prop_assert!(logits.iter().zip(&log_p).all(|(l, p)| ((l - p) - (logits[0] - log_p[0])).abs() < 1e-4));
        }
    }

    #[test]
    fn sampling_frequencies_are_the_probabilities() {
        let logits = [0.5, f32::NEG_INFINITY, -1.0, 2.0, 1.0];
        for (sampling, kept) in [
            (ALL, vec![0, 2, 3, 4]),
            (Sampling { temperature: 0.5, ..ALL }, vec![0, 2, 3, 4]),
            (Sampling { temperature: 2.0, top_k: 3, ..ALL }, vec![0, 3, 4]),
            (Sampling { top_p: 0.8, ..ALL }, vec![3, 4]),
            (Sampling { top_k: 2, top_p: 0.7, ..ALL }, vec![3]),
        ] {
            let (mut random, mut counts) = (Random::keyed(3, "test", 0, 0), [0.0; 5]);
            for _ in 0..40_000 {
                counts[sampling.draw(&logits, random.unit()).unwrap() as usize] += 1.0 / 40_000.0;
            }
            let probability = probabilities(&logits, sampling.temperature);
            let mass: f64 = kept.iter().map(|&i: &usize| probability[i]).sum();
            for i in 0..5 {
                let expected = if kept.contains(&i) { probability[i] / mass } else { 0.0 };
                assert!((counts[i] - expected).abs() < 0.01, "{sampling:?} token {i}: {} {expected}", counts[i]);
            }
        }
    }

    /// Over several blocks, and with a nucleus of more tokens than are sorted at first.
    #[test]
    fn sampling_frequencies_over_many_tokens() {
        let mut random = Random::keyed(3, "many", 0, 0);
        let logits: Vec<f32> =
            (0..300).map(|i| if i % 7 == 3 { f32::NEG_INFINITY } else { random.unit() as f32 }).collect();
        let probability = probabilities(&logits, 0.5);
        let frequencies = |sampling: Sampling| {
            let mut counts = vec![0.0; 300];
            (0..60_000).for_each(|i| counts[sampling.draw(&logits, f64::from(i) / 6e4).unwrap() as usize] += 1.0 / 6e4);
            counts
        };
        let all = frequencies(Sampling { temperature: 0.5, ..ALL });
        assert!(all.iter().zip(&probability).all(|(f, p)| (f - p).abs() < 3e-5));
        let (mut expected, mut mass) = (BTreeSet::new(), 0.0);
        for token in sorted(&logits) {
            if mass < 0.9 {
                expected.insert(token);
                mass += probability[token as usize];
            }
        }
        let nucleus = frequencies(Sampling { temperature: 0.5, top_p: 0.9, ..ALL });
        assert!(expected.len() > 64 && (0..300).all(|i| (nucleus[i as usize] > 0.0) == expected.contains(&i)));
    }

    #[test]
    fn extreme_logits_and_temperatures() {
        let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0];
        for unit in [0.0, 0.3, 1.0 - f64::EPSILON] {
            let draw = |sampling: Sampling| sampling.draw(&logits, unit).unwrap();
            assert_ne!(draw(Sampling { temperature: 1e-300, ..ALL }), 0);
            assert_ne!(draw(Sampling { temperature: 1e300, ..ALL }), 2);
            assert_eq!(draw(Sampling { top_p: 1e-300, ..ALL }), 1);
            assert_ne!(draw(Sampling { top_k: usize::MAX, ..ALL }), 2);
        }
        assert_eq!(ALL.draw(&[-1e30, 1e30], 0.999).unwrap(), 1);
        for broken in [&[f32::NEG_INFINITY; 3][..], &[], &[0.0, f32::NAN], &[0.0, f32::INFINITY]] {
            assert!(ALL.draw(broken, 0.5).is_err() && Sampling::GREEDY.draw(broken, 0.5).is_err(), "{broken:?}");
        }
    }

    #[test]
    fn schedules_change_from_the_first_code_to_the_last() {
        let linear = Sampling {
            guidance: 4.0,
            guidance_schedule: Schedule::Linear,
            temperature: 0.5,
            temperature_schedule: Schedule::Linear,
            temperature_start: 1.5,
            top_k: 7,
            ..ALL
        };
        let of = |position| linear.at(position, 5);
        assert_eq!([0, 1, 4].map(|i| of(i).guidance), [1.0, 1.75, 4.0]);
        assert_eq!([0, 2, 4].map(|i| of(i).temperature), [1.5, 1.0, 0.5]);
        assert_eq!((of(3).at(0, 5), of(3).top_k), (of(3), 7), "the settings of a position are constant");
        let constant = Sampling { guidance: 0.1 + 0.2, temperature: 0.7, guidance_start: 9.0, ..ALL };
        assert_eq!((constant.at(2, 9).guidance, constant.at(2, 9).temperature), (0.1 + 0.2, 0.7));
        // An image of one code.
        assert_eq!(linear.at(0, 1).guidance, 1.0);
        let start = Sampling { guidance_start: 3.0, ..ALL };
        let down = Sampling { guidance_schedule: Schedule::Cosine, ..start };
        assert_eq!([ALL, start, down, linear].map(|sampling| sampling.is_guided()), [false, false, true, true]);
    }

    #[test]
    fn guidance_moves_away_from_the_unconditional() {
        let guided = |scale| {
            let mut row = [1.0, -2.0, 0.5];
            guide(&mut row, &[0.0, 1.0, 0.5], scale);
            row
        };
        assert_eq!(guided(0.0), [0.0, 1.0, 0.5]);
        assert_eq!(guided(1.0), [1.0, -2.0, 0.5]);
        assert_eq!(guided(3.0), [3.0, -8.0, 0.5]);
    }
}
