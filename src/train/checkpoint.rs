//! Checkpoints: a folder `step-N` is either complete or not there.
//!
//! Written as `step-N.tmp/` (files, fsync, then `manifest.json` with their digests, fsync), renamed,
//! and the parent folder synced: at any moment of a crash, the newest folder that loads is a
//! whole old one or the whole new one.
//!
//! Every rank writes what it owns into a file of its own; see [`saving`](super::saving) for how and when, and
//! [`reshard`](super::reshard) for how others read it.

use super::{Task, loss_scale::LossScale, reshard::Stored, spikes::Spikes};
use crate::{
    bounded_read,
    config::{Config, rename_stored_keys},
    dist::Group,
    error::{Context, Result, bail, ensure, failed, plain},
    report,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
};

pub(super) const FORMAT: u32 = 1;
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const STATE: &str = "state.json";
pub(super) const CONFIG: &str = "config.json";
pub(super) const TENSORS: &str = ".safetensors";
/// Maximum size of a JSON file of a checkpoint, in bytes. A manifest has about 100 bytes for each rank.
const MAX_JSON: u64 = 64 << 20;

/// Everything but tensors and configuration that a run needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Updates of the weights done: steps without those whose update was skipped. Absent in old checkpoints: `step`.
    #[serde(default)]
    pub updates: Option<u64>,
    /// Steps in a row whose update was skipped.
    pub skipped: u64,
    /// Steps whose samples were left out because of spikes.
    #[serde(default)]
    pub passed_over: u64,
    /// How often the run went back to a checkpoint because of a spike.
    #[serde(default)]
    pub rollbacks: u64,
    #[serde(default)]
    pub spikes: Spikes,
    /// Where the loss is scaled.
    #[serde(default)]
    pub loss_scale: Option<LossScale>,
    /// Digests of what the weights belong to (vocabulary, image tokenizer); earlier versions called it `identity`.
    #[serde(alias = "identity")]
    pub fingerprint: BTreeMap<String, String>,
    /// Samples of each data source; empty in old checkpoints.
    #[serde(default)]
    pub sources: Vec<u64>,
    /// What the task itself remembers.
    pub task: serde_json::Value,
}

/// The files of a checkpoint.
#[derive(Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub files: BTreeMap<String, FileInfo>,
}

/// What a file must be like.
#[derive(Clone, Serialize, Deserialize, PartialEq)]
pub struct FileInfo {
    pub bytes: u64,
    pub blake3: String,
}

/// The folder of the checkpoint of `step`.
pub fn at(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step}"))
}

/// The folders `step-N` in order of N.
pub(super) fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut steps = Vec::new();
    if !folder.exists() {
        return Ok(steps);
    }
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
        steps.extend(step.map(|step| (step, path)));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// A checkpoint whose files are whole.
pub struct Loaded {
    pub state: State,
    config: serde_json::Value,
    path: PathBuf,
}

/// Checks the checkpoint at `path`, the ranks sharing its files among them, and reads all but its tensors.
///
/// # Errors
/// On all ranks: names the file that is missing or differs from its digest.
pub fn load(group: &Group, path: &Path) -> Result<Loaded> {
    let checked = check_files(path, group.rank(), group.world_size());
    let complaint = checked.as_ref().err().map_or(String::new(), |error| format!("{error:#}"));
    for theirs in group.gather(complaint.into_bytes())? {
        ensure!(theirs.is_empty(), "{}", String::from_utf8_lossy(&theirs));
    }
    let json = |name: &str| -> Result<serde_json::Value> {
        let bytes = bounded_read::read(&path.join(name), MAX_JSON)?;
        serde_json::from_slice(&bytes).map_err(plain).with_context(|| name.to_owned())
    };
    let state = serde_json::from_value(json(STATE)?).map_err(plain).context(STATE)?;
    Ok(Loaded { state, config: over_defaults(json(CONFIG)?)?, path: path.to_owned() })
}

/// The manifest of the checkpoint at `path`.
fn manifest(path: &Path) -> Result<Manifest> {
    let bytes = bounded_read::read(&path.join(MANIFEST), MAX_JSON)
        .with_context(|| format!("{}: no readable {MANIFEST}", path.display()))?;
    let manifest: serde_json::Value =
        serde_json::from_slice(&bytes).with_context(|| format!("{MANIFEST} is not JSON"))?;
    let format = &manifest["format"];
    ensure!(*format == FORMAT, "{MANIFEST}: `format` is {format}, this program reads {FORMAT}");
    let manifest: Manifest = serde_json::from_value(manifest).map_err(plain).context(MANIFEST)?;
    let plain = |name: &&String| Path::new(name).components().eq([Component::Normal(name.as_ref())]);
    let outside = manifest.files.keys().find(|name| !plain(name)).map_or("", String::as_str);
    ensure!(outside.is_empty(), "{MANIFEST} lists `{outside}`, which is no file of the checkpoint's folder");
    let named = |name: &str| manifest.files.contains_key(name);
    ensure!(named(STATE) && named(CONFIG), "{MANIFEST} does not list {STATE} and {CONFIG}");
    ensure!(manifest.files.keys().any(|name| name.ends_with(TENSORS)), "{MANIFEST} lists no tensors");
    Ok(manifest)
}

/// Checks the `part`-th of `parts` shares of a checkpoint's files.
fn check_files(path: &Path, part: usize, parts: usize) -> Result<()> {
    for (name, info) in manifest(path)?.files.iter().skip(part).step_by(parts) {
        let mut file = bounded_read::open(&path.join(name))?;
        let length = file.metadata()?.len();
        ensure!(length == info.bytes, "{name} has {length} bytes, its manifest says {}", info.bytes);
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut file, &mut hasher).with_context(|| format!("cannot read {name}"))?;
        ensure!(hasher.finalize().to_hex().as_str() == info.blake3, "{name} differs from its digest");
    }
    Ok(())
}

/// The tensors of the checkpoint at `path`.
pub fn tensors(path: &Path) -> Result<Stored> {
    let manifest = manifest(path)?;
    let names = manifest.files.keys().filter(|name| name.ends_with(TENSORS));
    let paths: Vec<PathBuf> = names.map(|name| path.join(name)).collect();
    Stored::open(paths.iter().map(PathBuf::as_path))
}

/// A stored configuration with the defaults of keys that did not exist when it was written: a new key's default
/// is what was done before.
fn over_defaults(mut stored: serde_json::Value) -> Result<serde_json::Value> {
    fn lay(value: serde_json::Value, onto: &mut serde_json::Value) {
        match (value, onto) {
            (serde_json::Value::Object(values), serde_json::Value::Object(onto)) => {
                values
                    .into_iter()
                    .for_each(|(key, value)| lay(value, onto.entry(key).or_insert(serde_json::Value::Null)));
            }
            (value, onto) => *onto = value,
        }
    }
    rename_stored_keys(&mut stored);
    let mut all = serde_json::to_value(Config::default())?;
    lay(stored, &mut all);
    Ok(all)
}

/// The newest checkpoint of `folder` that is whole; damaged ones are named and passed over.
///
/// # Errors
/// There are checkpoints, but none is whole.
pub fn newest(group: &Group, folder: &Path) -> Result<Option<Loaded>> {
    // The leading rank's list counts: a shared file system may show another one elsewhere.
    let ours = if group.leads() { list(folder)?.into_iter().map(|(step, _)| step).collect() } else { Vec::new() };
    let all = group.gather::<u64>(ours)?;
    let steps = all.first().map_or(&[][..], |steps| steps.as_slice());
    for step in steps.iter().rev() {
        let path = at(folder, *step);
        match load(group, &path) {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(e) if group.leads() => report::warn(format_args!("checkpoint {} is not usable: {e:#}", path.display())),
            Err(_) => {}
        }
    }
    ensure!(
        steps.is_empty(),
        failed(
            format_args!("none of the {} checkpoints in {} is usable", steps.len(), folder.display()),
            "delete the folder to start again, or name a checkpoint: --resume PATH"
        )
    );
    Ok(None)
}

/// Whether `folder` holds any checkpoint.
pub fn any(folder: &Path) -> Result<bool> {
    Ok(!list(folder)?.is_empty())
}

/// Deletes a folder, if it is there.
pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot delete {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Sets the checkpoints after `step` aside (`step-N.old`): the run goes on from an older one.
pub fn set_aside_after(folder: &Path, step: u64) -> Result<()> {
    for (_, path) in list(folder)?.into_iter().filter(|(n, _)| *n > step) {
        let old = path.with_extension("old");
        remove(&old)?;
        fs::rename(&path, &old).with_context(|| format!("cannot rename {}", path.display()))?;
    }
    Ok(())
}

impl Loaded {
    /// The tensors.
    pub fn tensors(&self) -> Result<Stored> {
        tensors(&self.path)
    }

    /// Checks that the checkpoint belongs to this configuration, vocabulary and image tokenizer.
    ///
    /// # Errors
    /// Names the first field that differs.
    pub fn check(&self, config: &Config, task: &dyn Task) -> Result<()> {
        let step = self.state.step;
        let hint = "start another run with another `name`, or put the field back";
        if let Some((key, was, is)) = difference("", &self.config, &serde_json::to_value(config)?) {
            bail!(failed(format!("the checkpoint of step {step} was made with {key} = {was}, not {is}"), hint));
        }
        let names: BTreeSet<String> =
            self.state.fingerprint.keys().cloned().chain(task.fingerprint()?.into_keys()).collect();
        for name in names {
            if let Some(digest) = self.state.fingerprint.get(&name)
                && task.has_fingerprint(&name, digest)?
            {
                continue;
            }
            bail!(failed(format!("the checkpoint of step {step} was made with another {name}"), hint));
        }
        self.check_sources(config, &task.sources())
    }

    /// Checks that data sources whose paths changed have as many samples as before: the order of samples depends on it.
    fn check_sources(&self, config: &Config, sources: &[u64]) -> Result<()> {
        let paths: Vec<&str> = config.data.sources.iter().map(|source| source.path.as_str()).collect();
        let stored = self.config["data"]["sources"].as_array().into_iter().flatten();
        let moved = !stored.map(|source| source["path"].as_str().unwrap_or_default()).eq(paths.iter().copied());
        let known = !self.state.sources.is_empty() && self.state.sources.as_slice() != sources;
        let at = self.state.sources.iter().zip(sources).position(|(was, is)| was != is).unwrap_or(0);
        let count = |counts: &[u64]| counts.get(at).copied().unwrap_or(0);
        ensure!(
            !(moved && known),
            failed(
                format!(
                    "data.sources: `{}` has {} samples, but the checkpoint of step {} was made with {}",
                    paths.get(at).unwrap_or(&""),
                    count(sources),
                    self.state.step,
                    count(&self.state.sources)
                ),
                "name the folder that the data moved to, or start another run with another `name`"
            )
        );
        Ok(())
    }
}

/// The weights of data sources. Their folders may move: [`Loaded::check_sources`] compares what is in them.
fn weights(sources: Option<&serde_json::Value>) -> Option<Vec<Option<f64>>> {
    Some(sources?.as_array()?.iter().map(|source| source["weight"].as_f64()).collect())
}

/// The first key below `prefix` whose values differ, with both values.
fn difference(prefix: &str, was: &serde_json::Value, is: &serde_json::Value) -> Option<(String, String, String)> {
    let (Some(a), Some(b)) = (was.as_object(), is.as_object()) else {
        return (was != is).then(|| (prefix.to_owned(), was.to_string(), is.to_string()));
    };
    let mut keys: Vec<_> = a.keys().chain(b.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let missing = serde_json::Value::Null;
    keys.into_iter().find_map(|key| {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if Config::is_free_at_resume(&name) {
            return None;
        }
        if name == "data.sources" && weights(a.get(key)) == weights(b.get(key)) {
            return None;
        }
        difference(&name, a.get(key).unwrap_or(&missing), b.get(key).unwrap_or(&missing))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn endless_files_and_pipes_of_a_checkpoint_are_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let refusal = || format!("{:#}", load(&Group::alone(), folder.path()).err().unwrap());
        std::os::unix::fs::symlink("/dev/zero", at(MANIFEST)).unwrap();
        assert!(refusal().contains("not a regular file"), "{}", refusal());
        fs::remove_file(at(MANIFEST)).unwrap();
        // Of holes, which take no space on the disk.
        fs::File::create(at(MANIFEST)).unwrap().set_len(1 << 40).unwrap();
        assert!(refusal().contains("longer than"), "{}", refusal());
        let info = json!({ "bytes": 0, "blake3": "" });
        let files = json!({ STATE: info, CONFIG: info, "state.safetensors": info });
        fs::write(at(MANIFEST), json!({ "format": FORMAT, "files": files }).to_string()).unwrap();
        assert!(refusal().contains("cannot open"), "{}", refusal());
        assert!(std::process::Command::new("mkfifo").arg(at(CONFIG)).status().unwrap().success());
        assert!(refusal().contains("config.json is not a regular file"), "{}", refusal());
    }

    #[test]
    fn keys_younger_than_a_checkpoint_have_their_defaults() {
        let mut old = serde_json::to_value(Config::default()).unwrap();
        old["train"]["steps"] = json!(7);
        let expected = old.clone();
        let train = old["train"].as_object_mut().unwrap();
        assert!(train.remove("ema_decay").is_some());
        assert_eq!(difference("", &over_defaults(old.clone()).unwrap(), &expected), None);
        old["train"]["gone"] = json!(1);
        let (key, was, is) = difference("", &over_defaults(old).unwrap(), &expected).unwrap();
        assert_eq!([key.as_str(), &was, &is], ["train.gone", "1", "null"]);
    }
}
