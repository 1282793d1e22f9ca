//! `vilg config check`: whether the files and folders that a configuration names exist and are of the right kind.

use crate::{
    config::{Config, Task},
    data,
};
use std::path::Path;

/// What a path must be.
#[derive(Clone, Copy)]
enum Kind {
    File,
    Folder,
    Model,
}

impl Kind {
    /// Whether what is at `path` is of this kind.
    fn fits(self, path: &Path) -> bool {
        match self {
            Self::File => path.is_file(),
            Self::Folder => path.is_dir(),
            Self::Model => path.join("config.toml").is_file(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::File => "a file",
            Self::Folder => "a folder",
            Self::Model => "a model folder with a config.toml",
        }
    }
}

/// What was found.
#[derive(Default)]
pub struct Found {
    /// Paths that do not exist: they may exist where the run will be.
    pub missing: Vec<String>,
    /// Paths that exist but cannot be right.
    pub wrong: Vec<String>,
}

impl Found {
    /// Looks at every path of the configuration that its task reads.
    pub fn of(config: &Config) -> Self {
        let (tokenizer, generator) = (&config.image_tokenizer, config.task == Task::Generator);
        let mut found = Self::default();
        if config.data.sources.is_empty() {
            found.missing.push("`data.sources` is empty: training needs data".into());
        }
        for source in &config.data.sources {
            match data::is_there(&source.path) {
                Ok(true) => {}
                Ok(false) => found.missing.push(format!("`data.sources`: {} does not exist", source.path)),
                Err(error) => found.wrong.push(format!("`data.sources`: {error:#}")),
            }
        }
        if generator {
            found.look("text.vocab", &config.text.vocab, Kind::File, true);
            found.look("image_tokenizer.path", &tokenizer.path, Kind::Model, true);
        } else {
            found.look("image_tokenizer.perceptual", &tokenizer.perceptual, Kind::Folder, false);
        }
        found.look("train.init_from", &config.train.init_from, Kind::Model, false);
        found
    }

    fn look(&mut self, key: &str, path: &str, kind: Kind, needed: bool) {
        match path {
            "" if needed => self.missing.push(format!("`{key}` is empty: training needs {}", kind.name())),
            "" | "demo" => {}
            path if !Path::new(path).exists() => self.missing.push(format!("`{key}`: {path} does not exist")),
            path if kind.fits(Path::new(path)) => {}
            path => self.wrong.push(format!("`{key}`: {path} is not {}", kind.name())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_paths_and_paths_of_another_kind_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().display().to_string();
        let mut config = Config::default();
        let found = Found::of(&config);
        assert_eq!((found.missing.len(), found.wrong.len()), (3, 0), "no data, no vocabulary, no tokenizer");
        // Folders where a file and a model folder are wanted.
        (config.text.vocab, config.image_tokenizer.path) = (at.clone(), at.clone());
        config.train.init_from = format!("{at}/nowhere");
        let found = Found::of(&config);
        assert_eq!(found.wrong.len(), 2, "{:?}", found.wrong);
        assert!(found.wrong[0].contains("is not a file") && found.wrong[1].contains("is not a model folder"));
        assert!(found.missing.iter().any(|what| what.contains("nowhere does not exist")), "{:?}", found.missing);
        (config.text.vocab, config.image_tokenizer.path) = ("demo".into(), "demo".into());
        (config.train.init_from, config.data.sources) =
            (String::new(), vec![crate::config::Source { path: at, weight: 1.0 }]);
        let found = Found::of(&config);
        assert!(found.missing.is_empty() && found.wrong.is_empty(), "{:?} {:?}", found.missing, found.wrong);
    }
}
