//! Checks whether the files and folders that a configuration names exist and are of the right kind (`vilg config
//! check`).

use crate::{
    config::{Config, Task},
    data,
};
use std::path::Path;

/// What a path must point to.
#[derive(Clone, Copy)]
enum Kind {
    File,
    Folder,
    Model,
}

impl Kind {
    /// Whether `path` is of this kind. It must exist.
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

/// Problems with the paths of a configuration, one message each.
#[derive(Default)]
pub struct Found {
    /// Warnings: paths that do not exist. They may exist on the machine where the run will start.
    pub missing: Vec<String>,
    /// Errors: paths that exist but are of the wrong kind.
    pub wrong: Vec<String>,
}

impl Found {
    /// Checks every path that the configuration's task reads.
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
        // A folder where a file is wanted, and a folder without config.toml where a model folder is wanted.
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
