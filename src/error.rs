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
