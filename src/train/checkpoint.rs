//! Checkpoints: a folder `step-N` is either complete or not there.
//!
//! Written as `step-N.tmp/` (files, fsync, then `manifest.json` with their digests, fsync), renamed,
//! and the parent folder synced: whatever moment a crash picks, the newest folder that loads is a
//! whole old one or the whole new one.
//!
//! Every rank writes what it owns into a file of its own; see [`reshard`] for how others read it.

use super::reshard::{self, Parts};
use crate::{
    config::Config,
    dist::Group,
    error::{Context, Hint, Result, bail, ensure, failed},
    report,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

const FORMAT: u32 = 1;
const STATE: &str = "state.json";
const CONFIG: &str = "config.json";
const TENSORS: &str = ".safetensors";

/// The file of one rank's tensors.
fn tensors_of(group: &Group) -> String {
    match group.world_size() {
        1 => format!("state{TENSORS}"),
        world_size => format!("state-{:05}-of-{world_size:05}{TENSORS}", group.rank()),
    }
}

/// Everything but tensors and configuration that a run needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Steps in a row that were skipped because their gradient was not finite.
    pub skipped: u64,
    /// Digests of what the weights belong to (vocabulary, image tokenizer).
    pub identity: BTreeMap<String, String>,
    /// What the task itself remembers.
    pub task: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, FileInfo>,
}

#[derive(Clone, Serialize, Deserialize, PartialEq)]
struct FileInfo {
    bytes: u64,
    blake3: String,
}

impl FileInfo {
    fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() }
    }
}

/// Writes the checkpoint of `state.step` into `folder`, each rank `parts` of it, and deletes all but the `keep` newest.
pub fn save(
    group: &Group,
    folder: &Path,
    config: &Config,
    state: &State,
    parts: &Parts<'_>,
    keep: usize,
) -> Result<()> {
    let path = folder.join(format!("step-{}", state.step));
    let hint = "older checkpoints are untouched";
    write_folder(group, &path, config, state, parts)
        .hint(format!("cannot write the checkpoint {}", path.display()), hint)?;
    if group.leads() {
        prune(folder, keep)?;
    }
    Ok(())
}

/// Deletes what an earlier crash left half written, and all but the `keep` newest checkpoints.
fn prune(folder: &Path, keep: usize) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            remove(&path)?;
        }
    }
    let mut steps = list(folder)?;
    steps.truncate(steps.len().saturating_sub(keep.max(2)));
    for (_, old) in steps {
        fs::remove_dir_all(&old).with_context(|| format!("cannot delete {}", old.display()))?;
    }
    Ok(())
}

fn write_folder(group: &Group, path: &Path, config: &Config, state: &State, parts: &Parts<'_>) -> Result<()> {
    let tmp = path.with_extension("tmp");
    let write = |name: &str, bytes: &[u8]| -> Result<(String, FileInfo)> {
        write_synced(&tmp.join(name), bytes)?;
        Ok((name.to_owned(), FileInfo::of(bytes)))
    };
    if group.leads() {
        remove(&tmp)?;
        fs::create_dir_all(&tmp)?;
    }
    group.barrier()?;
    let mut ours = vec![write(&tensors_of(group), &reshard::encode(parts)?)?];
    if group.leads() {
        ours.push(write(STATE, &serde_json::to_vec_pretty(state)?)?);
        ours.push(write(CONFIG, &serde_json::to_vec_pretty(config)?)?);
    }
    let files = group.gather(ours)?.iter().flat_map(|files| files.iter().cloned()).collect();
    if group.leads() {
        sync(&tmp)?;
        write("manifest.json", &serde_json::to_vec_pretty(&Manifest { format: FORMAT, files })?)?;
        sync(&tmp)?;
        // Only a damaged folder, or one of a run that was taken back, can be in the way.
        remove(path)?;
        fs::rename(&tmp, path)?;
        sync(path.parent().unwrap_or(path))?;
    }
    group.barrier()
}

/// Writes a file and waits until it is on the disk.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).with_context(|| format!("cannot write {}", path.display()))
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder)?.sync_all().with_context(|| format!("cannot sync {}", folder.display()))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot delete {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The folders `step-N` in order of N.
fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
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
    /// Names of the files that hold tensors.
    tensors: Vec<String>,
}

/// Checks the checkpoint at `path` and reads all but its tensors.
///
/// # Errors
/// Names the file that is missing or differs from its digest.
pub fn load(path: &Path) -> Result<Loaded> {
    let manifest =
        fs::read(path.join("manifest.json")).with_context(|| format!("{}: no manifest.json", path.display()))?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).context("manifest.json is not JSON")?;
    let format = &manifest["format"];
    ensure!(*format == FORMAT, "manifest.json: `format` is {format}, this program reads {FORMAT}");
    let manifest: Manifest = serde_json::from_value(manifest).context("manifest.json")?;
    let file = |name: &str| {
        let info = manifest.files.get(name).with_context(|| format!("manifest.json does not list {name}"))?;
        let path = path.join(name);
        let length = fs::metadata(&path).with_context(|| format!("{name} is missing"))?.len();
        ensure!(length == info.bytes, "{name} has {length} bytes, its manifest says {}", info.bytes);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {name}"))?;
        ensure!(FileInfo::of(&bytes) == *info, "{name} differs from its digest");
        Ok(bytes)
    };
    let tensors: Vec<String> = manifest.files.keys().filter(|name| name.ends_with(TENSORS)).cloned().collect();
    ensure!(!tensors.is_empty(), "manifest.json lists no tensors");
    tensors.iter().try_for_each(|name| file(name).map(drop))?;
    Ok(Loaded {
        state: serde_json::from_slice(&file(STATE)?).context(STATE)?,
        config: over_defaults(serde_json::from_slice(&file(CONFIG)?).context(CONFIG)?)?,
        path: path.to_owned(),
        tensors,
    })
}

/// A stored configuration with the defaults of keys that did not exist when it was written: a new key's default
/// is what was done before.
fn over_defaults(stored: serde_json::Value) -> Result<serde_json::Value> {
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
    let mut all = serde_json::to_value(Config::default())?;
    lay(stored, &mut all);
    Ok(all)
}

/// The newest checkpoint of `folder` that is whole; damaged ones are named and passed over.
///
/// # Errors
/// There are checkpoints, but none is whole.
pub fn newest(folder: &Path) -> Result<Option<Loaded>> {
    let steps = list(folder)?;
    for (_, path) in steps.iter().rev() {
        match load(path) {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(e) => report::warn(format_args!("checkpoint {} is not usable: {e:#}", path.display())),
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

/// Sets the checkpoints after `step` aside (`step-N.old`): the run goes on from an older one.
pub fn set_aside_after(folder: &Path, step: u64) -> Result<()> {
    for (_, path) in list(folder)?.into_iter().filter(|(n, _)| *n > step) {
        let old = path.with_extension("old");
        remove(&old)?;
        fs::rename(&path, &old).with_context(|| format!("cannot rename {}", path.display()))?;
    }
    Ok(())
}

/// Keys that a resumed run may change: they move no number of the steps already done.
const FREE: [&str; 13] = [
    "name",
    "data.prefetch",
    "data.workers",
    "data.max_bad_ratio",
    "train.steps",
    "train.recompute",
    "train.shard_stage",
    "train.rank_timeout",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "sample",
    "image_tokenizer.path",
];

impl Loaded {
    /// Fills `wanted` from the tensors' files, one file in memory at a time.
    ///
    /// # Errors
    /// A tensor is missing, unknown, or of another size.
    pub fn read(&self, wanted: &mut Parts<'_>) -> Result<()> {
        let files = self.tensors.iter().map(|name| Ok((name.as_str(), fs::read(self.path.join(name))?)));
        reshard::fill(wanted, files)
    }

    /// Checks that the checkpoint belongs to this configuration, vocabulary and image tokenizer.
    ///
    /// # Errors
    /// Names the first field that differs.
    pub fn check(&self, config: &Config, identity: &BTreeMap<String, String>) -> Result<()> {
        let step = self.state.step;
        let hint = "start another run with another `name`, or put the field back";
        if let Some((key, was, is)) = difference("", &self.config, &serde_json::to_value(config)?) {
            bail!(failed(format!("the checkpoint of step {step} was made with {key} = {was}, not {is}"), hint));
        }
        let mut names: Vec<_> = self.state.identity.keys().chain(identity.keys()).collect();
        names.sort_unstable();
        if let Some(name) = names.into_iter().find(|name| self.state.identity.get(*name) != identity.get(*name)) {
            bail!(failed(format!("the checkpoint of step {step} was made with another {name}"), hint));
        }
        Ok(())
    }
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
        if FREE.contains(&name.as_str()) {
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
