//! What the folder of a run holds: metrics, samples, configuration and launches.

use super::{
    lines::{Line, LinesFromEnd},
    metrics::Metrics,
    samples::{self, Samples},
};
use crate::{
    bounded_read,
    config::flatten,
    error::{Context, Result},
};
use serde_json::Value;
use std::path::Path;

/// The file of a run folder that makes it one.
pub const METRICS: &str = "metrics.jsonl";
/// Maximum number of launches that are shown.
const LAUNCHES: usize = 10;
/// Maximum number of keys of a configuration; ours have about a hundred.
const KEYS: usize = 1000;

/// A run.
pub struct Run {
    /// The folder, as the user named it.
    pub name: String,
    pub metrics: Metrics,
    pub samples: Samples,
    /// Values of the configuration by dotted key, in TOML.
    pub config: Vec<(String, String)>,
    pub launches: Launches,
    /// What could not be read, each a sentence without its end.
    pub problems: Vec<String>,
}

/// The starts of a run.
#[derive(Default)]
pub struct Launches {
    /// The newest ones, by time.
    pub shown: Vec<Value>,
    pub total: usize,
}

impl Run {
    /// Reads a run folder; shows `count` samples of at most `bytes`.
    ///
    /// # Errors
    /// Its metrics cannot be read. Anything else that is missing or damaged becomes one of the problems.
    pub fn read(folder: &Path, count: usize, bytes: u64) -> Result<Self> {
        let metrics = Metrics::read(&folder.join(METRICS))?;
        let mut problems = metrics.problems.sentences();
        let config = config(&folder.join("config.toml")).unwrap_or_else(|error| {
            problems.push(format!("the configuration is not shown: {error:#}"));
            Vec::new()
        });
        let launches = launches(&folder.join("launches.jsonl")).unwrap_or_else(|error| {
            problems.push(format!("versions are not shown: {error:#}"));
            Launches::default()
        });
        let samples = samples::read(&folder.join("samples"), count, bytes);
        problems.extend(samples.problems.iter().cloned());
        Ok(Self { name: folder.display().to_string(), metrics, samples, config, launches, problems })
    }

    /// The value of a key of the configuration, without the quotes of a text.
    pub fn setting(&self, key: &str) -> Option<&str> {
        let (_, value) = self.config.iter().find(|(name, _)| name == key)?;
        Some(value.trim_matches('"'))
    }
}

/// The values of a configuration of this or another version of the program.
fn config(path: &Path) -> Result<Vec<(String, String)>> {
    let text = bounded_read::read_text(path, bounded_read::TEXT)?;
    let table: toml::Table = toml::from_str(&text).with_context(|| format!("{} is not TOML", path.display()))?;
    Ok(flatten(table).into_iter().take(KEYS).map(|(key, value)| (key, value.to_string())).collect())
}

fn launches(path: &Path) -> Result<Launches> {
    let (mut lines, mut launches) = (LinesFromEnd::open(path)?, Launches::default());
    while let Some(line) = lines.next()? {
        let Line::Text(text) = line else { continue };
        let Ok(launch) = serde_json::from_slice::<Value>(&text) else { continue };
        launches.total += 1;
        if launches.shown.len() < LAUNCHES {
            launches.shown.push(launch);
        }
    }
    launches.shown.reverse();
    Ok(launches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_folder_with_metrics_alone_is_a_run_and_says_what_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Run::read(folder.path(), 1, 100).is_err());
        fs::write(folder.path().join(METRICS), "{\"step\":1,\"l1\":2}\n").unwrap();
        let run = Run::read(folder.path(), 1, 100).unwrap();
        assert!(run.problems.len() == 2 && run.problems[0].contains("config.toml"), "{:?}", run.problems);
        fs::write(folder.path().join("config.toml"), "name = \"x\"\n[train]\nsteps = 5\nbetas = [0.9, 0.96]\n")
            .unwrap();
        let launch = |i: usize| format!("{{\"step\":{i}}}\n");
        let launches: String = (0..25).map(launch).collect();
        fs::write(folder.path().join("launches.jsonl"), format!("{launches}{{\"cut")).unwrap();
        let run = Run::read(folder.path(), 1, 100).unwrap();
        assert_eq!((run.setting("train.steps"), run.setting("name"), run.setting("no")), (Some("5"), Some("x"), None));
        let shown: Vec<u64> = run.launches.shown.iter().filter_map(|launch| launch["step"].as_u64()).collect();
        assert_eq!((shown, run.launches.total), ((15..25).collect(), 25));
        assert!(run.problems.is_empty(), "{:?}", run.problems);
    }
}
