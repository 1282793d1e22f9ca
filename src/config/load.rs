//! Reads a configuration: defaults < file < `--set`. Errors name the file, line and key.

use super::{Config, Problem, flat::values, renamed::rename_keys};
use crate::{
    bounded_read,
    error::{Error, Result, usage},
};
use std::path::Path;
use toml::{Table, Value};

/// Where the value of a key is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Default,
    File,
    Set,
}

/// A configuration, with the tables that remember which keys the file and the `--set` options set.
pub struct Loaded {
    pub config: Config,
    /// The file's name in error messages.
    name: String,
    file: Table,
    sets: Table,
}

impl Loaded {
    /// Reads the file, if any, then applies `sets` (`a.b=value`). Does not validate the values.
    ///
    /// # Errors
    /// The file cannot be read; a key is unknown or has a value of the wrong type.
    pub fn read(path: Option<&Path>, sets: &[String]) -> Result<Self> {
        let (text, name) = match path {
            Some(path) => (read(path)?, path.display().to_string()),
            None => (String::new(), String::new()),
        };
        let mut config = Config::parse(&text, &name)?;
        // A whole number that a key takes may still be too large for TOML.
        let mut file: Table = parse(&text, &name)?;
        rename_keys(&mut file, &name);
        let (mut all, mut set) = (file.clone(), Table::new());
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
        let mut loaded = Self { config, name, file, sets: set };
        if loaded.origin("train.warmup_steps") == Origin::Default {
            let train = &mut loaded.config.train;
            train.warmup_steps = train.warmup_steps.min(train.steps / 10);
        }
        Ok(loaded)
    }

    /// All invalid values. The message of a value that the file sets names the file.
    ///
    /// # Errors
    /// A number does not fit into TOML.
    pub fn problems(&self) -> Result<Vec<Problem>> {
        let mut problems = self.config.problems()?;
        for problem in problems.iter_mut().filter(|problem| self.origin(&problem.key) == Origin::File) {
            problem.message = format!("{}: {}", self.name, problem.message);
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
            () if lookup(&self.file, key).is_some() => Origin::File,
            () => Origin::Default,
        }
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

/// Reads TOML; errors name the place.
fn parse<T: serde::de::DeserializeOwned>(text: &str, name: &str) -> Result<T> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        let key = line.and_then(|line| text.lines().nth(line - 1)?.split_once('=')).map_or("", |(key, _)| key.trim());
        let place = line.map_or(name.to_owned(), |line| format!("{name}:{line}"));
        // A complaint about a value does not name its key.
        let of_value = !key.is_empty() && e.message().starts_with("invalid");
        wrong(&if of_value { format!("{place}: `{key}`") } else { place }, &e)
    })
}

fn read(path: &Path) -> Result<String> {
    let hint = "`vilg config init emoji -o emoji.toml` writes a configuration to start from";
    let what = |e: Error| format!("cannot read the configuration {}: {}", path.display(), e.root_cause());
    bounded_read::read_text(path, bounded_read::TEXT).map_err(|e| usage(what(e), hint))
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

/// Converts serde's error to a usage error with the place and the nearest known key or value.
fn wrong(place: &str, error: &toml::de::Error) -> Error {
    let message = plain(&error.message().trim().replace('\n', ", "));
    let unknown = message.strip_prefix("unknown field ").map(|rest| ("key", rest));
    let unknown = unknown.or_else(|| message.strip_prefix("unknown variant ").map(|rest| ("value", rest)));
    let Some((what, rest)) = unknown else {
        return usage(format_args!("{place}: {message}"), "`vilg config init` prints a commented example");
    };
    let mut names = rest.split('`').skip(1).step_by(2);
    let given = names.next().unwrap_or_default();
    let known: Vec<&str> = names.collect();
    usage(format_args!("{place}: unknown {what} `{given}`"), nearest(given, &known))
}

/// Replaces the names of Rust types in serde's messages by plain words.
fn plain(message: &str) -> String {
    const WORDS: [(&str, &str); 13] = [
        ("usize", "a whole number >= 0"),
        ("u64", "a whole number >= 0"),
        ("u32", "a whole number >= 0"),
        ("u8", "a whole number from 0 to 255"),
        ("f64", "a number"),
        ("a boolean", "true or false"),
        ("a string", "text in quotes"),
        ("a sequence", "a list in [ ]"),
        ("an array of length 2", "a list of 2 values"),
        ("a tuple of size 2", "a list of 2 values"),
        ("struct Source", "a table like { path = \"data/train\" }"),
        ("a map", "a table"),
        ("string or table", "text in quotes"),
    ];
    let Some((what, expected)) = message.rsplit_once(", expected ") else { return message.to_owned() };
    let section = expected.starts_with("struct ").then_some("a section of keys");
    let known = WORDS.iter().find(|(rust, _)| *rust == expected).map(|(_, words)| *words).or(section);
    format!("{what}, expected {}", known.unwrap_or(expected))
}

fn nearest(given: &str, known: &[&str]) -> String {
    let closest = known.iter().map(|name| (strsim::jaro_winkler(given, name), name)).max_by(|a, b| a.0.total_cmp(&b.0));
    let home = values(&Config::default()).unwrap_or_default().into_iter().map(|(key, _)| key);
    let home = home.into_iter().find_map(|key| Some(key.split_once('.').filter(|(_, k)| *k == given)?.0.to_owned()));
    match (closest, home) {
        (Some((score, name)), _) if score > 0.8 => format!("did you mean `{name}`?"),
        (_, Some(section)) => format!("`{given}` is a key of [{section}]"),
        _ => format!("possible values: {}", known.join(", ")),
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
