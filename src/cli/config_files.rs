//! Checks whether the files and folders that a configuration names exist and are of the right kind (`vilg config
//! check`).

use crate::{
    config::Config,
    data::{
        self,
        remote::{self, is_remote},
    },
    train::tasks::{self, FileKind, InputFile},
};
use std::path::Path;

/// What was found.
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
        let mut found = Self::default();
        if config.data.sources.is_empty() {
            found.missing.push("`data.sources` is empty: training needs data".into());
        }
        let sources = config.data.sources.iter().map(|source| ("data.sources", &source.path));
        let validation = Some(("data.validation", &config.data.validation)).filter(|(_, path)| !path.is_empty());
        for (key, path) in sources.chain(validation) {
            if is_remote(path) {
                // Its server is asked when the run starts.
                found.wrong.extend(remote::check(path).err().map(|error| format!("`{key}`: {error:#}")));
                continue;
            }
            match data::is_there(path) {
                Ok(true) => {}
                Ok(false) => found.missing.push(format!("`{key}`: {path} does not exist")),
                Err(error) => found.wrong.push(format!("`{key}`: {error:#}")),
            }
        }
        tasks::spec(config.task).files(config).into_iter().for_each(|file| found.look(file));
        let (key, path) = ("train.init_from", &config.train.init_from);
        found.look(InputFile { key, path, kind: FileKind::Model, required: false });
        found
    }

    fn look(&mut self, InputFile { key, path, kind, required }: InputFile) {
        match path {
            "" if required => self.missing.push(format!("`{key}` is empty: training needs {}", name(kind))),
            "" | "demo" => {}
            path if !Path::new(path).exists() => self.missing.push(format!("`{key}`: {path} does not exist")),
            path if fits(kind, Path::new(path)) => {}
            path => self.wrong.push(format!("`{key}`: {path} is not {}", name(kind))),
        }
    }
}

/// Whether what is at `path` is of this kind.
fn fits(kind: FileKind, path: &Path) -> bool {
    match kind {
        FileKind::File => path.is_file(),
        FileKind::Folder => path.is_dir(),
        FileKind::Model => path.join("config.toml").is_file(),
    }
}

fn name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "a file",
        FileKind::Folder => "a folder",
        FileKind::Model => "a model folder with a config.toml",
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
