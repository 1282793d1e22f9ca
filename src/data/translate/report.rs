//! What a run did, and what it could not do.

use crate::data::bad::{BadCounts, printable};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Why a caption has no translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The translator answered with an error.
    Refused,
    /// The translation is empty.
    Empty,
    /// Other texts of the batch were answered, this one was not.
    NoAnswer,
    /// The answer is not a JSON line with `id` and `text` or `error`.
    BadAnswer,
    /// There was no answer in time.
    Timeout,
    /// The command ended.
    Exited,
    /// The service answered with an HTTP status such as 503.
    HttpStatus,
    /// The service cannot be reached, or the connection was cut.
    Connection,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Why a caption has no translation, with details.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub cause: Cause,
    /// What the translator said, on one line.
    pub message: String,
}

impl Failure {
    pub fn new(cause: Cause, message: impl fmt::Display) -> Self {
        Self { cause, message: printable(&message.to_string()) }
    }
}

/// Number of messages kept for each cause.
const EXAMPLES: usize = 3;

/// Counts over rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Rows or samples, damaged ones included.
    pub rows: u64,
    /// Rows with a translated caption.
    pub translated: u64,
    /// Rows that were written.
    pub written: u64,
    /// Rows without a translation, by cause.
    pub failed: BTreeMap<Cause, Failed>,
    /// Damaged rows, and rows without a caption, by cause.
    pub bad: BadCounts,
}

/// Rows without a translation for one cause.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    pub count: u64,
    pub examples: Vec<String>,
}

impl Report {
    /// Counts a row without a translation.
    pub fn add_failure(&mut self, failure: &Failure) {
        let failed = self.failed.entry(failure.cause).or_default();
        failed.count += 1;
        if failed.examples.len() < EXAMPLES {
            failed.examples.push(failure.message.clone());
        }
    }

    /// Adds the counts of another input.
    pub fn merge(&mut self, other: Self) {
        self.rows += other.rows;
        self.translated += other.translated;
        self.written += other.written;
        for (cause, from) in other.failed {
            let failed = self.failed.entry(cause).or_default();
            failed.count += from.count;
            let left = EXAMPLES.saturating_sub(failed.examples.len());
            failed.examples.extend(from.examples.into_iter().take(left));
        }
        self.bad.merge(other.bad);
    }
}
