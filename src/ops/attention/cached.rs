//! Attention of one query over keys in numbered slots: one head of one new position during decoding.

use crate::ops::simd::{Real, add_lanes, axpy, fma_lanes, fma_rest, max, multiversion, sum};

/// Keys and values in slots, and the slots to attend to.
#[derive(Clone, Copy)]
pub struct Part<'a, T> {
    /// (slots, d)
    pub keys: &'a [T],
    /// (slots, d)
    pub values: &'a [T],
    pub slots: &'a [u32],
}

/// Number of keys whose dot products are computed side by side before their lanes are summed.
const BESIDE: usize = 4;

/// Width of those sums.
const WIDE: usize = 16;

/// `scores[i] = q · rows[slots[i]]`
#[inline(always)]
fn dots<T: Real, const FMA: bool>(scores: &mut [T], q: &[T], rows: &[T], slots: &[u32]) {
    let d = q.len();
    let (wide, rest) = q.as_chunks::<WIDE>();
    let mut partial = [[T::ZERO; WIDE]; BESIDE];
    for (scores, slots) in scores.chunks_mut(BESIDE).zip(slots.chunks(BESIDE)) {
        for (partial, &slot) in partial.iter_mut().zip(slots) {
            let mut lanes = [T::ZERO; WIDE];
            for (q, k) in wide.iter().zip(rows[slot as usize * d..][..d].as_chunks().0) {
                fma_lanes::<T, FMA, WIDE>(&mut lanes, q, k);
            }
            *partial = lanes;
        }
        for ((score, &partial), &slot) in scores.iter_mut().zip(&partial).zip(slots) {
            let end = (slot as usize + 1) * d;
            *score = fma_rest::<T, FMA>(add_lanes(partial), rest, &rows[end - rest.len()..end]);
        }
    }
}

/// `out += Σ weights[i] · rows[slots[i]]`, four rows at a time so that `out` is read and written less.
#[inline(always)]
fn add_weighted<T: Real, const FMA: bool>(out: &mut [T], weights: &[T], rows: &[T], slots: &[u32]) {
    let d = out.len();
    let row = |slot: u32| &rows[slot as usize * d..][..d];
    let ((weights, weights_rest), (slots, slots_rest)) = (weights.as_chunks::<4>(), slots.as_chunks::<4>());
    for (w, slots) in weights.iter().zip(slots) {
        let [a, b, c, e] = slots.map(row);
        for i in 0..d {
            let first = w[0].fma::<FMA>(a[i], w[1] * b[i]);
            out[i] = w[2].fma::<FMA>(c[i], w[3].fma::<FMA>(e[i], out[i])) + first;
        }
    }
    for (&w, &slot) in weights_rest.iter().zip(slots_rest) {
        axpy::<T, FMA>(out, w, row(slot));
    }
}

multiversion! {
    /// `out (d)` = softmax of `q (d)` · keys / √d over the slots of both parts, times their values. `scores` is a
    /// buffer for all slots, of which there must be at least one.
    pub fn attend<T: Real, const FMA: bool>(out: &mut [T], q: &[T], parts: [Part<'_, T>; 2], scores: &mut [T]) {
        let (first, all) = (parts[0].slots.len(), parts[0].slots.len() + parts[1].slots.len());
        let scores = &mut scores[..all];
        let (left, right) = scores.split_at_mut(first);
        dots::<T, FMA>(left, q, parts[0].keys, parts[0].slots);
        dots::<T, FMA>(right, q, parts[1].keys, parts[1].slots);
        let scale = T::ONE / T::from_f64(q.len() as f64).sqrt();
        let largest = max(scores);
        scores.iter_mut().for_each(|s| *s = Real::exp((*s - largest) * scale));
        let total = sum(scores);
        out.fill(T::ZERO);
        let (left, right) = scores.split_at(first);
        add_weighted::<T, FMA>(out, left, parts[0].values, parts[0].slots);
        add_weighted::<T, FMA>(out, right, parts[1].values, parts[1].slots);
        let factor = T::ONE / total;
        out.iter_mut().for_each(|o| *o *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Result, ops::testing::at_each_level, random::Random};

    #[test]
    fn attention_by_definition() -> Result<()> {
        at_each_level(|| {
            let mut random = Random::keyed(3, "attend", 0, 0);
            for (d, counts) in [(1, [1, 0]), (5, [0, 3]), (16, [4, 9]), (33, [17, 1]), (64, [50, 70])] {
                let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| random.normal() as f32).collect() };
                let (q, blocks) = (numbers(d), [0; 4].map(|_| numbers(100 * d)));
                let slots = counts.map(|n| (0..n as u32).map(|i| (i * 37 + 5) % 100).collect::<Vec<u32>>());
                let part = |i: usize| Part { keys: &blocks[i], values: &blocks[i + 2], slots: &slots[i] };
                let (mut out, mut scores) = (vec![9.0; d], vec![0.0; 200]);
                attend(&mut out, &q, [part(0), part(1)], &mut scores);
                let (mut expected, mut total) = (vec![0.0; d], 0.0);
                for (i, &slot) in (0..2).flat_map(|i| slots[i].iter().map(move |slot| (i, slot))) {
                    let row = |block: usize| blocks[block][slot as usize * d..][..d].iter().map(|&x| f64::from(x));
                    let score: f64 = row(i).zip(&q).map(|(k, &q)| k * f64::from(q)).sum();
                    let weight = (score / (d as f64).sqrt()).exp();
                    total += weight;
                    expected.iter_mut().zip(row(i + 2)).for_each(|(e, v)| *e += weight * v);
                }
                for (out, e) in out.iter().zip(expected) {
                    assert!((f64::from(*out) - e / total).abs() < 1e-5, "{d}: {out} {}", e / total);
                }
            }
            Ok(())
        })
    }
}
