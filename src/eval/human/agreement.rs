//! Agreement of raters: Krippendorff's alpha with the ordinal metric (K. Krippendorff, "Computing Krippendorff's
//! Alpha-Reliability", 2011).

use std::collections::BTreeMap;

/// Krippendorff's alpha of the ratings of each output, in any order of the raters: 1 is perfect agreement, 0 that of chance.
/// Outputs with fewer than two ratings do not count.
///
/// α = 1 − (n − 1) · Σ o(c, k) δ²(c, k) / Σ n(c) n(k) δ²(c, k), with o the coincidences of the values c and k within outputs,
/// n(c) their sums, and δ(c, k) = Σ n(g) over g from c to k, less (n(c) + n(k)) / 2.
///
/// `None` where alpha is undefined: no output has two ratings, or all counted ratings are equal.
pub fn alpha(outputs: &[Vec<i64>]) -> Option<f64> {
    let counted = || outputs.iter().filter(|ratings| ratings.len() > 1);
    let mut totals: BTreeMap<i64, f64> = BTreeMap::new();
    counted().flatten().for_each(|value| *totals.entry(*value).or_default() += 1.0);
    let n: f64 = totals.values().sum();
    let expected: f64 = pairs(&totals).map(|(c, k)| c.1 * k.1 * distance(&totals, c.0, k.0)).sum();
    let observed: f64 = counted().map(|ratings| disagreement(ratings, &totals)).sum();
    (expected > 0.0).then(|| 1.0 - (n - 1.0) * observed / expected)
}

/// The part of one output in Σ o(c, k) δ²(c, k): of all ordered pairs of its ratings, over the number of ratings less one.
fn disagreement(ratings: &[i64], totals: &BTreeMap<i64, f64>) -> f64 {
    let mut counts: BTreeMap<i64, f64> = BTreeMap::new();
    ratings.iter().for_each(|value| *counts.entry(*value).or_default() += 1.0);
    let sum: f64 = pairs(&counts).map(|(c, k)| c.1 * k.1 * distance(totals, c.0, k.0)).sum();
    sum / (ratings.len() - 1) as f64
}

/// All ordered pairs of different values with their counts. Pairs of equal values have the distance 0.
fn pairs(counts: &BTreeMap<i64, f64>) -> impl Iterator<Item = ((i64, f64), (i64, f64))> {
    let all = counts.iter().flat_map(|c| counts.iter().map(move |k| ((*c.0, *c.1), (*k.0, *k.1))));
    all.filter(|(c, k)| c.0 != k.0)
}

/// δ²(c, k)
fn distance(totals: &BTreeMap<i64, f64>, c: i64, k: i64) -> f64 {
    let of = |value: i64| totals.get(&value).copied().unwrap_or_default();
    let between: f64 = totals.range(c.min(k)..=c.max(k)).map(|(_, count)| count).sum();
    (between - (of(c) + of(k)) / 2.0).powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ratings of each output (column) of a table of raters (rows).
    fn outputs(table: &serde_json::Value) -> Vec<Vec<i64>> {
        let rows: Vec<&Vec<serde_json::Value>> =
            table.as_array().unwrap().iter().map(|row| row.as_array().unwrap()).collect();
        (0..rows[0].len()).map(|column| rows.iter().filter_map(|row| row[column].as_i64()).collect()).collect()
    }

    /// Against the Python package `krippendorff` (`scripts/golden_human.py`).
    #[test]
    fn alpha_is_that_of_the_reference() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../../tests/golden/human.json")).unwrap();
        let tables = golden["alpha"].as_array().unwrap();
        assert!(tables.len() > 12 && tables.iter().filter(|table| table["ordinal"].is_null()).count() > 2);
        for table in tables {
            let found = alpha(&outputs(&table["ratings"]));
            match (found, table["ordinal"].as_f64()) {
                (Some(found), Some(expected)) => {
                    assert!((found - expected).abs() < 1e-12, "{}: {found}, not {expected}", table["name"]);
                }
                (None, None) => {}
                other => panic!("{}: {other:?}", table["name"]),
            }
        }
    }

    #[test]
    fn no_ratings_have_no_agreement() {
        assert_eq!(alpha(&[]), None);
        assert_eq!(alpha(&[vec![], vec![1], vec![2]]), None);
    }
}
