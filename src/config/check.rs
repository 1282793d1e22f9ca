//! Collects the problems of a configuration.

use std::{collections::BTreeMap, fmt::Display};

/// An invalid value.
pub struct Problem {
    /// The key, e.g. `train.steps`.
    pub key: String,
    /// What is wrong, with key and value.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// Collects the problems of a configuration while its values are checked.
pub(super) struct Check {
    values: BTreeMap<String, toml::Value>,
    problems: Vec<Problem>,
}

impl Check {
    /// For a configuration with these values.
    pub fn new(values: impl IntoIterator<Item = (String, toml::Value)>) -> Self {
        Self { values: values.into_iter().collect(), problems: Vec::new() }
    }

    /// The problems found.
    pub fn problems(self) -> Vec<Problem> {
        self.problems
    }

    /// Records a problem with `key` unless `ok`; `must` completes the sentence "must …".
    pub fn that(&mut self, ok: bool, key: &str, must: impl Display, hint: impl Display) {
        if !ok {
            let value = self.values.get(key).map(|v| format!(" = {v}")).unwrap_or_default();
            let message = format!("`{key}`{value}: must {must}");
            self.problems.push(Problem { key: key.to_owned(), message, hint: hint.to_string() });
        }
    }

    /// Each of the numbers must be finite and in the range `min..=max`.
    pub fn within(&mut self, section: &str, keys: &[(&str, f64)], min: f64, max: f64, hint: &str) {
        for (key, value) in keys {
            let range = if max.is_finite() {
                format!("be a number from {min} to {max}")
            } else {
                format!("be a finite number, at least {min}")
            };
            self.that(value.is_finite() && (min..=max).contains(value), &format!("{section}.{key}"), range, hint);
        }
    }
}
