//! What is filtered: tar shards, folders of images, and tables.

use crate::{
    config,
    data::{dataset::Source, paths, remote::is_remote, shard::Shard, table},
    error::{Context, Result, ensure, failed, usage},
};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

/// One unit of work; it becomes one file of the output.
#[derive(Debug, Clone)]
pub struct Input {
    /// Path, or URL without secrets.
    pub path: PathBuf,
    /// Path of its output below the output folder.
    pub name: PathBuf,
    pub kind: InputKind,
    remote: Option<Arc<Shard>>,
}

/// What an [`Input`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    Tar,
    /// A folder of images with captions; the output is one tar shard.
    Folder,
    Table,
}

impl Input {
    /// The size and modification time of a file, or the version of a remote shard; for a folder, of all its images and
    /// captions.
    ///
    /// # Errors
    /// The input cannot be read.
    pub fn stamp(&self) -> Result<String> {
        if self.kind == InputKind::Folder || self.remote.is_some() {
            return Ok(self.shard()?.digest(true)?.to_hex().to_string());
        }
        let meta = fs::metadata(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        let modified = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(format!("{} bytes, {} ns", meta.len(), modified.unwrap_or_default().as_nanos()))
    }

    /// The samples of a tar or a folder.
    ///
    /// # Errors
    /// The folder cannot be read. A damaged tar is no error: see [`Shard::bad`].
    pub fn shard(&self) -> Result<Arc<Shard>> {
        match (self.kind, &self.remote) {
            (_, Some(shard)) => Ok(shard.clone()),
            (InputKind::Tar, None) => Ok(Arc::new(Shard::tar(self.path.clone(), self.name.clone()))),
            _ => {
                let source = Source::open(&self.path.to_string_lossy(), 1.0)?;
                let images = source.shards.into_iter().next_back();
                images.map(Arc::new).with_context(|| format!("no images in {}", self.path.display()))
            }
        }
    }

    /// The absolute path, or the URL.
    ///
    /// # Errors
    /// The input no longer exists.
    pub fn origin(&self) -> Result<PathBuf> {
        match self.remote {
            Some(_) => Ok(self.path.clone()),
            None => fs::canonicalize(&self.path).with_context(|| format!("cannot find {}", self.path.display())),
        }
    }
}

/// Finds the inputs of all sources, in order: tables by name or pattern, and what other commands take as a source. Of a
/// folder without shards and images, its tables are taken. Remote shards are read through the cache of `cache`.
///
/// # Errors
/// A source has no input, a remote one cannot be read, or two inputs would be written under one name.
pub fn find(sources: &[String], cache: &config::Data) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for source in sources {
        if is_remote(source) {
            let shards = Source::open_with(source, 1.0, cache)?.shards;
            inputs.extend(shards.into_iter().map(|shard| {
                let (path, name) = (shard.path.clone(), shard.name.clone());
                Input { path, name, kind: InputKind::Tar, remote: Some(Arc::new(shard)) }
            }));
            continue;
        }
        let expanded = paths::expand(source)?;
        let tables: Vec<PathBuf> = match expanded.iter().all(|path| is_table(path)) {
            true => expanded,
            false => Vec::new(),
        };
        if !tables.is_empty() {
            inputs.extend(tables.into_iter().map(|path| of_table(path, None)));
            continue;
        }
        match paths::find(source) {
            Ok(found) => {
                let tars =
                    found.tars.into_iter().map(|(path, name)| Input { path, name, kind: InputKind::Tar, remote: None });
                inputs.extend(tars);
                if !found.images.is_empty() {
                    let (path, name) = (PathBuf::from(source), PathBuf::from("00000.tar"));
                    inputs.push(Input { path, name, kind: InputKind::Folder, remote: None });
                }
            }
            Err(error) => {
                let before = inputs.len();
                let root = Path::new(source);
                let files = if root.is_dir() { paths::files(root)? } else { Vec::new() };
                let tables = files.into_iter().filter(|path| is_table(path));
                inputs.extend(tables.map(|path| of_table(path, Some(root))));
                let missing =
                    || usage(format_args!("there is no table `{source}`"), "name .jsonl, .csv, .tsv or .parquet");
                ensure!(inputs.len() > before, if has_table_extension(root) { missing() } else { error });
            }
        }
    }
    ensure!(!inputs.is_empty(), usage("there is no input", "name shards, a folder or tables"));
    let mut names = BTreeSet::new();
    for Input { name, .. } in &inputs {
        let twice = || failed(format_args!("two outputs would be named {}", name.display()), "filter them separately");
        ensure!(names.insert(name), twice());
    }
    Ok(inputs)
}

/// Whether `output` is a file: then the only input must be a table with its extension. Otherwise it is a folder.
///
/// # Errors
/// The inputs cannot become this file.
pub fn is_file_output(inputs: &[Input], output: &Path) -> Result<bool> {
    let is_file = has_table_extension(output) && !output.is_dir();
    if let [only] = inputs {
        let same = only.kind == InputKind::Table && only.path.extension() == output.extension();
        let message = format!("{} cannot become {}", only.path.display(), output.display());
        ensure!(!is_file || same, usage(message, "-o needs a folder, or a file with the extension of the only table"));
    } else {
        let message = format!("{} inputs cannot become the file {}", inputs.len(), output.display());
        ensure!(!is_file, usage(message, "-o needs a folder"));
    }
    Ok(is_file)
}

fn is_table(path: &Path) -> bool {
    has_table_extension(path) && path.is_file()
}

/// Whether a path ends in one of [`table::EXTENSIONS`], in lower or upper case.
fn has_table_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    table::EXTENSIONS.contains(&extension.as_str())
}

fn of_table(path: PathBuf, root: Option<&Path>) -> Input {
    let below = root.and_then(|root| path.strip_prefix(root).ok()).map(Path::to_path_buf);
    let name = below.unwrap_or_else(|| path.file_name().map(PathBuf::from).unwrap_or_default());
    Input { path, name, kind: InputKind::Table, remote: None }
}
