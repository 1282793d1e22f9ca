//! Reads a configuration: defaults < the files that a file extends < file < `--set`. Errors name the file, line and key.

use super::{
    Config, Problem,
    extends::{self, FileKeys},
    parse::{parse, wrong},
    renamed::rename_keys,
};
use crate::error::{Result, usage};
use std::path::Path;
use toml::{Table, Value};

/// Where the value of a key is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Default,
    /// A file that the file extends.
    Base,
    File,
    Set,
}

/// A configuration, with the tables that remember which keys the files and the `--set` options set.
pub struct Loaded {
    pub config: Config,
    /// The file, then those that it extends; none where there is no file.
    files: Vec<FileKeys>,
    sets: Table,
}

impl Loaded {
    /// Reads the file, if any, and those that it extends, then applies `sets` (`a.b=value`). Does not validate the values.
    ///
    /// # Errors
    /// A file cannot be read or extends itself; a key is unknown or has a value of the wrong type.
    pub fn read(path: Option<&Path>, sets: &[String]) -> Result<Self> {
        let files = path.map(extends::read).transpose()?.unwrap_or_default();
        let (mut all, mut set) = (Table::new(), Table::new());
        files.iter().rev().for_each(|file| merge(&mut all, &file.keys));
        let mut config = all.clone().try_into().map_err(|e| wrong("the configuration", &e))?;
        for text in sets {
            let mut one = assignment(text)?;
            rename_keys(&mut one, &format!("--set {text}"));
            let mut with = all.clone();
            merge(&mut with, &one);
            let parsed = with.clone().try_into();
            // `--set name=2024`: a key that takes text was given a number.
            let (one, with, parsed) = match (parsed, as_text(text)) {
                (Err(e), Some(quoted)) => {
                    let mut again = all.clone();
                    merge(&mut again, &quoted);
                    match again.clone().try_into() {
                        Ok(config) => (quoted, again, Ok(config)),
                        Err(_) => (one, with, Err(e)),
                    }
                }
                (parsed, _) => (one, with, parsed),
            };
            config = parsed.map_err(|e| wrong(&format!("--set {text}"), &e))?;
            merge(&mut set, &one);
            all = with;
        }
        let mut loaded = Self { config, files, sets: set };
        if loaded.origin("train.warmup_steps") == Origin::Default {
            let train = &mut loaded.config.train;
            train.warmup_steps = train.warmup_steps.min(train.steps / 10);
        }
        Ok(loaded)
    }

    /// All invalid values. The message of a value that a file sets names the file.
    ///
    /// # Errors
    /// A number does not fit into TOML.
    pub fn problems(&self) -> Result<Vec<Problem>> {
        let mut problems = self.config.problems()?;
        for problem in &mut problems {
            if let (Origin::File | Origin::Base, Some(file)) = (self.origin(&problem.key), self.file(&problem.key)) {
                problem.message = format!("{file}: {}", problem.message);
            }
        }
        Ok(problems)
    }

    /// Returns the configuration if all its values are valid.
    ///
    /// # Errors
    /// The first problem, as a usage error.
    pub fn validated(self) -> Result<Config> {
        match self.problems()?.into_iter().next() {
            Some(problem) => Err(usage(problem.message, problem.hint)),
            None => Ok(self.config),
        }
    }

    /// Where the value of `key` (`model.layers`) is set.
    pub fn origin(&self, key: &str) -> Origin {
        match () {
            () if lookup(&self.sets, key).is_some() => Origin::Set,
            () if self.files.first().is_some_and(|file| lookup(&file.keys, key).is_some()) => Origin::File,
            () if self.file(key).is_some() => Origin::Base,
            () => Origin::Default,
        }
    }

    /// The name of the file whose value of `key` counts, if any sets it.
    pub fn file(&self, key: &str) -> Option<&str> {
        self.files.iter().find(|file| lookup(&file.keys, key).is_some()).map(|file| file.name.as_str())
    }
}

impl Config {
    /// Reads and validates the configuration of a file (none: defaults) with `sets` (`a.b=value`) applied on top.
    ///
    /// # Errors
    /// The file cannot be read, a key is unknown, or a value is invalid.
    pub fn load(path: Option<&Path>, sets: &[String]) -> Result<Self> {
        Loaded::read(path, sets)?.validated()
    }

    /// Reads the text of a configuration file; `name` is the file's name in error messages.
    ///
    /// # Errors
    /// The text is not TOML; a key is unknown or has a value of the wrong type.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        parse(text, name)
    }

    /// Writes the configuration as TOML, with every key.
    ///
    /// # Errors
    /// A number is too large for TOML.
    pub fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }
}

/// Parses `a.b=value` as a table. A value that is not TOML is taken as a string (`--set name=first`).
fn assignment(text: &str) -> Result<Table> {
    let (key, value) = text.split_once('=').map(|(k, v)| (k.trim(), v.trim())).unwrap_or_default();
    let quoted = Value::String(value.to_owned());
    toml::from_str(&format!("{key} = {value}"))
        .or_else(|_| toml::from_str(&format!("{key} = {quoted}")))
        .ok()
        .filter(|_| !key.is_empty() && !key.contains(['\n', '#', '=']))
        .ok_or_else(|| {
            usage(format_args!("--set {text}: not of the form key=value"), "for example --set train.steps=100")
        })
}

/// Parses `a.b=value` as a table with the value as a string; `None` if it already is a string.
fn as_text(text: &str) -> Option<Table> {
    let (key, value) = text.split_once('=').map(|(key, value)| (key.trim(), value.trim()))?;
    let plain = value.chars().all(|c| c.is_alphanumeric() || "+-.:_".contains(c));
    let quoted = Value::String(value.to_owned());
    toml::from_str(&format!("{key} = {quoted}")).ok().filter(|_| plain)
}

fn merge(into: &mut Table, from: &Table) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            _ => drop(into.insert(key.clone(), value.clone())),
        }
    }
}

/// Looks up the value of a dotted key.
fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        Some((section, rest)) => lookup(table.get(section)?.as_table()?, rest),
        None => table.get(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Exit, exit_of, hint_of};

    fn sets(sets: &[&str]) -> Result<Loaded> {
        Loaded::read(None, &sets.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    /// The message and the hint of a usage error.
    fn complaint<T>(result: Result<T>) -> (String, String) {
        let error = result.err().expect("an error");
        assert_eq!(exit_of(&error), Exit::Usage);
        (error.to_string(), hint_of(&error).unwrap_or_default().to_owned())
    }

    #[test]
    fn a_file_overrides_defaults_and_set_overrides_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "[model]\nlayers = 3\nhidden = 64\n").unwrap();
        let set = ["model.hidden=32", "name=first try", "data.sources=[{path=\"x\"}]", "model.attention=\"dense\""];
        let loaded = Loaded::read(Some(file.path()), &set.map(String::from)).unwrap();
        let (model, default) = (&loaded.config.model, crate::config::Model::default());
        assert_eq!((model.layers, model.hidden, model.heads), (3, 32, default.heads));
        assert_eq!((loaded.config.name.as_str(), loaded.config.data.sources[0].weight), ("first try", 1.0));
        assert_eq!(model.attention, crate::config::AttentionKind::Dense);
        let origins = ["model.hidden", "model.layers", "model.heads"].map(|key| loaded.origin(key));
        assert_eq!(origins, [Origin::Set, Origin::File, Origin::Default]);
    }

    #[test]
    fn text_keys_accept_numbers_and_warmup_scales_with_steps() {
        let loaded = sets(&["name=2024", "train.steps=50", "text.vocab=1.5"]).unwrap();
        assert_eq!((loaded.config.name.as_str(), loaded.config.text.vocab.as_str()), ("2024", "1.5"));
        assert_eq!(loaded.config.train.warmup_steps, 5);
        loaded.validated().unwrap();
        assert_eq!(sets(&["train.steps=50000"]).unwrap().config.train.warmup_steps, 1000);
        assert_eq!(sets(&["train.warmup_steps=7"]).unwrap().config.train.warmup_steps, 7);
        complaint(sets(&["train.steps=many"]));
    }

    #[test]
    fn wrong_values_of_a_file_are_named_with_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "[train]\nbatch_size = 9223372036854775807\n").unwrap();
        let (message, hint) = complaint(Config::load(Some(file.path()), &[]));
        let place = format!("{}: `train.batch_size` = 9223372036854775807: must be", file.path().display());
        assert!(message.starts_with(&place) && !hint.is_empty(), "{message}");
        // Beyond what TOML can hold.
        std::fs::write(&file, "[train]\nsteps = 9223372036854775808\n").unwrap();
        let (message, hint) = complaint(Config::load(Some(file.path()), &[]));
        assert!(message.starts_with(&format!("{}:2: ", file.path().display())) && !hint.is_empty(), "{message}");
    }

    #[test]
    fn written_configurations_read_back_equal() {
        let config =
            sets(&["model.layers=3", "train.betas=[0.5, 0.6]", "sample.prompts=[\"一轮弯月\"]"]).unwrap().config;
        assert_eq!(Config::parse(&config.to_toml().unwrap(), "written").unwrap(), config);
    }

    #[test]
    fn errors_name_place_and_nearest_match() {
        let parse = |text| complaint(Config::parse(text, "a.toml"));
        let (message, hint) = parse("name = \"x\"\n\n[model]\nlayers = 2\nheds = 3\n");
        assert_eq!((message.as_str(), hint.as_str()), ("a.toml:5: unknown key `heds`", "did you mean `heads`?"));
        let (message, hint) = parse("[model]\nattention = \"spars\"\n");
        assert_eq!((message.as_str(), hint.as_str()), ("a.toml:2: unknown value `spars`", "did you mean `sparse`?"));
        let (message, hint) = parse("[text]\nnormalize = \"simplifed\"\n");
        assert_eq!(message, "a.toml:2: unknown value `simplifed`");
        assert_eq!(hint, "did you mean `simplified`?");
        assert_eq!(parse("[train]\nheads = 4\n").1, "`heads` is a key of [model]");
        let message = parse("[model]\nlayers = -1\n").0;
        assert_eq!(message, "a.toml:2: `layers`: invalid value: integer `-1`, expected a whole number >= 0");
        let message = parse("[train]\nlearning_rate = \"fast\"\n").0;
        assert_eq!(message, "a.toml:2: `learning_rate`: invalid type: string \"fast\", expected a number");
        assert!(parse("[model\n").0.starts_with("a.toml:1: "));
        let (message, hint) = complaint(sets(&["model.layers=2", "model.hiden=3"]));
        assert_eq!(message, "--set model.hiden=3: unknown key `hiden`");
        assert_eq!(hint, "did you mean `hidden`?");
        for bad in ["model.layers", "=3", "", "model.layers=x=y", "a\nb=1", "model=3"] {
            complaint(sets(&[bad]));
        }
        complaint(Loaded::read(Some(Path::new("no/such.toml")), &[]));
    }
}
