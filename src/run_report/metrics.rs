//! The curves of a run, from its metrics.jsonl.

use super::{
    curve::Curve,
    lines::{Line, LinesFromEnd},
};
use crate::error::Result;
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// Maximum number of curves of a run; further names are left out.
const CURVES: usize = 64;
/// Maximum length of a name or a unit in bytes.
const NAME: usize = 100;

/// Names of what every training run logs beside its losses.
pub const GRADIENT_NORM: &str = "gradient_norm";
pub const LEARNING_RATE: &str = "learning_rate";
pub const PER_SECOND: &str = "per_second";
pub const SECONDS: &str = "seconds";
pub const PEAK_MEMORY: &str = "peak_memory_bytes";
pub const TFLOPS: &str = "tflops";
pub const MFU: &str = "mfu";
pub const DATA_WAIT: &str = "data_wait";
pub const COMMUNICATION_WAIT: &str = "communication_wait";
pub const DEVICE_MEMORY: &str = "device_memory_bytes";
pub const DEVICE_PEAK_MEMORY: &str = "device_peak_memory_bytes";
pub const DEVICE_RESERVED: &str = "device_reserved_bytes";

/// What a metrics.jsonl holds.
#[derive(Debug, Default)]
pub struct Metrics {
    pub curves: BTreeMap<String, Curve>,
    /// Number of lines that count.
    pub lines: u64,
    /// The last step, and the times that the first and the last line name.
    pub last_step: Option<u64>,
    pub times: Option<[String; 2]>,
    /// Seconds of all steps, and what they processed, in `unit`.
    pub seconds: f64,
    pub amount: f64,
    pub unit: String,
    pub problems: Problems,
}

/// What could not be shown.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// Lines that are not a JSON object with a step.
    pub broken: u64,
    /// Whether the last line is one of them, cut in the middle.
    pub cut: bool,
    /// Values that are not finite (`null` in JSON).
    pub not_finite: u64,
    /// Lines of steps that the run repeated later.
    pub replaced: u64,
    /// Whether there were more names than curves are kept.
    pub more_names: bool,
}

impl Metrics {
    /// Reads a metrics.jsonl of any length: from its end, so that it is known which lines a resumed run has replaced.
    ///
    /// # Errors
    /// It is missing or cannot be read. Broken lines are counted.
    pub fn read(path: &Path) -> Result<Self> {
        let (mut lines, mut metrics) = (LinesFromEnd::open(path)?, Self::default());
        let mut is_last = true;
        while let Some(line) = lines.next()? {
            let parsed = match &line {
                Line::Text(text) if text.iter().all(u8::is_ascii_whitespace) => continue,
                Line::Text(text) => serde_json::from_slice(text).ok(),
                Line::TooLong => None,
            };
            let counted = parsed.is_some_and(|line: Value| metrics.add(&line));
            if !counted {
                metrics.problems.broken += 1;
                metrics.problems.cut |= is_last && lines.is_cut;
            }
            is_last = false;
        }
        Ok(metrics)
    }

    /// Adds a line; false if it is not a step of a run.
    fn add(&mut self, line: &Value) -> bool {
        let Some(object) = line.as_object() else { return false };
        let Some(step) = object.get("step").and_then(Value::as_u64) else { return false };
        let (mut counts, mut refused, mut numbers) = (false, false, 0);
        for (name, value) in object.iter().filter(|(name, _)| *name != "step") {
            if !(value.is_number() || value.is_null()) || name.len() > NAME {
                continue;
            }
            numbers += 1;
            if self.curves.len() >= CURVES && !self.curves.contains_key(name) {
                self.problems.more_names = true;
                continue;
            }
            let value = value.as_f64().filter(|value| value.is_finite());
            let added = self.curves.entry(name.clone()).or_default().add(step, value);
            (counts, refused) = (counts | added, refused | !added);
            self.problems.not_finite += u64::from(added && value.is_none());
        }
        if !counts {
            self.problems.replaced += u64::from(refused);
            return numbers > 0;
        }
        self.lines += 1;
        self.last_step = self.last_step.max(Some(step));
        let number = |name| object.get(name).and_then(Value::as_f64).unwrap_or_default();
        self.seconds += number(SECONDS);
        self.amount += number(SECONDS) * number(PER_SECOND);
        let text = |name| object.get(name).and_then(Value::as_str).filter(|text| text.len() <= NAME);
        if self.unit.is_empty() {
            text("unit").unwrap_or_default().clone_into(&mut self.unit);
        }
        if let Some(time) = text("time") {
            let [first, _] = self.times.get_or_insert_with(|| [time.to_owned(), time.to_owned()]);
            time.clone_into(first);
        }
        true
    }

    /// Throughput over all steps, in `unit` a second.
    pub fn per_second(&self) -> Option<f64> {
        (self.seconds > 0.0 && self.amount > 0.0).then(|| self.amount / self.seconds)
    }
}

impl Problems {
    /// In words, each a sentence without its end; none: everything is shown.
    pub fn sentences(&self) -> Vec<String> {
        let mut all = Vec::new();
        if self.broken > 0 {
            let cut = if self.cut { "; the last one is cut" } else { "" };
            all.push(format!("lines left out because they are not a step in JSON: {}{cut}", self.broken));
        }
        if self.not_finite > 0 {
            all.push(format!("values left out because they are not finite: {}", self.not_finite));
        }
        if self.replaced > 0 {
            all.push(format!("lines left out because the run repeated their steps after a resume: {}", self.replaced));
        }
        if self.more_names {
            all.push(format!("only {CURVES} of the logged names are shown"));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &str) -> Metrics {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, content).unwrap();
        Metrics::read(file.path()).unwrap()
    }

    fn values(metrics: &Metrics, name: &str) -> Vec<[f64; 2]> {
        metrics.curves[name].points().iter().map(|point| [point.step, point.mean]).collect()
    }

    #[test]
    fn lines_become_curves_times_and_throughput() {
        let metrics = read(
            "{\"step\":1,\"image\":2.5,\"seconds\":2.0,\"per_second\":10.0,\"unit\":\"tokens\",\"time\":\"T1\"}\n\
             {\"step\":2,\"image\":1.5,\"seconds\":1.0,\"per_second\":40.0,\"unit\":\"tokens\",\"time\":\"T2\"}\n",
        );
        assert_eq!(values(&metrics, "image"), [[1.0, 2.5], [2.0, 1.5]]);
        assert_eq!((metrics.lines, metrics.last_step, metrics.unit.as_str()), (2, Some(2), "tokens"));
        assert_eq!((metrics.times, metrics.amount / metrics.seconds), (Some(["T1".into(), "T2".into()]), 20.0));
        assert_eq!(metrics.problems, Problems::default());
    }

    #[test]
    fn broken_lines_are_counted_and_the_rest_is_shown() {
        let metrics = read(
            "{\"step\":1,\"l1\":5}\nnot json\n{\"loss\":3}\n[1]\n\n{\"step\":2,\"l1\":NaN}\n{\"step\":3,\"l1\":null}\n\
             {\"step\":-1,\"l1\":1}\n{\"step\":4,\"l1\":2}\n{\"step\":5,\"l",
        );
        assert_eq!(values(&metrics, "l1"), [[1.0, 5.0], [4.0, 2.0]]);
        let problems = Problems { broken: 6, cut: true, not_finite: 1, ..Problems::default() };
        assert_eq!(metrics.problems, problems);
        let said = metrics.problems.sentences().join("\n");
        assert!(said.contains("in JSON: 6; the last one is cut") && said.contains("not finite: 1"), "{said}");
    }

    #[test]
    fn a_whole_last_line_without_its_end_counts() {
        let metrics = read("{\"step\":1,\"l1\":5}\n{\"step\":2,\"l1\":4}");
        assert_eq!((metrics.lines, metrics.problems), (2, Problems::default()));
    }

    #[test]
    fn the_later_line_of_a_step_counts() {
        let line = |step: u64, l1: f64| format!("{{\"step\":{step},\"l1\":{l1},\"seconds\":1}}\n");
        let all = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 6.5), (3, 6.0), (4, 5.0)];
        let metrics = read(&all.map(|(step, l1)| line(step, l1)).concat());
        assert_eq!(values(&metrics, "l1"), [[1.0, 9.0], [2.0, 6.5], [3.0, 6.0], [4.0, 5.0]]);
        assert_eq!((metrics.lines, metrics.problems.replaced, metrics.seconds), (4, 2, 4.0));
    }

    #[test]
    fn names_without_end_take_bounded_memory() {
        let lines: String = (0..1000).map(|i| format!("{{\"step\":{i},\"name{i}\":1}}\n")).collect();
        let metrics = read(&lines);
        assert!(metrics.curves.len() == CURVES && metrics.problems.more_names);
    }
}
