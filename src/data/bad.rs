//! Bad samples: what was wrong, how often, and where to look.

use crate::error::{Result, failed};
use serde::Serialize;
use std::{collections::BTreeMap, fmt};

/// Why a sample (or a part of a shard) cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The file cannot be opened or read.
    Unreadable,
    /// The file is not a tar archive: compressed, a table, text.
    NotATar,
    /// The tar archive is cut or damaged here.
    BrokenTar,
    /// An absolute name, `..`, control characters, or not UTF-8.
    UnsafeName,
    /// A link, device, pipe or sparse file.
    NotAFile,
    /// The same key again in one shard, or the same member twice in one sample.
    Duplicate,
    /// A member, sample or header beyond our limits.
    TooLarge,
    /// A symbolic link whose target does not exist.
    DanglingLink,
    /// A file of a folder that is neither an image, a caption nor a shard.
    UnknownKind,
    /// There is no image.
    NoImage,
    /// An image in a format that is not decoded (AVIF, SVG, …).
    UnsupportedImage,
    /// The image cannot be decoded.
    BadImage,
    /// The image's header announces more pixels than we decode.
    HugeImage,
    /// There are no codes.
    NoCodes,
    /// The codes are no `u16` array, or do not fit the folder's `codes.json`.
    BadCodes,
    /// There is no caption, or an empty one.
    NoCaption,
    /// The text is not UTF-8.
    NotUtf8,
    /// The JSON does not parse.
    BadJson,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// One bad sample.
#[derive(Debug, Clone)]
pub struct Bad {
    pub cause: Cause,
    /// Where: shard and key, and the decoder's words where there are any.
    pub place: String,
}

impl Bad {
    /// A bad sample at `place`; control characters of file names are escaped.
    pub fn new(cause: Cause, place: impl fmt::Display) -> Self {
        Self { cause, place: printable(&place.to_string()) }
    }
}

/// Text from a file name as it may be shown on a terminal: control characters are escaped.
pub fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    if text.chars().any(char::is_control) { text.chars().map(escape).collect() } else { text.to_owned() }
}

/// Bad samples counted by cause, with the first few places of each.
#[derive(Debug, Clone, Default, Serialize)]
pub struct BadCounts(BTreeMap<Cause, Found>);

#[derive(Debug, Clone, Default, Serialize)]
struct Found {
    count: u64,
    examples: Vec<String>,
}

/// Places that are kept for each cause.
const EXAMPLES: usize = 3;

/// Samples that must have been read before a bad ratio above 0 can end a run.
const MIN_READ: u64 = 100;

impl BadCounts {
    /// Counts one bad sample.
    pub fn add(&mut self, bad: Bad) {
        let found = self.0.entry(bad.cause).or_default();
        found.count += 1;
        if found.examples.len() < EXAMPLES {
            found.examples.push(bad.place);
        }
    }

    /// Adds the counts of `other`; its places follow ours.
    pub fn merge(&mut self, other: Self) {
        for (cause, from) in other.0 {
            let found = self.0.entry(cause).or_default();
            found.count += from.count;
            let workspace = EXAMPLES.saturating_sub(found.examples.len());
            found.examples.extend(from.examples.into_iter().take(workspace));
        }
    }

    /// Bad samples of all causes.
    pub fn total(&self) -> u64 {
        self.0.values().map(|found| found.count).sum()
    }

    /// Fails when more than `max_ratio` of the `read` samples were bad. A ratio above 0 is not judged before 100
    /// samples were read; 0 allows no bad sample at all.
    pub fn check(&self, read: u64, max_ratio: f64) -> Result<()> {
        let total = self.total();
        if (read < MIN_READ && max_ratio > 0.0) || total as f64 <= max_ratio * read as f64 {
            return Ok(());
        }
        Err(failed(
            format_args!("{total} of the first {read} samples are bad: {self}"),
            format_args!("repair or leave out these samples, or raise data.max_bad_ratio (now {max_ratio})"),
        ))
    }
}

impl fmt::Display for BadCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (cause, found)) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{} {cause} ({})", found.count, found.examples.join(", "))?;
        }
        Ok(())
    }
}
