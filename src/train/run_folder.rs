//! The run folder `runs/NAME/`: config.toml, launches.jsonl, metrics.jsonl, samples/, checkpoints/, model/ (or adapter/), and
//! event files of TensorBoard.

use super::{clock::rfc3339, tensorboard::EventFile};
use crate::{
    bounded_read,
    config::Config,
    error::{Context, Result, failed},
    report,
    runtime::{self, Lock},
};
use serde_json::{Value, json};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The folder of one run; at most one process holds it.
pub struct RunFolder {
    root: PathBuf,
    /// The leading rank's; the others only know the paths.
    held: Option<Held>,
    /// Print each line of the metrics to stdout as well.
    pub to_stdout: bool,
}

struct Held {
    metrics: File,
    /// Whether launches.jsonl has its line.
    launched: bool,
    /// With `train.tensorboard`, until it cannot be written.
    events: Option<EventFile>,
    /// Locked until the process ends.
    _lock: File,
}

impl Held {
    /// Writes to the event file, if there is one. If that fails, the run continues without it: metrics.jsonl has the same.
    fn event(&mut self, write: impl FnOnce(&mut EventFile) -> std::io::Result<()>) {
        let Some(events) = &mut self.events else { return };
        if let Err(error) = write(events) {
            tell_lost(events.path(), &error);
            self.events = None;
        }
    }
}

fn tell_lost(path: &Path, error: &std::io::Error) {
    report::warn(format_args!("no more events for TensorBoard: cannot write {}: {error}", path.display()));
}

/// What started this process: program, command line, machine and time; one line of launches.jsonl.
fn launch(step: u64) -> Value {
    let facts = runtime::facts();
    json!({
        "time": rfc3339(SystemTime::now()), "step": step, "program": report::version(),
        "command": runtime::command_line(), "host": runtime::host_name(), "process": std::process::id(), "processor": facts.processor,
        "threads": facts.threads, "memory_bytes": facts.memory_bytes,
    })
}

/// Maximum size of a sample image in bytes that event files take.
const LARGEST_SAMPLE: u64 = 16 << 20;

fn root(parent: &Path, config: &Config) -> PathBuf {
    parent.join("runs").join(&config.name)
}

/// The folder of the checkpoints of a run.
pub fn checkpoints(parent: &Path, config: &Config) -> PathBuf {
    root(parent, config).join("checkpoints")
}

impl RunFolder {
    /// Opens or makes `runs/NAME` below `parent` where this rank `leads`.
    ///
    /// # Errors
    /// Another process trains in it, or it cannot be written.
    pub fn open(parent: &Path, config: &Config, leads: bool) -> Result<Self> {
        let root = root(parent, config);
        if !leads {
            return Ok(Self { root, held: None, to_stdout: false });
        }
        for folder in ["samples", "checkpoints"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let lock = File::create(root.join(".lock"))?;
        match runtime::lock(&lock).context("cannot lock the run folder")? {
            Lock::Held => {}
            Lock::Busy => {
                return Err(failed(
                    format_args!("another process trains in {}", root.display()),
                    "wait for it, or give this run another `name`",
                ));
            }
            Lock::Unsupported(error) => report::warn(format_args!(
                "the file system of {} has no locks ({error}): make sure that no other run uses this folder",
                root.display()
            )),
        }
        let metrics = OpenOptions::new().create(true).append(true).open(root.join("metrics.jsonl"))?;
        Ok(Self { root, held: Some(Held { metrics, launched: false, events: None, _lock: lock }), to_stdout: false })
    }

    /// Writes the configuration, and removes the metrics of steps after `step`, so that no step is in the file twice after
    /// a resume.
    pub fn begin(&mut self, config: &Config, step: u64) -> Result<()> {
        let Some(held) = &mut self.held else { return Ok(()) };
        fs::write(self.root.join("config.toml"), config.to_toml()?)?;
        if !std::mem::replace(&mut held.launched, true) {
            let mut launches = OpenOptions::new().create(true).append(true).open(self.root.join("launches.jsonl"))?;
            launches.write_all(format!("{}\n", launch(step)).as_bytes()).context("cannot write launches.jsonl")?;
        }
        let path = self.root.join("metrics.jsonl");
        // Bytes, not text: a crash may have cut a line anywhere.
        let old = fs::read(&path)?;
        let done = |line: &&[u8]| {
            let line: Option<Value> = serde_json::from_slice(line).ok();
            line.and_then(|line| line["step"].as_u64()).is_some_and(|n| n <= step)
        };
        let kept: Vec<u8> = old.split_inclusive(|b| *b == b'\n').filter(done).flatten().copied().collect();
        let tmp = path.with_extension("tmp");
        fs::write(&tmp, kept)?;
        fs::rename(&tmp, &path)?;
        held.metrics = OpenOptions::new().append(true).open(&path)?;
        if config.train.tensorboard {
            held.events = EventFile::create(&self.root, &runtime::host_name(), step)
                .map_err(|error| tell_lost(&self.root, &error))
                .ok();
        }
        Ok(())
    }

    /// Adds one line to metrics.jsonl.
    pub fn log(&mut self, line: &Value) -> Result<()> {
        let Some(held) = &mut self.held else { return Ok(()) };
        if self.to_stdout {
            report::json(line);
        }
        held.metrics.write_all(format!("{line}\n").as_bytes()).context("cannot write metrics.jsonl")?;
        let numbers = line.as_object().into_iter().flatten().filter(|(name, _)| *name != "step");
        let scalars: Vec<_> =
            numbers.filter_map(|(name, value)| Some((format!("train/{name}"), value.as_f64()?))).collect();
        let step = line["step"].as_u64().unwrap_or_default();
        held.event(|events| events.scalars(step, &scalars));
        Ok(())
    }

    /// Adds the sample image of `step`, if it was written, to the event file, if there is one.
    pub fn log_sample(&mut self, step: u64) {
        let path = self.sample(step);
        let Some(held) = self.held.as_mut().filter(|held| held.events.is_some()) else { return };
        // A task may write none.
        let Ok(png) = bounded_read::read(&path, LARGEST_SAMPLE) else { return };
        let side = |at: usize| png.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        // Signature, length and name of the header, width and height.
        if let (Some(width), Some(height)) = (side(16), side(20)) {
            held.event(|events| events.image(step, "samples", &png, [width, height]));
        }
    }

    /// The folder of the checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The folder of a rank's state that is offloaded to the disk.
    pub fn offload(&self, rank: usize) -> PathBuf {
        self.root.join("offload").join(rank.to_string())
    }

    /// The folder of what the run trains: `model` or `adapter`.
    pub fn output(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The sample image of `step`.
    pub fn sample(&self, step: u64) -> PathBuf {
        self.root.join("samples").join(format!("step-{step:07}.png"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_ends_the_events_but_not_the_run() {
        let parent = tempfile::tempdir().unwrap();
        let mut config = Config { name: "x".into(), ..Config::default() };
        config.train.tensorboard = true;
        let mut folder = RunFolder::open(parent.path(), &config, true).unwrap();
        folder.begin(&config, 0).unwrap();
        let has_events = |folder: &RunFolder| folder.held.as_ref().is_some_and(|held| held.events.is_some());
        folder.log(&json!({ "step": 1, "l1": 0.5 })).unwrap();
        assert!(has_events(&folder));
        folder.held.as_mut().unwrap().events = Some(EventFile::on(Path::new("/dev/full")));
        folder.log(&json!({ "step": 2, "l1": 0.25 })).unwrap();
        assert!(!has_events(&folder));
        folder.log(&json!({ "step": 3, "l1": 0.125 })).unwrap();
        let metrics = fs::read_to_string(parent.path().join("runs/x/metrics.jsonl")).unwrap();
        assert_eq!(metrics.lines().count(), 3);
    }
}
