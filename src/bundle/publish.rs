//! Putting a finished folder or file in its place without losing what is there.
//!
//! The new one is written beside its place under a name that nobody can guess, and renamed when it is complete. An older
//! one is replaced only if it is a folder in which every entry is one that this program writes, or if `force` allows it.
//! Symbolic links and devices are never replaced.

use super::{
    ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ATTRIBUTION, CONFIG, IMAGE_TOKENIZER, MANIFEST, VOCAB, WEIGHTS,
};
use crate::{
    error::{Context, Result, bail, ensure, usage},
    eval::fid::INCEPTION_FILE,
    nn::weights,
    runtime::sync_folder,
    tokenizer::perceptual,
};
use std::{
    collections::hash_map::RandomState,
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    hash::BuildHasher,
    io,
    path::{Path, PathBuf},
    process,
};

/// The files of a model folder.
const MODEL_FILES: [&str; 5] = [CONFIG, WEIGHTS, VOCAB, ATTRIBUTION, MANIFEST];
/// The files of a low-rank adapter.
const ADAPTER_FILES: [&str; 3] = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_BASE];
/// The files of imported networks, each alone in its folder.
const NETWORK_FILES: [&str; 2] = [perceptual::FILE, INCEPTION_FILE];

/// Has `write` fill a new folder, which then takes the place of `folder`. Nothing is left behind if it fails.
///
/// # Errors
/// `folder` is not replaceable (see above), or something cannot be written. What was there is then unchanged.
pub(super) fn folder(folder: &Path, force: bool, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let target = Target::new(folder)?;
    target.check(|| check_folder(&target.path, force))?;
    let cannot = || format!("cannot write the model folder {}", folder.display());
    if target.holds_current_folder()? {
        // Renaming the current folder away would leave the caller's shell in a deleted one.
        let place = Staging::create(&target.path, OsStr::new("new"), create_folder).with_context(cannot)?;
        write(&place.path).and_then(|()| sync(&place.path)).with_context(cannot)?;
        return exchange_entries(&target.path, &place.path).with_context(cannot);
    }
    fs::create_dir_all(&target.parent).with_context(cannot)?;
    let place = Staging::create(&target.parent, &target.name, create_folder).with_context(cannot)?;
    write(&place.path).and_then(|()| sync(&place.path)).with_context(cannot)?;
    // Again: writing took its time.
    target.check(|| check_folder(&target.path, force))?;
    exchange(&target, &place.path).and_then(|()| sync_folder(&target.parent)).with_context(cannot)
}

/// Has `write` fill a new file, which then takes the place of the safetensors file `file`.
///
/// # Errors
/// `file` is something else and `force` is not given, or it cannot be written. What was there is then unchanged.
pub(super) fn file(file: &Path, force: bool, write: impl FnOnce(File) -> Result<()>) -> Result<()> {
    let target = Target::new(file)?;
    let check = || {
        target.check(|| {
            let (hint, is_file) = ("name a new file", fs::metadata(&target.path)?.is_file());
            ensure!(is_file, usage(format_args!("{} exists and is not a regular file", file.display()), hint));
            let hint = "name a new file, or replace it with --force";
            let what = format!("{} exists and is not a safetensors file", file.display());
            ensure!(force || weights::map(&target.path).is_ok(), usage(what, hint));
            Ok(())
        })
    };
    let cannot = || format!("cannot write {}", file.display());
    check()?;
    fs::create_dir_all(&target.parent).with_context(cannot)?;
    let place = Staging::create(&target.parent, &target.name, |path| File::create_new(path).map(drop))?;
    let out = File::options().write(true).open(&place.path).with_context(cannot)?;
    write(out).with_context(cannot)?;
    check()?;
    fs::rename(&place.path, &target.path).with_context(cannot)
}

/// A place to write to, without a trailing slash or `.` at its end.
struct Target {
    path: PathBuf,
    parent: PathBuf,
    name: OsString,
}

impl Target {
    fn new(path: &Path) -> Result<Self> {
        let hint = "name a new folder";
        ensure!(!path.as_os_str().is_empty(), usage("the output's name is empty", hint));
        // This drops trailing slashes, through which a link would look like its target.
        let mut path: PathBuf = path.components().collect();
        if path.file_name().is_none() {
            // `.`, `..` or `/`.
            path = fs::canonicalize(&path).with_context(|| format!("cannot find {}", path.display()))?;
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            bail!(usage(format_args!("{} cannot be replaced", path.display()), hint));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        Ok(Self { parent: parent.to_owned(), name: name.to_owned(), path })
    }

    /// What is there, links not followed.
    fn metadata(&self) -> Result<Option<Metadata>> {
        match fs::symlink_metadata(&self.path) {
            Ok(meta) => Ok(Some(meta)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot look at {}", self.path.display())),
        }
    }

    /// Runs `check` on what is there, if anything is and it is not a link.
    fn check(&self, check: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(meta) = self.metadata()? else { return Ok(()) };
        let what = format!("{} is a symbolic link, which is never replaced", self.path.display());
        ensure!(!meta.is_symlink(), usage(what, "name what it points to, or another folder"));
        check()
    }

    /// Whether it is the current folder or one above it.
    fn holds_current_folder(&self) -> Result<bool> {
        Ok(match (fs::canonicalize(&self.path), std::env::current_dir().and_then(fs::canonicalize)) {
            (Ok(path), Ok(current)) => current.starts_with(path),
            _ => false,
        })
    }
}

/// Checks that a folder is empty or of this program's files alone; with `force` only that it is a folder.
fn check_folder(folder: &Path, force: bool) -> Result<()> {
    let what = format!("{} exists and is not a folder", folder.display());
    ensure!(folder.is_dir(), usage(what, "name a new folder"));
    if force {
        return Ok(());
    }
    if let Some(foreign) = foreign_entry(folder)? {
        let what =
            format!("{} holds `{}`, which does not belong to a model folder", folder.display(), foreign.display());
        return Err(usage(what, "name a new folder; --force deletes the folder and all that is in it"));
    }
    Ok(())
}

/// The first entry of a folder that this program does not write, as a path below it. A folder of a few known names that
/// is no model (a `config.toml` alone, say) is foreign as well.
fn foreign_entry(folder: &Path) -> Result<Option<PathBuf>> {
    let known: Vec<_> = MODEL_FILES.iter().chain(&ADAPTER_FILES).chain(&NETWORK_FILES).collect();
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        if kind.is_dir() && name == IMAGE_TOKENIZER {
            if let Some(foreign) = foreign_entry(&entry.path())? {
                return Ok(Some(Path::new(&name).join(foreign)));
            }
        } else if !kind.is_file() || !known.iter().any(|known| name == **known) {
            return Ok(Some(name.into()));
        }
        names.push(name);
    }
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let adapter = ADAPTER_FILES.iter().all(|file| has(file));
    let whole = (has(CONFIG) && has(WEIGHTS)) || adapter || NETWORK_FILES.iter().any(|file| has(file));
    names.sort();
    Ok(names.into_iter().next().filter(|_| !whole).map(PathBuf::from))
}

/// A file or folder under a name that nobody can guess, deleted when this is dropped.
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn create(parent: &Path, name: &OsStr, create: impl Fn(&Path) -> io::Result<()>) -> io::Result<Self> {
        let path = unguessable(parent, name);
        // Fails if it exists: nothing is ever replaced here.
        create(&path).map(|()| Self { path })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Of what was renamed nothing is left; what cannot be deleted is only in the way.
        let _ = fs::remove_dir_all(&self.path).or_else(|_| fs::remove_file(&self.path));
    }
}

fn create_folder(path: &Path) -> io::Result<()> {
    fs::create_dir(path)
}

/// `.NAME.KEY.tmp` in `parent`, where the key comes from the operating system's random numbers.
fn unguessable(parent: &Path, name: &OsStr) -> PathBuf {
    let key = RandomState::new().hash_one((process::id(), name));
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{key:016x}.tmp"));
    parent.join(hidden)
}

/// Waits until a folder and all that is in it is on the disk, so that a crash of the machine leaves no name without its
/// content.
fn sync(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => sync(&entry.path())?,
            false => File::open(entry.path())?.sync_all()?,
        }
    }
    sync_folder(folder)
}

/// Renames `new` to the target; what was there is renamed away first, and deleted afterwards.
fn exchange(target: &Target, new: &Path) -> Result<()> {
    if target.metadata()?.is_none() {
        return Ok(fs::rename(new, &target.path)?);
    }
    let old = unguessable(&target.parent, &target.name);
    fs::rename(&target.path, &old)?;
    if let Err(error) = fs::rename(new, &target.path) {
        fs::rename(&old, &target.path).with_context(|| format!("the older folder is now {}", old.display()))?;
        return Err(error.into());
    }
    fs::remove_dir_all(&old).with_context(|| format!("cannot delete the older folder, which is now {}", old.display()))
}

/// Moves the entries of `new`, a folder in `folder`, up into it, in place of those that were there.
fn exchange_entries(folder: &Path, new: &Path) -> Result<()> {
    let entries = |folder: &Path| -> io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect()
    };
    let old = Staging::create(folder, OsStr::new("old"), create_folder)?;
    let mut moved: Vec<(PathBuf, PathBuf)> = Vec::new();
    let mut all = || -> Result<()> {
        let existing = entries(folder)?.into_iter().filter(|path| path != new && path != &old.path);
        let mut moves: Vec<_> = existing.map(|path| (path, old.path.as_path())).collect();
        let mut fresh = entries(new)?;
        // Nobody takes a folder without a configuration for a model: it comes last.
        fresh.sort_by_key(|path| path.file_name() == Some(OsStr::new(CONFIG)));
        moves.extend(fresh.into_iter().map(|path| (path, folder)));
        for (from, into) in moves {
            let to = into.join(from.file_name().context("an entry without a name")?);
            fs::rename(&from, &to)?;
            moved.push((from, to));
        }
        Ok(())
    };
    let done = all();
    if done.is_err() && moved.iter().rev().any(|(from, to)| fs::rename(to, from).is_err()) {
        // It would be deleted with what is in it.
        let kept = std::mem::ManuallyDrop::new(old);
        return done.with_context(|| format!("older files are now in {}", kept.path.display()));
    }
    done
}
