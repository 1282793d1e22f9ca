//! A filtering run: both passes over the inputs of this rank, and the comparison of all rows in between.

use super::{
    Settings, duplicates,
    feature::{self, Feature},
    input::{Input, InputKind},
    report::Report,
    rule::Rule,
    scan::scan,
    write::{write_shard, write_table},
};
use crate::{
    bounded_read,
    data::{
        bad::BadCounts,
        embeddings::PairEmbedder,
        output::{Lock, remove_leftovers, write_whole},
    },
    error::{Context, Error, Hint, Result, ensure, failed},
    report::note,
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// Time between two looks for the features of other ranks.
const POLL: Duration = Duration::from_secs(2);

/// A run of `vilg data filter`.
pub struct Filter<'a> {
    pub settings: Settings,
    /// Computes the similarity of shards, which then does not come from a column.
    pub matcher: Option<&'a PairEmbedder<'a>>,
    pub inputs: Vec<Input>,
    /// Folder of the outputs, or the output itself if `is_file`.
    pub output: PathBuf,
    /// Whether the only input becomes the file `output`.
    pub is_file: bool,
    pub rank: usize,
    pub world_size: usize,
}

/// An input with its features.
struct InputFeatures<'a> {
    input: &'a Input,
    /// What the features are made from: the input as it was when the run began, the settings and the matcher.
    made_from: String,
    /// Where they are stored.
    path: PathBuf,
}

impl InputFeatures<'_> {
    fn stored(&self) -> Option<(u64, BadCounts)> {
        feature::stored(&self.path, &self.made_from)
    }

    fn changed(&self) -> Error {
        failed(format_args!("{} changed", self.input.path.display()), "run the command again")
    }
}

/// What a run did.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Counts over all inputs of all ranks.
    #[serde(flatten)]
    pub report: Report,
    /// Outputs that this rank wrote.
    pub written: u64,
    /// Outputs of this rank that an earlier run finished.
    pub finished_before: u64,
}

/// The record of a finished output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Done {
    /// Absolute path of the input.
    input: PathBuf,
    made_from: String,
    /// Digest of which rows are kept.
    kept: String,
}

impl Filter<'_> {
    /// Filters all inputs of this rank; `progress` is called with numbers of rows, twice for each row.
    ///
    /// # Errors
    /// An input cannot be read, an output is not one of ours or cannot be written, or another process writes to it.
    pub fn run(&self, progress: &(impl Fn(u64) + Sync)) -> Result<Outcome> {
        let state = self.state();
        let cannot = || format!("cannot create {}", state.display());
        let of_rank = state.join(format!("rank{}", self.rank));
        fs::create_dir_all(&of_rank).hint(cannot(), "choose another output with -o")?;
        let _lock = Lock::take(&of_rank)?;
        let inputs = self.inputs.iter().map(|input| self.features_of(input)).collect::<Result<Vec<_>>>()?;
        let own = || inputs.iter().enumerate().filter(|(index, _)| self.is_own(*index));
        own().try_for_each(|(_, input)| self.check_output(input.input))?;
        own().try_for_each(|(_, input)| self.scan(input, progress))?;
        self.wait_for_other_ranks(&inputs)?;
        let (broken, ends) = self.apply_rules(&inputs)?;
        let report = count(&inputs, &broken)?;
        let mut outcome = Outcome { report, written: 0, finished_before: 0 };
        for (index, input) in own() {
            let start = if index == 0 { 0 } else { ends.get(index - 1).copied().unwrap_or(0) };
            let broken = ends.get(index).and_then(|end| broken.get(start..*end)).unwrap_or_default();
            let written = self.write(input, broken)?;
            *(if written { &mut outcome.written } else { &mut outcome.finished_before }) += 1;
            progress(broken.len() as u64);
        }
        Ok(outcome)
    }

    /// Where features and records are stored: beside the output, under a name that no source reads.
    fn state(&self) -> PathBuf {
        if !self.is_file {
            return self.output.join(".filter");
        }
        let name = self.output.file_name().unwrap_or_default().to_string_lossy();
        self.output.with_file_name(format!(".{name}.filter"))
    }

    fn state_file(&self, input: &Input, extension: &str) -> PathBuf {
        let mut path = self.state().join(&input.name).into_os_string();
        path.push(format!(".{extension}"));
        path.into()
    }

    /// The output of an input.
    fn output_of(&self, input: &Input) -> PathBuf {
        if self.is_file { self.output.clone() } else { self.output.join(&input.name) }
    }

    fn is_own(&self, index: usize) -> bool {
        index % self.world_size == self.rank
    }

    fn made_from(&self, input: &Input) -> Result<String> {
        let matcher = self.matcher.map_or(String::new(), |matcher| format!("; matcher {}", matcher.digest));
        Ok(format!("{}; settings {}{matcher}", input.stamp()?, self.settings.digest()))
    }

    fn features_of<'a>(&self, input: &'a Input) -> Result<InputFeatures<'a>> {
        Ok(InputFeatures { input, made_from: self.made_from(input)?, path: self.state_file(input, "features") })
    }

    /// Stores the features of an input, unless an earlier run did.
    fn scan(&self, features: &InputFeatures<'_>, progress: &(impl Fn(u64) + Sync)) -> Result<()> {
        if let Some((rows, _)) = features.stored() {
            progress(rows);
            return Ok(());
        }
        let path = &features.path;
        remove_leftovers(path);
        create_parent(path)?;
        feature::write(path, &features.made_from, |writer| {
            scan(features.input, &self.settings, self.matcher, progress, &mut |rows| writer.add(rows).map(|()| true))
        })
    }

    /// Refuses to replace a file that an earlier run did not make from the same input.
    fn check_output(&self, input: &Input) -> Result<()> {
        let path = self.output_of(input);
        if !path.exists() {
            return Ok(());
        }
        let record = read_done(&self.state_file(input, "done"));
        let same = record.is_some_and(|done| Some(done.input) == input.origin().ok());
        let message = format!("{} exists and was not made from {}", path.display(), input.path.display());
        ensure!(same, failed(message, "choose another output with -o"));
        Ok(())
    }

    /// Waits until the features of all inputs are stored.
    fn wait_for_other_ranks(&self, inputs: &[InputFeatures<'_>]) -> Result<()> {
        let mut said = false;
        for (index, features) in inputs.iter().enumerate().filter(|(index, _)| !self.is_own(*index)) {
            while features.stored().is_none() {
                if !std::mem::replace(&mut said, true) {
                    let rank = index % self.world_size;
                    note(format_args!("waiting for rank {rank} to scan {}", features.input.path.display()));
                }
                thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// The broken rule of each row of all inputs, and the number of rows up to the end of each input.
    fn apply_rules(&self, inputs: &[InputFeatures<'_>]) -> Result<(Vec<Option<Rule>>, Vec<usize>)> {
        let mut ends = Vec::new();
        let mut end = 0;
        for features in inputs {
            end += features.stored().ok_or_else(|| features.changed())?.0 as usize;
            ends.push(end);
        }
        let many = || failed(format_args!("{end} rows are too many for one run"), "filter parts of at most 4 billion");
        ensure!(u32::try_from(end).is_ok(), many());
        let mut broken = Vec::with_capacity(end);
        each_row(inputs, &mut |_, feature| {
            broken.push(feature.broken.or_else(|| self.settings.broken_by_similarity(feature.similarity)));
        })?;
        duplicates::mark(&mut broken, &self.settings.duplicates, &|each| each_row(inputs, each))?;
        Ok((broken, ends))
    }

    /// Writes the rows of an input that are kept; false if an earlier run did.
    fn write(&self, features: &InputFeatures<'_>, broken: &[Option<Rule>]) -> Result<bool> {
        let input = features.input;
        ensure!(self.made_from(input)? == features.made_from, features.changed());
        let path = self.output_of(input);
        let cannot = || format!("cannot write {}", path.display());
        let done = Done { input: input.origin()?, made_from: features.made_from.clone(), kept: digest(broken) };
        let record = self.state_file(input, "done");
        let none = input.kind != InputKind::Table && !broken.contains(&None);
        if read_done(&record).is_some_and(|earlier| earlier == done) && path.exists() != none {
            return Ok(false);
        }
        create_parent(&path)?;
        remove_leftovers(&path);
        // The record first: after an interruption it still says that the output is ours.
        write_done(&record, &Done { kept: String::new(), ..done.clone() })?;
        if none {
            if path.exists() {
                fs::remove_file(&path).with_context(cannot)?;
            }
        } else if input.kind == InputKind::Table {
            write_table(input, broken, &path).with_context(cannot)?;
        } else {
            let shard = input.shard()?;
            write_shard(&shard, broken, &self.settings, &path).with_context(cannot)?;
        }
        write_done(&record, &done).map(|()| true)
    }
}

/// Digest of which rows are kept.
fn digest(broken: &[Option<Rule>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for rows in broken.chunks(1 << 16) {
        hasher.update(&rows.iter().map(|broken| u8::from(broken.is_none())).collect::<Vec<u8>>());
    }
    hasher.finalize().to_hex().to_string()
}

/// Calls `each` with the feature of each row of all inputs.
fn each_row(inputs: &[InputFeatures<'_>], each: &mut dyn FnMut(u32, &Feature)) -> Result<()> {
    let mut row = 0_u32;
    for features in inputs {
        feature::for_each(&features.path, &features.made_from, |feature| {
            each(row, feature);
            row = row.saturating_add(1);
        })?;
    }
    Ok(())
}

fn count(inputs: &[InputFeatures<'_>], broken: &[Option<Rule>]) -> Result<Report> {
    let mut report = Report::new(inputs.len(), broken);
    each_row(inputs, &mut |row, feature| {
        report.add_length(feature.length, broken.get(row as usize).is_some_and(Option::is_none));
    })?;
    inputs.iter().filter_map(InputFeatures::stored).for_each(|(_, bad)| report.bad.merge(bad));
    Ok(report)
}

fn read_done(path: &Path) -> Option<Done> {
    serde_json::from_slice(&bounded_read::read(path, bounded_read::TEXT).ok()?).ok()
}

fn write_done(path: &Path, done: &Done) -> Result<()> {
    let text = serde_json::to_vec(done)?;
    write_whole(path, |file| Ok(file.write_all(&text).map(|()| true)?))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn create_parent(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
