//! Filters pairs from the web (ERNIE-ViLG, §3.2.1: 800 million pairs become 70 million), as tar shards or as tables before
//! anything is downloaded.
//!
//! Reading order: [`Rule`] lists the rules, `text` and `characters` check captions, `scan` finds the features of all rows
//! (first pass) and `feature` stores them, `duplicates` compares them, `write` copies the rows that are kept (second pass),
//! [`Report`] counts. Ranks share the inputs; each of them compares all features.

mod characters;
mod duplicates;
mod feature;
mod image_hash;
pub mod input;
#[cfg(test)]
mod label_tests;
mod page;
mod plan;
mod report;
mod rule;
mod run;
mod scan;
#[cfg(test)]
mod tests;
mod text;
mod write;

pub use duplicates::DuplicateRules;
pub use page::{PAGE_START, page};
pub use plan::{Sampled, disk_bytes, sample};
pub use report::Report;
pub use rule::Rule;
pub use run::{Filter, Outcome};
pub use text::{BlockedWords, TextRules, Unit};

use super::record::TEXT_FILE;

/// The rules and where to find what they check.
#[derive(Debug, Clone)]
pub struct Settings {
    pub text: TextRules,
    /// Whether images are left unread.
    pub text_only: bool,
    /// Minimum length of the shorter side of an image in pixels.
    pub min_side: u32,
    /// Maximum ratio of the longer to the shorter side.
    pub max_aspect_ratio: Option<f64>,
    /// Column or JSON field that holds the similarity of image and caption.
    pub similarity_column: Option<String>,
    /// The similarity must be above this, where the rule is on: the number of the column, or else the matcher's cosine. It is
    /// compared in the end, so that another threshold needs no other features.
    pub min_similarity: Option<f64>,
    pub duplicates: DuplicateRules,
    /// Fields with the captions of a shard, as `data.caption_keys`.
    pub caption_keys: Vec<String>,
    /// Columns of tables.
    pub caption_column: String,
    pub width_column: String,
    pub height_column: String,
}

impl Settings {
    /// A text that differs if any row could get other features.
    fn digest(&self) -> String {
        let blocked = self.text.blocked.as_ref().map(|words| words.digest.to_hex().to_string());
        let text = (self.text.max_length, self.text.unit, self.text.noun, self.text.no_special_characters, blocked);
        let image = (self.text_only, self.min_side, self.max_aspect_ratio);
        let columns = (&self.similarity_column, &self.caption_column, &self.width_column, &self.height_column);
        let hashes = self.duplicates.image_distance.is_some();
        let all = format!("{text:?} {image:?} {columns:?} {:?} {hashes}", self.caption_keys);
        blake3::hash(all.as_bytes()).to_hex().to_string()
    }

    /// Whether the lines of text files are captions.
    fn reads_texts(&self) -> bool {
        self.caption_keys.is_empty() || self.caption_keys.iter().any(|key| key == TEXT_FILE)
    }

    fn reads_images(&self) -> bool {
        !self.text_only
            && (self.min_side > 0 || self.max_aspect_ratio.is_some() || self.duplicates.image_distance.is_some())
    }

    fn broken_by_size(&self, width: f64, height: f64) -> Option<Rule> {
        let (short, long) = (width.min(height), width.max(height));
        if short < f64::from(self.min_side) {
            return Some(Rule::SmallImage);
        }
        self.max_aspect_ratio.is_some_and(|max| long > max * short).then_some(Rule::AspectRatio)
    }

    /// A row without a similarity counts as one that does not match.
    fn broken_by_similarity(&self, similarity: Option<f64>) -> Option<Rule> {
        let min = self.min_similarity?;
        (!similarity.is_some_and(|number| number > min)).then_some(Rule::LowSimilarity)
    }
}
