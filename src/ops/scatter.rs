//! Gradients of table rows: the backward pass of an embedding.

use super::matmul::matrix::Beta;
use rayon::prelude::*;

/// `table[targets[i].0] += dy[targets[i].1]` for rows of `hidden` elements; with [`Beta::Zero`] the table is zeroed
/// first. Each row of the table sums its rows of `dy` in the order of `targets`, so the result does not depend on the
/// number of threads.
///
/// # Panics
/// A row is outside the table or `dy` (a bug in the caller).
pub fn scatter_add(table: &mut [f32], beta: Beta, hidden: usize, dy: &[f32], targets: &[(usize, usize)]) {
    let rows = table.len() / hidden.max(1);
    let mut ends = vec![0; rows + 1];
    targets.iter().for_each(|&(row, _)| ends[row + 1] += 1);
    (0..rows).for_each(|row| ends[row + 1] += ends[row]);
    let (mut next, mut sorted) = (ends.clone(), vec![0; targets.len()]);
    for &(row, source) in targets {
        sorted[next[row]] = source;
        next[row] += 1;
    }
    table.par_chunks_exact_mut(hidden.max(1)).enumerate().with_min_len(16).for_each(|(row, sum)| {
        if beta == Beta::Zero {
            sum.fill(0.0);
        }
        for &source in &sorted[ends[row]..ends[row + 1]] {
            sum.iter_mut().zip(&dy[source * hidden..][..hidden]).for_each(|(s, d)| *s += d);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn equals_sequential_additions() {
        for (rows, hidden, sources) in [(1, 1, 1), (5, 3, 40), (40, 7, 9), (3, 8, 0)] {
            let mut random = Random::keyed(7, "scatter", rows as u64, 0);
            let mut floats = |n: usize| (0..n).map(|_| random.normal() as f32).collect::<Vec<_>>();
            let (dy, start) = (floats(sources * hidden), floats(rows * hidden));
            let targets: Vec<_> = (0..sources).map(|i| (random.below(rows as u64) as usize, i)).collect();
            for beta in [Beta::Zero, Beta::One] {
                let mut expected = if beta == Beta::One { start.clone() } else { vec![0.0; rows * hidden] };
                for &(row, source) in &targets {
                    (0..hidden).for_each(|c| expected[row * hidden + c] += dy[source * hidden + c]);
                }
                let mut table = start.clone();
                scatter_add(&mut table, beta, hidden, &dy, &targets);
                assert_eq!(table, expected);
            }
        }
    }
}
