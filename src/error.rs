//! Errors: what went wrong, where, and what to do about it.
//!
//! Any error may carry a [`Hint`] (printed as a `hint:` line) and an [`Exit`] code. Both are stored in
//! [`anyhow::Error`] as context, so library code only needs ordinary `Result`s.

use std::fmt;

pub use anyhow::{Context, Error, Result, anyhow, bail, ensure};

/// Exit codes of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The command failed.
    Failed = 1,
    /// Wrong usage or a bad configuration.
    Usage = 2,
    /// A signal stopped the run after it wrote a checkpoint; the same command resumes it.
    Requeue = 75,
    /// Interrupted from the keyboard.
    Interrupted = 130,
}

impl Exit {
    /// The exit code of another process that ended with `code`.
    pub fn of_code(code: usize) -> Self {
        let known = [Self::Usage, Self::Requeue, Self::Interrupted];
        known.into_iter().find(|exit| *exit as usize == code).unwrap_or(Self::Failed)
    }
}

/// Context of an error: a message with a hint, an exit code or both.
#[derive(Debug)]
struct Advice {
    message: String,
    hint: Option<String>,
    exit: Option<Exit>,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Advice {}

/// Adds a message and a hint to a `Result` or an error.
pub trait Hint<T> {
    /// Adds `message` (what failed and where) and a `hint:` line (what to do).
    fn hint(self, message: impl fmt::Display, hint: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Error>> Hint<T> for std::result::Result<T, E> {
    fn hint(self, message: impl fmt::Display, hint: impl fmt::Display) -> Result<T> {
        self.map_err(|e| {
            let advice = Advice { message: message.to_string(), hint: Some(hint.to_string()), exit: None };
            e.into().context(advice)
        })
    }
}

impl<T> Hint<T> for Option<T> {
    fn hint(self, message: impl fmt::Display, hint: impl fmt::Display) -> Result<T> {
        self.ok_or_else(|| failed(message, hint))
    }
}

/// Adds a message, and a hint to an error that has none yet.
///
/// # Errors
/// The error of `result`.
pub fn hint_if_none<T>(result: Result<T>, message: impl fmt::Display, hint: impl fmt::Display) -> Result<T> {
    match result {
        Err(error) if hint_of(&error).is_some() => Err(error.context(message.to_string())),
        other => other.hint(message, hint),
    }
}

/// A failure (exit code 1) with a hint.
pub fn failed(message: impl fmt::Display, hint: impl fmt::Display) -> Error {
    Error::new(Advice { message: message.to_string(), hint: Some(hint.to_string()), exit: None })
}

/// A usage or configuration error (exit code 2) with a hint.
pub fn usage(message: impl fmt::Display, hint: impl fmt::Display) -> Error {
    Error::new(Advice { message: message.to_string(), hint: Some(hint.to_string()), exit: Some(Exit::Usage) })
}

/// The error of a run that was stopped on purpose with `exit` ([`Exit::Requeue`] or [`Exit::Interrupted`]).
pub fn stopped(message: impl fmt::Display, hint: impl fmt::Display, exit: Exit) -> Error {
    Error::new(Advice { message: message.to_string(), hint: Some(hint.to_string()), exit: Some(exit) })
}

fn advice(error: &Error) -> Vec<&Advice> {
    // anyhow finds context values through `downcast_ref` of the whole error, and plain sources through the chain.
    let mut found: Vec<&Advice> = error.downcast_ref::<Advice>().into_iter().collect();
    found.extend(error.chain().filter_map(|e| e.downcast_ref::<Advice>()));
    found
}

/// The outermost hint of an error, if any.
pub fn hint_of(error: &Error) -> Option<&str> {
    advice(error).iter().find_map(|a| a.hint.as_deref())
}

/// The exit code of an error.
pub fn exit_of(error: &Error) -> Exit {
    advice(error).iter().find_map(|a| a.exit).unwrap_or(Exit::Failed)
}

/// The error of a parser (serde) without names of Rust types.
pub fn plain(error: impl fmt::Display) -> Error {
    anyhow!("{}", plain_words(&error.to_string()))
}

/// Replaces the names of Rust types in a message of serde by plain words.
pub fn plain_words(message: &str) -> String {
    const WORDS: [(&str, &str); 14] = [
        ("usize", "a whole number >= 0"),
        ("u64", "a whole number >= 0"),
        ("u32", "a whole number >= 0"),
        ("u8", "a whole number from 0 to 255"),
        ("i64", "a whole number"),
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
    // JSON and YAML end with the place.
    let (expected, place) = expected.split_at(expected.find(" at line ").unwrap_or(expected.len()));
    let section = expected.starts_with("struct ").then_some("a section of keys");
    let known = WORDS.iter().find(|(rust, _)| *rust == expected).map(|(_, words)| *words).or(section);
    format!("{what}, expected {}{place}", known.unwrap_or(expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_parsers_name_no_types_of_rust() {
        #[derive(Debug, serde::Deserialize)]
        struct Inner {
            #[expect(dead_code, reason = "only parsed")]
            number: u32,
        }
        let message = |text: &str| plain(serde_json::from_str::<Vec<Inner>>(text).unwrap_err()).to_string();
        let number = "invalid type: string \"x\", expected a whole number >= 0 at line 1 column 15";
        assert_eq!(message("[{\"number\": \"x\"}]"), number);
        assert_eq!(message("[3]"), "invalid type: integer `3`, expected a section of keys at line 1 column 2");
        assert_eq!(message("3"), "invalid type: integer `3`, expected a list in [ ] at line 1 column 1");
        assert_eq!(message("["), "EOF while parsing a list at line 1 column 1");
    }
}
