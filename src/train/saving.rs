//! Writes checkpoints in the background, at most one at a time.
//!
//! After [`Saving::begin`] every rank writes its file from a copy of its state while training continues. Once all are
//! written, [`Saving::finish`] turns the folder into a checkpoint.

use super::{
    checkpoint::{CONFIG, FORMAT, FileInfo, MANIFEST, Manifest, STATE, State, TENSORS, at, list, remove},
    reshard::{self, Parts},
};
use crate::{
    config::Config,
    dist::Group,
    error::{Context, Hint, Result, anyhow},
    runtime::sync_folder,
};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

/// The checkpoint that is being written.
pub struct Saving<'g> {
    group: &'g Group,
    /// The folder of all checkpoints.
    folder: PathBuf,
    /// How many to keep.
    keep: usize,
    /// The last step whose weights gave a finite loss and gradient.
    sound: Option<u64>,
    pending: Option<Pending>,
}

struct Pending {
    step: u64,
    /// This rank's files.
    files: Files,
}

type Written = BTreeMap<String, FileInfo>;

enum Files {
    Done(Written),
    UnderWay(JoinHandle<Result<Written>>),
}

impl<'g> Saving<'g> {
    pub fn new(group: &'g Group, folder: PathBuf, keep: usize) -> Self {
        Self { group, folder, keep, sound: None, pending: None }
    }

    /// The weights after `step` gave a finite loss and gradient.
    pub fn confirm(&mut self, step: u64) {
        self.sound = Some(step);
    }

    /// Waits for the checkpoint before, then starts the one of `state.step`; `parts` are those of this rank. With
    /// `background` a copy is written by another thread; otherwise this returns when this rank's files are on the disk.
    pub fn begin(&mut self, config: &Config, state: &State, parts: Parts<'_>, background: bool) -> Result<()> {
        self.finish()?;
        let tmp = tmp(&self.folder, state.step);
        if self.group.leads() {
            remove(&tmp).and_then(|()| Ok(fs::create_dir_all(&tmp)?)).hint(cannot(&tmp), HINT)?;
        }
        self.group.barrier()?;
        let name = match self.group.world_size() {
            1 => format!("state{TENSORS}"),
            world_size => format!("state-{:05}-of-{world_size:05}{TENSORS}", self.group.rank()),
        };
        let mut files = Vec::new();
        if self.group.leads() {
            files.push((STATE, serde_json::to_vec_pretty(state)?));
            files.push((CONFIG, serde_json::to_vec_pretty(config)?));
        }
        let files = if background {
            let own = |(name, part): (String, reshard::Part<'_>)| {
                (name, reshard::Part { values: Cow::Owned(part.values.into_owned()), ..part })
            };
            let parts: Parts<'static> = parts.into_iter().map(own).collect();
            Files::UnderWay(thread::spawn(move || write_files(&tmp, &name, &parts, files)))
        } else {
            Files::Done(write_files(&tmp, &name, &parts, files)?)
        };
        self.pending = Some(Pending { step: state.step, files });
        Ok(())
    }

    /// Whether this rank's files are written and [`Saving::finish`] need not wait for them; `false` if there are none.
    pub fn is_written(&self) -> bool {
        self.pending.as_ref().is_some_and(|pending| match &pending.files {
            Files::Done(_) => true,
            Files::UnderWay(thread) => thread.is_finished(),
        })
    }

    /// Completes the checkpoint under way, deletes old ones and returns its step.
    pub fn finish(&mut self) -> Result<Option<u64>> {
        let Some(Pending { step, files }) = self.pending.take() else { return Ok(None) };
        let ours = match files {
            Files::Done(written) => written,
            Files::UnderWay(thread) => {
                thread.join().map_err(|_| anyhow!("the thread that writes checkpoints panicked"))??
            }
        };
        let mut files = Written::new();
        for theirs in self.group.gather(serde_json::to_vec(&ours)?)? {
            files.extend(serde_json::from_slice::<Written>(&theirs)?);
        }
        if self.group.leads() {
            let path = at(&self.folder, step);
            publish(&tmp(&self.folder, step), &path, files).hint(cannot(&path), HINT)?;
            prune(&self.folder, self.keep, self.sound)?;
        }
        self.group.barrier()?;
        Ok(Some(step))
    }
}

const HINT: &str = "older checkpoints are untouched";

fn cannot(path: &Path) -> String {
    format!("cannot write the checkpoint {}", path.display())
}

fn tmp(folder: &Path, step: u64) -> PathBuf {
    at(folder, step).with_extension("tmp")
}

/// Writes one rank's files.
fn write_files(tmp: &Path, tensors: &str, parts: &Parts<'_>, others: Vec<(&str, Vec<u8>)>) -> Result<Written> {
    let write = || -> Result<Written> {
        let mut written = Written::new();
        written.insert(tensors.into(), write_synced(&tmp.join(tensors), |out| reshard::write(out, parts))?);
        for (name, bytes) in others {
            written.insert(name.into(), write_synced(&tmp.join(name), |out| Ok(out.write_all(&bytes)?))?);
        }
        Ok(written)
    };
    write().hint(cannot(&tmp.with_extension("")), HINT).inspect_err(|_| {
        // An incomplete checkpoint is useless, and the disk may be full. The files of other ranks are deleted later.
        for name in [tensors, STATE, CONFIG] {
            let _ = fs::remove_file(tmp.join(name));
        }
        let _ = fs::remove_dir(tmp);
    })
}

/// Writes the manifest of a folder whose files are complete, and gives it its final name.
fn publish(tmp: &Path, path: &Path, files: Written) -> Result<()> {
    sync_folder(tmp)?;
    let manifest = serde_json::to_vec_pretty(&Manifest { format: FORMAT, files })?;
    write_synced(&tmp.join(MANIFEST), |out| Ok(out.write_all(&manifest)?))?;
    sync_folder(tmp)?;
    // Only a damaged folder, or one from before a roll-back, can exist already.
    remove(path)?;
    fs::rename(tmp, path)?;
    sync_folder(path.parent().unwrap_or(path))
}

/// Deletes incomplete checkpoints and all but the `keep` newest complete ones. The newest checkpoint whose weights are
/// known to be `sound` is kept as well; as long as none is known to be, nothing complete is deleted.
fn prune(folder: &Path, keep: usize, sound: Option<u64>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            remove(&path)?;
        }
    }
    let mut steps = list(folder)?;
    let Some(sound) = sound.and_then(|sound| steps.iter().map(|(step, _)| *step).rfind(|step| *step <= sound)) else {
        return Ok(());
    };
    steps.truncate(steps.len().saturating_sub(keep.max(2)));
    for (_, old) in steps.into_iter().filter(|(step, _)| *step != sound) {
        fs::remove_dir_all(&old).with_context(|| format!("cannot delete {}", old.display()))?;
    }
    Ok(())
}

/// Writes a file and waits until it is on the disk.
fn write_synced(path: &Path, f: impl FnOnce(&mut Digesting) -> Result<()>) -> Result<FileInfo> {
    let write = || -> Result<FileInfo> {
        let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut out = Digesting { file, hasher: blake3::Hasher::new(), bytes: 0 };
        f(&mut out)?;
        let file = out.file.into_inner()?;
        file.sync_all()?;
        Ok(FileInfo { bytes: out.bytes, blake3: out.hasher.finalize().to_hex().to_string() })
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A file that is written, and the digest of what was.
struct Digesting {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for Digesting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
