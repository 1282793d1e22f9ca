//! ROUGE-L (Lin 2004): F-measure of the longest common subsequence, as in pycocoevalcap: the best precision and the best
//! recall over references, with recall weighted by β = 1.2.

use super::case::{Case, Scores};
use rayon::prelude::*;

const BETA: f64 = 1.2;

/// The scores of all images.
pub fn rouge_l(cases: &[Case]) -> Scores {
    Scores::mean(cases.par_iter().map(score).collect())
}

fn score(case: &Case) -> f64 {
    let (mut precision, mut recall) = (0.0f64, 0.0f64);
    for reference in &case.references {
        // pycocoevalcap reads an empty text as one empty token, so that two empty texts are equal.
        let common = match (case.caption.is_empty(), reference.is_empty()) {
            (true, true) => 1.0,
            _ => longest_common_subsequence(&case.caption, reference) as f64,
        };
        precision = precision.max(common / case.caption.len().max(1) as f64);
        recall = recall.max(common / reference.len().max(1) as f64);
    }
    if precision == 0.0 || recall == 0.0 {
        return 0.0;
    }
    (1.0 + BETA * BETA) * precision * recall / (recall + BETA * BETA * precision)
}

/// Length of the longest common subsequence.
fn longest_common_subsequence(a: &[char], b: &[char]) -> usize {
    // The row of the usual table for the tokens of `a` so far.
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (i, y) in b.iter().enumerate() {
            let above = row[i + 1];
            row[i + 1] = if x == y { diagonal + 1 } else { above.max(row[i]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::longest_common_subsequence;

    #[test]
    fn subsequences_may_have_gaps() {
        let length = |a: &str, b: &str| {
            let [a, b] = [a, b].map(|text| text.chars().collect::<Vec<_>>());
            longest_common_subsequence(&a, &b)
        };
        assert_eq!(
            [length("一只白猫", "一猫"), length("猫白", "白猫"), length("", "猫"), length("abcbdab", "bdcaba")],
            [2, 1, 0, 4]
        );
    }
}
