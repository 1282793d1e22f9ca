//! Rules about the text of a caption: the paper's (ERNIE-ViLG, §3.2.1) and blocked words.

use super::{characters::is_special, rule::Rule};
use crate::{
    bounded_read,
    error::{Hint, Result, ensure, failed},
};
use aho_corasick::AhoCorasick;
use clap::ValueEnum;
use jieba_rs::Jieba;
use serde::Serialize;
use std::{path::Path, sync::LazyLock};

/// Loading the dictionary takes about half a second and 100 MB, once.
static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);

/// Loads jieba's dictionary, which the first caption otherwise waits for.
pub fn load_dictionary() {
    LazyLock::force(&JIEBA);
}

/// What the length of a caption is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Words found by jieba; punctuation does not count
    Words,
    /// Characters other than punctuation and spaces
    Characters,
}

/// The rules about text; each can be off.
#[derive(Debug, Clone)]
pub struct TextRules {
    /// Maximum length of a caption.
    pub max_length: Option<usize>,
    pub unit: Unit,
    /// Requires a noun: a word that jieba tags as `n…`.
    pub noun: bool,
    /// Refuses special characters.
    pub no_special_characters: bool,
    pub blocked: Option<BlockedWords>,
}

/// Words that no caption may contain, compared without case; full-width letters and digits equal half-width ones.
#[derive(Debug, Clone)]
pub struct BlockedWords {
    search: AhoCorasick,
    /// Digest of the words.
    pub digest: blake3::Hash,
}

impl BlockedWords {
    /// Reads a file with one word on each line. Empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// The file cannot be read, is not UTF-8 or contains no word.
    pub fn read(path: &Path) -> Result<Self> {
        let text = bounded_read::read_text(path, bounded_read::VOCABULARY)
            .hint(format_args!("cannot read {}", path.display()), "name a UTF-8 file with one word on each line")?;
        let lines = text.trim_start_matches('\u{feff}').lines().map(|line| plain(line.trim()));
        let words: Vec<String> = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
        let empty = || failed(format_args!("{} contains no word", path.display()), "write one word on each line");
        ensure!(!words.is_empty(), empty());
        // Features of versions that compared full-width letters as they are must not be used.
        let digest = blake3::hash(format!("half-width\n{}", words.join("\n")).as_bytes());
        let search = AhoCorasick::new(&words).hint("too many blocked words", "write fewer of them")?;
        Ok(Self { search, digest })
    }
}

/// Text in lower case and half width.
fn plain(text: &str) -> String {
    text.chars().map(half_width).flat_map(char::to_lowercase).collect()
}

/// The half-width form of a full-width letter, digit or mark.
pub fn half_width(c: char) -> char {
    match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0).unwrap_or(c),
        c => c,
    }
}

impl TextRules {
    /// The first rule that a caption breaks, and its length in [`Unit`]s.
    pub fn check(&self, caption: &str) -> (Option<Rule>, usize) {
        let mut length = 0;
        let mut has_noun = false;
        if self.noun || self.unit == Unit::Words {
            for word in JIEBA.tag(caption, true) {
                length += usize::from(self.unit == Unit::Words && word.word.chars().any(char::is_alphanumeric));
                has_noun |= word.tag.starts_with('n');
            }
        }
        if self.unit == Unit::Characters {
            length = caption.chars().filter(|c| c.is_alphanumeric()).count();
        }
        (self.broken(caption, length, has_noun), length)
    }

    fn broken(&self, caption: &str, length: usize, has_noun: bool) -> Option<Rule> {
        if self.max_length.is_some_and(|max| length > max) {
            return Some(Rule::TooLong);
        }
        if self.noun && !has_noun {
            return Some(Rule::NoNoun);
        }
        if self.no_special_characters && caption.chars().any(is_special) {
            return Some(Rule::SpecialCharacters);
        }
        let blocked = |words: &BlockedWords| words.search.is_match(&plain(caption));
        self.blocked.as_ref().is_some_and(blocked).then_some(Rule::BlockedWord)
    }
}
