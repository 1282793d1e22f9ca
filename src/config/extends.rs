//! Configurations of a few keys over another one: `extends = "base.toml"`, or the name of a shipped configuration.

use super::{
    Config,
    parse::{nearest, parse},
    renamed::rename_keys,
    shipped::{SHIPPED, shipped},
};
use crate::{
    bounded_read,
    error::{Error, Result, ensure, usage},
};
use serde::Deserialize;
use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
};
use toml::{Spanned, Table};

/// Most files that extend each other.
const MOST_FILES: usize = 8;

/// The keys that one file sets.
pub(super) struct FileKeys {
    /// The file's name in messages.
    pub name: String,
    pub keys: Table,
}

/// A file of a configuration.
enum Place {
    File(PathBuf),
    /// In the program: name and text.
    Shipped(&'static str, &'static str),
}

/// The one key that is read before all others.
#[derive(Deserialize)]
struct Head {
    extends: Option<Spanned<String>>,
}

/// The keys of the file at `path`, then those of the file that it extends, and so on.
///
/// # Errors
/// A file cannot be read, extends itself, or has an unknown key or a value of the wrong type.
pub(super) fn read(path: &Path) -> Result<Vec<FileKeys>> {
    let (mut files, mut places) = (Vec::<FileKeys>::new(), Vec::new());
    let mut next = Some(Place::File(path.to_owned()));
    while let Some(place) = next {
        let name = place.name();
        let text = place.read(files.last().map(|file| file.name.as_str()))?;
        let fingerprint = place.fingerprint();
        let chain =
            files.iter().map(|file| file.name.as_str()).chain([name.as_str()]).collect::<Vec<_>>().join(" extends ");
        let hint = "a base must not extend the file that extends it";
        ensure!(!places.contains(&fingerprint), usage(format_args!("{chain}: an endless circle"), hint));
        let hint = format!("at most {MOST_FILES} files may extend each other");
        ensure!(places.len() < MOST_FILES, usage(format_args!("{chain}: too many files"), hint));
        places.push(fingerprint);
        let (extends, text) = split(&text, &name)?;
        // Each file on its own, so that errors name its lines.
        Config::parse(&text, &name)?;
        // A whole number that a key takes may still be too large for TOML.
        let mut keys: Table = parse(&text, &name)?;
        rename_keys(&mut keys, &name);
        files.push(FileKeys { name, keys });
        next = extends.map(|extends| place.base(&extends)).transpose()?;
    }
    Ok(files)
}

/// The value of `extends`, and the text with spaces in its place.
fn split<'t>(text: &'t str, name: &str) -> Result<(Option<String>, Cow<'t, str>)> {
    let head: Head = parse(text, name)?;
    let Some(extends) = head.extends else { return Ok((None, Cow::Borrowed(text))) };
    let end = extends.span().end;
    let start = text[..extends.span().start].rfind('\n').map_or(0, |at| at + 1);
    let blank: String = text[start..end].chars().map(|c| if c == '\n' { c } else { ' ' }).collect();
    Ok((Some(extends.into_inner()), Cow::Owned(format!("{}{blank}{}", &text[..start], &text[end..]))))
}

impl Place {
    /// The name in messages.
    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Shipped(name, _) => format!("the shipped configuration `{name}`"),
        }
    }

    /// The text; `by` is the name of the file that extends it.
    fn read(&self, by: Option<&str>) -> Result<Cow<'static, str>> {
        let path = match self {
            Self::File(path) => path,
            Self::Shipped(_, text) => return Ok(Cow::Borrowed(text)),
        };
        let (by, hint) = match by {
            None => (String::new(), "`vilg config init emoji -o emoji.toml` writes a configuration to start from"),
            Some(by) => (format!(", which {by} extends"), "a path in `extends` is relative to the file that names it"),
        };
        let what = |e: Error| format!("cannot read the configuration {}{by}: {}", path.display(), e.root_cause());
        let text = bounded_read::read_text(path, bounded_read::TEXT).map_err(|e| usage(what(e), hint))?;
        Ok(Cow::Owned(text))
    }

    /// What two names of the same file have in common.
    fn fingerprint(&self) -> PathBuf {
        match self {
            Self::File(path) => fs::canonicalize(path).unwrap_or_else(|_| path.clone()),
            Self::Shipped(name, _) => PathBuf::from(name),
        }
    }

    /// The file that this one extends: a path relative to it, or the name of a shipped configuration.
    fn base(&self, extends: &str) -> Result<Self> {
        if extends.contains('/') || extends.ends_with(".toml") {
            let folder = match self {
                Self::File(path) => path.parent().unwrap_or(Path::new("")),
                Self::Shipped(..) => Path::new(""),
            };
            return Ok(Self::File(folder.join(extends)));
        }
        let found = shipped(extends).map(|(name, text)| Self::Shipped(name, text));
        let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        let what = format!("{}: there is no shipped configuration `{extends}` to extend", self.name());
        let hint = format!("{}; a file is named by its path, which ends in .toml", nearest(extends, &names));
        found.ok_or_else(|| usage(what, hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Loaded, Origin},
        error::{Exit, exit_of, hint_of},
    };

    /// Loads `top.toml` from a folder with these files.
    fn load(files: &[(&str, &str)], sets: &[&str]) -> (tempfile::TempDir, Result<Loaded>) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let loaded = Loaded::read(Some(&folder.path().join("top.toml")), &sets);
        (folder, loaded)
    }

    /// The message with paths below the folder, and the hint.
    fn complaint(files: &[(&str, &str)]) -> (String, String) {
        let (folder, loaded) = load(files, &[]);
        let error = loaded.and_then(Loaded::validated).unwrap_err();
        assert_eq!(exit_of(&error), Exit::Usage);
        let message = error.to_string().replace(&format!("{}/", folder.path().display()), "");
        (message, hint_of(&error).unwrap_or_default().to_owned())
    }

    const BASE: &str = "name = \"base\"\n[model]\nlayers = 3\nhidden = 64\nheads = 2\n[data]\nsources = \
        [{ path = \"a\" }, { path = \"b\" }]\n[train]\nrecompute = 2\n";

    #[test]
    fn nearer_files_override_those_that_they_extend() {
        let middle = "extends = \"../base.toml\" # a comment\n[model]\nhidden = 32\nheads = 4\n";
        let top = "\n  extends = 'sub/middle.toml'\n[model]\nheads = 8\n[data]\nsources = [{ path = \"c\" }]\n";
        let files = [("base.toml", BASE), ("sub/middle.toml", middle), ("top.toml", top)];
        let (folder, loaded) = load(&files, &["model.conv_size=3"]);
        let loaded = loaded.unwrap();
        let model = &loaded.config.model;
        assert_eq!((model.layers, model.hidden, model.heads, model.conv_size), (3, 32, 8, 3));
        assert_eq!((loaded.config.name.as_str(), loaded.config.train.activation_checkpointing), ("base", 2));
        // Lists replace lists.
        assert_eq!(loaded.config.data.sources.iter().map(|s| s.path.as_str()).collect::<Vec<_>>(), ["c"]);
        let origins = ["model.conv_size", "model.heads", "model.hidden", "model.layers", "model.mlp_ratio"];
        let expected = [Origin::Set, Origin::File, Origin::Base, Origin::Base, Origin::Default];
        assert_eq!(origins.map(|key| loaded.origin(key)), expected);
        let file = |key| loaded.file(key).unwrap().replace(&format!("{}/", folder.path().display()), "");
        assert_eq!([file("model.hidden"), file("model.layers")], ["sub/middle.toml", "sub/../base.toml"]);
        // What is stored with a run is whole.
        let stored = loaded.config.to_toml().unwrap();
        assert!(!stored.contains("extends") && Config::parse(&stored, "stored").unwrap() == loaded.config);
    }

    #[test]
    fn shipped_configurations_have_names() {
        let loaded = load(&[("top.toml", "extends = \"300m\"\nname = \"mine\"\n")], &[]).1.unwrap();
        let mut expected = Config::parse(shipped("300m").unwrap().1, "300m").unwrap();
        expected.name = "mine".into();
        assert_eq!(loaded.config, expected);
        assert_eq!(loaded.file("model.layers"), Some("the shipped configuration `300m`"));
        let (message, hint) = complaint(&[("top.toml", "extends = \"emojy\"")]);
        assert_eq!(message, "top.toml: there is no shipped configuration `emojy` to extend");
        assert!(hint.starts_with("did you mean `emoji`?"), "{hint}");
    }

    #[test]
    fn circles_and_errors_name_the_files() {
        let top = ("top.toml", "extends = \"base.toml\"\n[model]\nlayers = 2\n");
        let (message, hint) = complaint(&[top, ("base.toml", "extends = \"./top.toml\"\n")]);
        assert_eq!(message, "top.toml extends base.toml extends ./top.toml: an endless circle");
        assert!(!hint.is_empty());
        let (message, hint) = complaint(&[top]);
        assert!(message.starts_with("cannot read the configuration base.toml, which top.toml extends: "), "{message}");
        assert!(hint.contains("relative"), "{hint}");
        let with = |base| complaint(&[top, ("base.toml", base)]).0;
        assert_eq!(with("name = \"x\"\n[model]\nheds = 3\n"), "base.toml:3: unknown key `heds`");
        assert!(with("[train]\nsteps = \"many\"\n").starts_with("base.toml:2: `steps`: invalid type: string"));
        assert!(
            with("[train]\nbatch_size = 0\n[model]\nheads = 7\n").starts_with("base.toml: `model.heads` = 7: must")
        );
        assert!(with("extends = 3").starts_with("base.toml:1: `extends`: invalid type: integer"));
        let own = complaint(&[("top.toml", "extends = \"emoji\"\n\n[model]\nheds = 3\n")]).0;
        assert_eq!(own, "top.toml:4: unknown key `heds`");
        let deep: Vec<(String, String)> = (0..=MOST_FILES)
            .map(|i| (format!("{i}.toml"), format!("extends = \"{}.toml\"\n", i + 1)))
            .chain([("top.toml".into(), "extends = \"0.toml\"\n".into())])
            .collect();
        let deep: Vec<(&str, &str)> = deep.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        assert!(complaint(&deep).0.ends_with(": too many files"));
        // A stored configuration is whole.
        assert!(Config::parse("extends = \"emoji\"\n", "x").is_err());
    }
}
