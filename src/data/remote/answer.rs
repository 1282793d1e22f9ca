//! What a server answers, and how a transfer can fail.

use crate::error::{Error, Hint, anyhow, failed};
use std::{fmt, time::Duration};

/// A file in a listing.
pub struct Entry {
    /// Path in the bucket or data set.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    pub version: Option<String>,
}

/// The answer to a request for a file.
pub enum Answer {
    /// The file still has the ETag of the request.
    NotModified,
    /// The requested rest of the file belongs to another version of it, or cannot be read by range.
    Changed,
    /// The file, or the requested rest of it.
    Body(Body),
}

/// The content of a file from byte `start` on.
pub struct Body {
    pub start: u64,
    /// Size of the whole file in bytes.
    pub size: Option<u64>,
    pub etag: Option<String>,
    pub read: Read,
}

/// Replaces the content of a buffer by the next bytes; false at the end of the file.
pub type Read = Box<dyn FnMut(&mut Vec<u8>) -> Result<bool, Failure>>;

/// Which bytes of a file are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted<'a> {
    /// First byte; above 0 only with `etag`.
    pub start: u64,
    /// ETag of the version to which the bytes before `start` belong.
    pub etag: Option<&'a str>,
    /// ETag of the version that is there already.
    pub known: Option<&'a str>,
}

/// Limits of time and of repetitions.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum time to connect.
    pub connect: Duration,
    /// Maximum time in which a transfer makes no progress.
    pub stall: Duration,
    /// Maximum number of attempts in sequence that make no progress.
    pub attempts: u32,
    /// Wait after the first failed attempt; doubled after each further one.
    pub first_wait: Duration,
    /// Maximum wait between two attempts.
    pub max_wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            attempts: 8,
            first_wait: Duration::from_millis(500),
            max_wait: Duration::from_secs(30),
        }
    }
}

/// Why an attempt failed.
#[derive(Debug)]
pub struct Failure {
    pub message: String,
    pub hint: Option<String>,
    /// Whether another attempt may succeed.
    pub retry: bool,
    /// Minimum wait that the server asks for.
    pub after: Option<Duration>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// A failure that another attempt may not have.
    pub fn temporary(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: None, retry: true, after: None }
    }

    /// A failure that every attempt will have.
    pub fn permanent(message: impl fmt::Display, hint: impl fmt::Display) -> Self {
        Self { message: message.to_string(), hint: Some(hint.to_string()), retry: false, after: None }
    }

    /// The error of a transfer from `url` that is given up after `attempts` attempts.
    pub fn into_error(self, url: &str, attempts: u32) -> Error {
        let times = if attempts > 1 { format!(" (gave up after {attempts} attempts)") } else { String::new() };
        let message = format!("{url}: {}{times}", self.message);
        match self.hint {
            Some(hint) => failed(message, hint),
            None => failed(message, "check the network and the server; run the command again to resume"),
        }
    }
}

/// A failed attempt because of a local file.
pub enum Stopped {
    Remote(Failure),
    Local(Error),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Remote(failure)
    }
}

impl Stopped {
    /// The error of writing a local file.
    pub fn local(error: std::io::Error, path: &std::path::Path) -> Self {
        let hint = "free some space on the disk, or choose another folder; run the command again to resume";
        let result: crate::error::Result<()> =
            Err(anyhow!(error)).hint(format!("cannot write {}", path.display()), hint);
        Self::Local(result.err().unwrap_or_else(|| anyhow!("cannot write {}", path.display())))
    }
}
