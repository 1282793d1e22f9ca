//! Checks that output files can be written before the work starts, not hours later.

use crate::{
    bounded_read, bundle, config,
    error::{Hint, Result, ensure, failed, usage},
};
use std::{fs, io::Read, path::Path};

/// Checks that the file `path` of the option `option` can be written, and creates its parent folders. The content of an
/// existing file is kept.
///
/// # Errors
/// `path` is a folder, or the file or its folder cannot be written.
pub fn check(path: &Path, option: &str) -> Result<()> {
    let name = path.display();
    ensure!(!path.is_dir(), usage(format_args!("{option} {name} is a folder"), "name a file in it"));
    let hint = format!("choose another file with {option}");
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.map_or(Ok(()), fs::create_dir_all).hint(format_args!("cannot write {name}"), &hint)?;
    // Opening a pipe or device here would be a second open; it is opened once, when there is something to write.
    let exists = path.exists();
    if exists && !path.is_file() {
        return Ok(());
    }
    fs::File::options().append(true).create(true).open(path).hint(format_args!("cannot write {name}"), &hint)?;
    if !exists {
        fs::remove_file(path).hint(format_args!("cannot write {name}"), hint)?;
    }
    Ok(())
}

/// Refuses to replace a file that is not an earlier report of the same command, which begins with `start`. `hint` says what
/// to do instead.
///
/// # Errors
/// The file exists and begins with something else.
pub fn check_report(path: &Path, start: &str, hint: &str) -> Result<()> {
    let is_report = || {
        let mut begin = Vec::new();
        let read = bounded_read::open(path).map(|file| file.take(start.len() as u64).read_to_end(&mut begin).is_ok());
        read.is_ok_and(|read| read) && begin == start.as_bytes()
    };
    let message = format!("{} exists and is not a report of this command", path.display());
    ensure!(path.symlink_metadata().is_err() || is_report(), failed(message, hint));
    Ok(())
}

/// Adds the attribution of `sources` to `ATTRIBUTION.md` in the output folder: the licences of images apply to what is
/// made of them.
///
/// # Errors
/// The file cannot be written, or a present one is no text that can be added to.
pub fn add_attribution(sources: &[String], output: &Path) -> Result<()> {
    let sources: Vec<_> = sources.iter().map(|path| config::Source { path: path.clone(), weight: 1.0 }).collect();
    let text = bundle::attribution_of(&sources);
    let path = output.join("ATTRIBUTION.md");
    let (cannot, hint) = (format!("cannot add to {}", path.display()), "choose another folder with -o");
    let present = match path.symlink_metadata() {
        Ok(_) => bounded_read::read_text(&path, bounded_read::TEXT).hint(&cannot, hint)?,
        Err(_) => String::new(),
    };
    if text.is_empty() || present.contains(&text) {
        return Ok(());
    }
    let all = if present.is_empty() { text } else { format!("{present}\n{text}") };
    fs::write(&path, all).hint(cannot, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributions_are_added_once() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two, out) = (folder.path().join("1"), folder.path().join("2"), folder.path().join("out"));
        for (source, text) in [(&one, "by A"), (&two, "by B")] {
            fs::create_dir(source).unwrap();
            fs::write(source.join("ATTRIBUTION.md"), text).unwrap();
        }
        fs::create_dir(&out).unwrap();
        let name = |path: &Path| path.to_str().unwrap().to_owned();
        add_attribution(&[name(&one)], &out).unwrap();
        add_attribution(&[name(&two)], &out).unwrap();
        add_attribution(&[name(&one)], &out).unwrap();
        assert_eq!(fs::read_to_string(out.join("ATTRIBUTION.md")).unwrap(), "by A\nby B");
    }

    #[test]
    fn an_attribution_that_cannot_be_read_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (source, out) = (folder.path().join("1"), folder.path().join("out"));
        for folder in [&source, &out] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(source.join("ATTRIBUTION.md"), "by A").unwrap();
        let present = out.join("ATTRIBUTION.md");
        let refusal = || {
            let error = add_attribution(&[source.to_str().unwrap().to_owned()], &out).unwrap_err();
            assert!(crate::error::hint_of(&error).is_some(), "{error:#}");
            format!("{error:#}")
        };
        fs::write(&present, b"by J\xf6rg").unwrap();
        assert!(refusal().contains("not UTF-8"));
        assert_eq!(fs::read(&present).unwrap(), b"by J\xf6rg");
        // Reading it would never end.
        fs::remove_file(&present).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &present).unwrap();
        assert!(refusal().contains("not a regular file"));
        assert!(present.is_symlink());
    }

    #[test]
    fn only_reports_of_the_same_command_may_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.html");
        check_report(&file, "<!--start-->", "h").unwrap();
        // Longer than a text that a person writes.
        fs::write(&file, format!("<!--start-->{}", "x".repeat(5 << 20))).unwrap();
        check_report(&file, "<!--start-->", "h").unwrap();
        for other in ["<!--other-->", "<!--start", ""] {
            fs::write(&file, other).unwrap();
            assert!(
                check_report(&file, "<!--start-->", "h").unwrap_err().to_string().contains("not a report"),
                "{other}"
            );
        }
        assert!(check_report(folder.path(), "", "h").is_err());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_refused_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.png");
        check(&file, "-o").unwrap();
        assert!(!file.exists());
        fs::write(&file, "old").unwrap();
        check(&file, "-o").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
        assert!(check(folder.path(), "-o").unwrap_err().to_string().contains("is a folder"));
        assert!(check(&file.join("b.png"), "-o").unwrap_err().to_string().contains("cannot write"));
        check(&folder.path().join("new/b.png"), "-o").unwrap();
        assert!(folder.path().join("new").read_dir().unwrap().next().is_none());
    }
}
