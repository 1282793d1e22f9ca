//! Bad samples: cause, count and example locations.

use crate::error::{Result, failed};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Why a sample (or a part of a shard) cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The file cannot be opened or read.
    Unreadable,
    /// The remote shard cannot be downloaded. The sample may be good, so this ends a run.
    NotFetched,
    /// The file is not a tar archive but, for example, compressed, a table or text.
    NotATar,
    /// The tar archive is truncated or damaged.
    BrokenTar,
    /// The name is absolute, contains `..` or control characters, or is not UTF-8.
    UnsafeName,
    /// A link, device, pipe or sparse file.
    NotAFile,
    /// The key occurs twice in one shard, or a member twice in one sample.
    Duplicate,
    /// A member, sample or header exceeds a size limit.
    TooLarge,
    /// A symbolic link whose target does not exist.
    DanglingLink,
    /// A file in a folder that is neither an image, a caption nor a shard.
    UnknownKind,
    /// The sample has no image, or its image file is missing.
    NoImage,
    /// The image format is not supported (AVIF, SVG, …).
    UnsupportedImage,
    /// The image cannot be decoded.
    BadImage,
    /// The image header declares more pixels than the limit.
    HugeImage,
    /// The sample has no codes.
    NoCodes,
    /// The codes are not a `u16` array, or do not match the folder's `codes.json`.
    BadCodes,
    /// The sample has no caption, or an empty caption.
    NoCaption,
    /// The text is not UTF-8.
    NotUtf8,
    /// The JSON cannot be parsed.
    BadJson,
    /// A row of a table has another number of fields than its header, or a cell does not hold text.
    BadRow,
    /// The text that should be an image in base64 is not base64.
    BadBase64,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A bad sample.
#[derive(Debug, Clone)]
pub struct Bad {
    pub cause: Cause,
    /// Location: shard and key, followed by the decoder's error message if there is one.
    pub place: String,
}

impl Bad {
    /// A bad sample at `place`. Control characters of file names are escaped.
    pub fn new(cause: Cause, place: impl fmt::Display) -> Self {
        Self { cause, place: printable(&place.to_string()) }
    }
}

/// Escapes control characters, so that text from a file name can be shown on a terminal.
pub fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    if text.chars().any(char::is_control) { text.chars().map(escape).collect() } else { text.to_owned() }
}

/// Counts of bad samples by cause, with the first few locations of each cause.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BadCounts(BTreeMap<Cause, Found>);

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Found {
    count: u64,
    examples: Vec<String>,
}

/// Number of example locations kept for each cause.
const EXAMPLES: usize = 3;

/// Number of samples that must be read before a bad ratio above 0 can end a run.
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

    /// Adds the counts of `other`; its examples follow the present ones.
    pub fn merge(&mut self, other: Self) {
        for (cause, from) in other.0 {
            let found = self.0.entry(cause).or_default();
            found.count += from.count;
            let workspace = EXAMPLES.saturating_sub(found.examples.len());
            found.examples.extend(from.examples.into_iter().take(workspace));
        }
    }

    /// Whether any sample is bad for this cause.
    pub fn has(&self, cause: Cause) -> bool {
        self.0.contains_key(&cause)
    }

    /// Whether there is no bad sample.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of bad samples of all causes.
    pub fn total(&self) -> u64 {
        self.0.values().map(|found| found.count).sum()
    }

    /// Checks that all remote shards could be downloaded.
    ///
    /// # Errors
    /// One could not.
    pub fn check_fetched(&self) -> Result<()> {
        let Some(found) = self.0.get(&Cause::NotFetched) else { return Ok(()) };
        let hint = "check the network and the server; run the command again to resume";
        Err(failed(found.examples.first().map_or("a shard was not downloaded", String::as_str), hint))
    }

    /// Checks that all remote shards could be downloaded, and that at most `max_ratio` of the `read` samples were bad. A
    /// ratio above 0 is checked only after 100 samples; 0 allows no bad sample at all.
    ///
    /// # Errors
    /// A shard is missing, or too many samples were bad.
    pub fn check(&self, read: u64, max_ratio: f64) -> Result<()> {
        self.check_fetched()?;
        let total = self.total();
        if (read < MIN_READ && max_ratio > 0.0) || total as f64 <= max_ratio * read as f64 {
            return Ok(());
        }
        Err(failed(
            format_args!("{total} of the first {read} samples are bad: {self}"),
            format_args!("repair or remove these samples, or raise data.max_bad_ratio (now {max_ratio})"),
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
