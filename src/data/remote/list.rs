//! Expands a remote source to its shards.

use super::{
    client,
    location::{Location, name_below, name_of_command, shown},
    shard::RemoteShard,
};
use crate::{
    data::paths::{braces, matches},
    error::{Result, ensure, usage},
};
use std::{collections::HashSet, path::PathBuf};

/// The shards of a source, in a fixed order: brace lists and, for `s3://`, `oss://` and `hf://`, patterns with `*` and `?`
/// and whole folders (their `.tar` files, with subfolders). Sizes and versions are known for patterns and folders.
///
/// # Errors
/// The source is not a remote URL, its server cannot list files or refuses to, nothing was found, or two shards have the
/// same name.
pub fn list(source: &str) -> Result<Vec<RemoteShard>> {
    let base = base(source);
    let mut shards = Vec::new();
    for url in braces(source)? {
        let location = Location::parse(&url)?;
        let before = shards.len();
        match &location {
            Location::Pipe { command } => {
                let name = PathBuf::from(name_of_command(command));
                shards.push(RemoteShard::new(url.clone(), location, name));
            }
            Location::Http { .. } => {
                let path = url.split(['?', '#']).next().unwrap_or_default();
                ensure!(
                    !path.contains('*') && !path.ends_with('/'),
                    usage(
                        format_args!("`{}` cannot be listed: https has no listing", shown(&url)),
                        "name the shards: https://HOST/PATH/{00000..00099}.tar"
                    )
                );
                let name = name_below(base, &url)?;
                shards.push(RemoteShard::new(url.clone(), location, name));
            }
            Location::S3 { .. } | Location::HuggingFace { .. } => add(base, &url, location, &mut shards)?,
        }
        let none = || usage(format_args!("no shards at `{}`", shown(&url)), "name tar shards, or a folder of them");
        ensure!(shards.len() > before, none());
    }
    let mut names = HashSet::new();
    if let Some(twice) = shards.iter().find(|shard| !names.insert(&shard.name)) {
        let message = format!("two shards of `{}` have the name {}", shown(source), twice.name.display());
        return Err(usage(message, "give them as two sources"));
    }
    Ok(shards)
}

/// Checks that a source can be parsed, without asking its server.
///
/// # Errors
/// It is not a remote URL, or a brace list stands for too many names.
pub fn check(source: &str) -> Result<()> {
    braces(source)?.iter().try_for_each(|url| Location::parse(url).map(drop))
}

/// The part of a source before the names of its shards: up to the last `/` before a brace or pattern. A folder is its own
/// base.
fn base(source: &str) -> &str {
    let is_listed = ["s3://", "oss://", "hf://"].iter().any(|scheme| source.starts_with(scheme));
    let patterns = ['{', '*', '?', if is_listed { '*' } else { '#' }];
    let fixed = source.split(patterns).next().unwrap_or_default();
    if fixed.len() == source.len() && is_listed && is_folder(path_of(source)) {
        return source.trim_end_matches('/');
    }
    fixed.rfind('/').and_then(|slash| source.get(..=slash)).unwrap_or_default()
}

/// Whether the last name of a path has no extension, so that it is taken for a folder.
fn is_folder(path: &str) -> bool {
    !path.rsplit('/').next().unwrap_or_default().contains('.')
}

/// What follows the bucket or data set in a URL, which may have brace lists.
fn path_of(url: &str) -> &str {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    // `datasets/OWNER/NAME/PATH`
    let before = if scheme == "hf" { 3 } else { 1 };
    rest.splitn(before + 1, '/').nth(before).unwrap_or_default()
}

/// Adds the shard of a bucket or data set, or those that its pattern or folder stands for.
fn add(base: &str, url: &str, location: Location, shards: &mut Vec<RemoteShard>) -> Result<()> {
    let path = location.path().unwrap_or_default().to_owned();
    let is_pattern = path.contains(['*', '?']);
    if !is_pattern && !is_folder(&path) {
        let name = name_below(base, url)?;
        shards.push(RemoteShard::new(url.to_owned(), location, name));
        return Ok(());
    }
    let (folder, levels) = if is_pattern {
        let fixed = path.split(['*', '?']).next().unwrap_or_default();
        let folder = fixed.rfind('/').and_then(|slash| path.get(..slash)).unwrap_or_default();
        (folder, Some(components(&path).count() - components(folder).count()))
    } else {
        (path.trim_end_matches('/'), None)
    };
    let mut entries = client::list(&location.with_path(folder), levels)?;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    // What precedes the path: `s3://BUCKET/`.
    let root = url.strip_suffix(path.as_str()).unwrap_or(url);
    let root = if root.ends_with('/') { root.to_owned() } else { format!("{root}/") };
    for entry in entries.into_iter().filter(|entry| wanted(&entry.path, is_pattern.then_some(path.as_str()), folder)) {
        let url = format!("{root}{}", entry.path);
        let base = if base.ends_with('/') { base.to_owned() } else { format!("{base}/") };
        let name = name_below(&base, &url)?;
        let location = location.with_path(&entry.path);
        shards.push(RemoteShard::listed(url, location, name, entry));
    }
    Ok(())
}

/// Whether a listed file matches the pattern, or is a shard in a folder. Names that begin with a dot are skipped, as on
/// disk.
fn wanted(path: &str, pattern: Option<&str>, folder: &str) -> bool {
    let below = path.strip_prefix(folder).unwrap_or(path);
    if components(below).any(|name| name.starts_with('.') && !name.starts_with("..")) {
        return false;
    }
    match pattern {
        Some(pattern) => {
            components(pattern).count() == components(path).count()
                && components(pattern).zip(components(path)).all(|(p, n)| matches(p.as_bytes(), n.as_bytes()))
        }
        None => path.to_ascii_lowercase().ends_with(".tar"),
    }
}

fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(source: &str) -> Vec<String> {
        list(source).unwrap().iter().map(|shard| shard.name.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn brace_lists_expand_without_a_listing() {
        assert_eq!(names("s3://b/p/{00..02}.tar"), ["00.tar", "01.tar", "02.tar"]);
        assert_eq!(names("https://h/{a,b}/{0..1}.tar?x=1"), ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]);
        assert_eq!(names("hf://datasets/o/n/x/00.tar"), ["00.tar"]);
        assert_eq!(names("pipe:cat x/{0..1}.tar"), ["0.tar", "1.tar"]);
        let shards = list("https://u:secret@h/a.tar?sig=secret").unwrap();
        assert_eq!(shards[0].url(), "https://h/a.tar");
        assert!(!format!("{shards:?}").contains("secret"));
    }

    #[test]
    fn https_cannot_be_listed() {
        for source in ["https://h/p/*.tar", "https://h/p/"] {
            assert!(format!("{:#}", list(source).unwrap_err()).contains("cannot be listed"), "{source}");
        }
        assert!(list("https://h/p/../{..,x}.tar").is_err());
        assert!(list("pipe:cat {a,b}/0.tar").unwrap_err().to_string().contains("the name 0.tar"));
    }

    #[test]
    fn the_base_ends_before_the_first_pattern() {
        for (source, expected) in [
            ("s3://b/p/{0..9}.tar", "s3://b/p/"),
            ("s3://b/p/q*/x.tar", "s3://b/p/"),
            ("s3://b/p/", "s3://b/p"),
            ("s3://b/p", "s3://b/p"),
            ("s3://b", "s3://b"),
            ("s3://b.c/", "s3://b.c"),
            ("hf://datasets/o/n@1.0", "hf://datasets/o/n@1.0"),
            ("s3://b/p/x.tar", "s3://b/p/"),
            ("https://h/p/x.tar?a=/b/c", "https://h/p/"),
        ] {
            assert_eq!(base(source), expected);
        }
    }

    #[test]
    fn listed_files_are_filtered() {
        assert!(wanted("p/a/0.tar", None, "p") && !wanted("p/a/0.txt", None, "p") && !wanted("p/.x/0.tar", None, "p"));
        assert!(wanted("p/a/0.tar", Some("p/*/0.tar"), "p") && !wanted("p/a/b/0.tar", Some("p/*/0.tar"), "p"));
        assert!(!wanted("p/a.tar", Some("p/*/a.tar"), "p"));
    }
}
