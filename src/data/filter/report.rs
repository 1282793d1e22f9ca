//! The counts of a filtering run.

use super::rule::Rule;
use crate::data::bad::BadCounts;
use serde::Serialize;

/// Lengths from here on are counted together.
pub const LONGEST: usize = 60;

/// Counts over all inputs.
#[derive(Debug, Serialize)]
pub struct Report {
    pub inputs: usize,
    pub rows: u64,
    pub kept: u64,
    /// Rows left out by each rule, in the order of the rules, and how many rows remain after it.
    pub rules: Vec<RuleCount>,
    /// Damaged rows by cause.
    pub bad: BadCounts,
    /// Number of rows for each length of the caption; the last item counts all longer ones.
    pub lengths: Vec<u64>,
    /// The same of the rows that are kept.
    pub kept_lengths: Vec<u64>,
}

/// The effect of one rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleCount {
    pub rule: Rule,
    pub left_out: u64,
    pub remaining: u64,
}

impl Report {
    /// Counts the broken rules of all rows.
    pub fn new(inputs: usize, broken: &[Option<Rule>]) -> Self {
        let rows = broken.len() as u64;
        let mut remaining = rows;
        let rules = Rule::ALL.into_iter().map(|rule| {
            let left_out = broken.iter().filter(|broken| **broken == Some(rule)).count() as u64;
            remaining -= left_out;
            RuleCount { rule, left_out, remaining }
        });
        let rules = rules.collect();
        let lengths = vec![0; LONGEST + 1];
        Self { inputs, rows, kept: remaining, rules, bad: BadCounts::default(), kept_lengths: lengths.clone(), lengths }
    }

    /// Counts the length of one caption; 0 stands for a damaged row.
    pub fn add_length(&mut self, length: u16, kept: bool) {
        let at = usize::from(length).min(LONGEST);
        let counts = if kept { vec![&mut self.lengths, &mut self.kept_lengths] } else { vec![&mut self.lengths] };
        counts.into_iter().filter_map(|counts| counts.get_mut(at)).for_each(|count| *count += 1);
    }
}
