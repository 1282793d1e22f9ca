//! Expands the sources given by a user (brace lists, globs, folders) to a list of shards.

use super::{
    bad::{Bad, BadCounts, Cause},
    codes::CODES_FILE,
    members::UNSUPPORTED_EXTENSIONS,
    record::IMAGE_EXTENSIONS,
};
use crate::error::{Context, Hint, Result, ensure, failed, usage};
use std::{
    fs::{self, FileType},
    path::{Path, PathBuf},
};

/// Maximum number of alternatives of one brace list.
const MAX_ALTERNATIVES: usize = 1_000_000;

/// The files of a source, in a fixed order.
#[derive(Debug, Default)]
pub struct Found {
    /// Tar shards, each with its path below the source's folder.
    pub tars: Vec<(PathBuf, PathBuf)>,
    /// Image files, each with its path below the source's folder.
    pub images: Vec<(PathBuf, PathBuf)>,
    /// Images and shards that cannot be used.
    pub bad: BadCounts,
    /// Files that belong to no sample.
    pub ignored: BadCounts,
}

impl Found {
    fn len(&self) -> usize {
        self.tars.len() + self.images.len()
    }
}

/// Finds the files of a source: tar shards (`dir/{00000..00012}.tar`, `dir/*.tar`), or folders with their subfolders.
/// Names that start with a dot are skipped.
///
/// # Errors
/// Nothing was found, or a folder cannot be listed.
pub fn find(source: &str) -> Result<Found> {
    let mut found = Found::default();
    // An existing file whose name contains braces is meant literally.
    let patterns = if Path::new(source).exists() { vec![source.to_owned()] } else { braces(source)? };
    for path in patterns {
        let before = found.len();
        for path in glob(&path)? {
            add(&path, &mut found)?;
        }
        ensure!(found.len() > before, failed_to_find(&path, &found.bad));
    }
    Ok(found)
}

/// The paths that a source stands for: braces and patterns are expanded, folders are not opened.
///
/// # Errors
/// A brace list stands for too many names, or a parent folder cannot be listed.
pub fn expand(source: &str) -> Result<Vec<PathBuf>> {
    if Path::new(source).exists() {
        return Ok(vec![PathBuf::from(source)]);
    }
    let mut paths = Vec::new();
    for pattern in braces(source)? {
        paths.extend(glob(&pattern)?);
    }
    Ok(paths)
}

/// Whether a source exists at all, so that what [`find`] misses is damage and not a missing source.
///
/// # Errors
/// A brace list stands for too many names, or a parent folder cannot be listed.
pub fn is_there(source: &str) -> Result<bool> {
    Ok(!expand(source)?.is_empty())
}

fn failed_to_find(path: &str, bad: &BadCounts) -> crate::error::Error {
    let hint = "name tar shards (`dir/{00000..00012}.tar`, `dir/*.tar`), a folder of them, or a folder of images";
    let reason = if bad.total() == 0 { String::new() } else { format!(": {bad}") };
    usage(format_args!("no shards or images at `{path}`{reason}"), hint)
}

fn add(path: &Path, found: &mut Found) -> Result<()> {
    if path.is_dir() {
        return add_folder(path, path, found);
    }
    let name = path.file_name().map(PathBuf::from).unwrap_or_default();
    let extension = extension(path);
    if UNSUPPORTED_EXTENSIONS.contains(&extension.as_str()) {
        found.bad.add(Bad::new(Cause::UnsupportedImage, path.display()));
    } else if IMAGE_EXTENSIONS.contains(&extension.as_str()) {
        found.images.push((path.to_path_buf(), name));
    } else {
        found.tars.push((path.to_path_buf(), name));
    }
    Ok(())
}

fn add_folder(root: &Path, folder: &Path, found: &mut Found) -> Result<()> {
    for (path, kind) in entries(folder)? {
        // Links to folders are not followed: they can form cycles.
        if kind.is_dir() {
            add_folder(root, &path, found)?;
        } else {
            let below = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
            match unusable(&path, kind) {
                Some((true, cause)) => found.bad.add(Bad::new(cause, path.display())),
                Some((false, cause)) => found.ignored.add(Bad::new(cause, path.display())),
                None if extension(&path) == "tar" => found.tars.push((path, below)),
                None if is_image(&path) => found.images.push((path, below)),
                // Captions are found from their image; other text and JSON files are about the folder.
                None => {}
            }
        }
    }
    Ok(())
}

/// Why a file in a folder cannot be used, and whether it means a lost sample.
fn unusable(path: &Path, kind: FileType) -> Option<(bool, Cause)> {
    let extension = extension(path);
    let extension = extension.as_str();
    let unsupported = UNSUPPORTED_EXTENSIONS.contains(&extension);
    let sample = unsupported || extension == "tar" || IMAGE_EXTENSIONS.contains(&extension);
    let about_folder = matches!(extension, "" | "txt" | "json" | "md") || is_ours(path);
    if kind.is_symlink() && !path.exists() {
        Some((sample, Cause::DanglingLink))
    } else if !(kind.is_file() || kind.is_symlink() && path.is_file()) {
        Some((sample, Cause::NotAFile))
    } else if unsupported {
        Some((true, Cause::UnsupportedImage))
    } else {
        (!sample && !about_folder).then_some((false, Cause::UnknownKind))
    }
}

/// How the names of a shard's embeddings end: their array and its record.
pub const EMBEDDINGS: [&str; 2] = [".embeddings.npy", ".embeddings.json"];

/// Whether this program writes files of this name beside shards.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name == CODES_FILE || EMBEDDINGS.iter().any(|ending| name.ends_with(ending))
}

fn extension(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

fn is_image(path: &Path) -> bool {
    IMAGE_EXTENSIONS.contains(&extension(path).as_str())
}

/// The files of a folder and its subfolders, in order.
///
/// # Errors
/// A folder cannot be listed.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for (path, kind) in entries(folder)? {
        if kind.is_dir() {
            files.extend(self::files(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

/// The entries of a folder, sorted by name, without names that start with a dot.
fn entries(folder: &Path) -> Result<Vec<(PathBuf, FileType)>> {
    let cannot = || format!("cannot list {}", folder.display());
    let mut paths = Vec::new();
    for entry in
        fs::read_dir(folder).hint(cannot(), "check that it is a folder and that you have permission to read it")?
    {
        let entry = entry.with_context(cannot)?;
        let (path, kind) = (entry.path(), entry.file_type().with_context(cannot)?);
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden {
            paths.push((path, kind));
        }
    }
    paths.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(paths)
}

/// Expands `{a,b}` and `{00000..00012}`.
///
/// # Errors
/// A brace list stands for too many names.
pub fn braces(pattern: &str) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let mut open = vec![pattern.to_owned()];
    while let Some(pattern) = open.pop() {
        let Some((head, alternatives, tail)) = first_brace(&pattern) else {
            done.push(pattern);
            continue;
        };
        let expanded = alternatives_of(alternatives);
        let count = expanded.as_ref().map_or(usize::MAX, Vec::len);
        ensure!(
            count.saturating_add(open.len() + done.len()) <= MAX_ALTERNATIVES,
            failed(format_args!("`{{{alternatives}}}` stands for too many names"), "write a glob (`*`) or a folder")
        );
        // The pattern pushed last is expanded first; pushing in reverse keeps the written order.
        open.extend(expanded.unwrap_or_default().iter().rev().map(|one| format!("{head}{one}{tail}")));
    }
    Ok(done)
}

fn first_brace(pattern: &str) -> Option<(&str, &str, &str)> {
    let (head, rest) = pattern.split_once('{')?;
    let (inner, tail) = rest.split_once('}')?;
    Some((head, inner, tail))
}

/// The alternatives of one brace list; `None` if there are too many.
fn alternatives_of(inner: &str) -> Option<Vec<String>> {
    let range = inner.split_once("..").and_then(|(a, b)| Some((a, a.parse::<u64>().ok()?, b.parse::<u64>().ok()?)));
    let Some((from, first, last)) = range else {
        return Some(inner.split(',').map(str::to_owned).collect());
    };
    let width = from.len();
    let few = last.saturating_sub(first) < MAX_ALTERNATIVES as u64;
    few.then(|| (first..=last).map(|number| format!("{number:0width$}")).collect())
}

/// Paths that match a pattern with `*` and `?`. A pattern without them is returned as it is.
fn glob(pattern: &str) -> Result<Vec<PathBuf>> {
    if Path::new(pattern).exists() {
        return Ok(vec![PathBuf::from(pattern)]);
    }
    let mut paths = vec![PathBuf::new()];
    for component in Path::new(pattern).components() {
        let part = component.as_os_str().to_string_lossy();
        if !part.contains(['*', '?']) {
            paths.iter_mut().for_each(|path| path.push(component));
            continue;
        }
        let mut next = Vec::new();
        for folder in &paths {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            if folder.is_dir() {
                next.extend(entries(folder)?.into_iter().map(|(path, _)| path).filter(|path| {
                    path.file_name().is_some_and(|name| matches(part.as_bytes(), name.as_encoded_bytes()))
                }));
            }
        }
        paths = next;
    }
    Ok(paths.into_iter().filter(|path| path.exists()).collect())
}

/// Whether `name` matches `pattern`; `*` matches any run of characters, `?` any single one.
pub fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || Some(c) == name.get(n) => (p, n) = (p + 1, n + 1),
            // On a mismatch, the last `*` takes one more character.
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).is_some_and(|rest| rest.iter().all(|c| *c == b'*'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_expand_in_order() {
        assert_eq!(braces("a/{08..10}.tar").unwrap(), ["a/08.tar", "a/09.tar", "a/10.tar"]);
        assert_eq!(braces("{a,b}/{1,2}").unwrap(), ["a/1", "a/2", "b/1", "b/2"]);
        assert_eq!(braces("plain").unwrap(), ["plain"]);
        assert!(braces("{0..18446744073709551615}").is_err());
        assert!(braces("{0..9999}{0..9999}").is_err());
    }

    #[test]
    fn a_source_exists_if_any_of_its_shards_exists() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("01.tar"), "").unwrap();
        let there = |name: &str| is_there(folder.path().join(name).to_str().unwrap()).unwrap();
        assert!(there("") && there("01.tar") && there("*.tar") && there("{00..02}.tar"));
        assert!(!there("02.tar") && !there("*.png") && !there("{02..03}.tar") && !there("below/*.tar"));
    }

    #[test]
    fn stars_and_question_marks_match() {
        let yes = [("*.tar", "a.tar"), ("a*b*c", "aXbbYc"), ("?", "x"), ("*", ""), ("a*", "a")];
        let no = [("*.tar", "a.tar.tmp"), ("a?", "a"), ("", "x"), ("a*b", "acd")];
        assert!(yes.iter().all(|(p, n)| matches(p.as_bytes(), n.as_bytes())));
        assert!(no.iter().all(|(p, n)| !matches(p.as_bytes(), n.as_bytes())));
    }
}
