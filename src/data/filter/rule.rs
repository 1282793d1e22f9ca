//! The rules in the order in which they are applied. A sample counts under the first rule that it breaks.

use serde::Serialize;
use std::fmt;

/// A reason to leave a sample out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// The sample is damaged or has no caption.
    Bad,
    /// The caption is too long (paper: fewer than 15 words).
    TooLong,
    /// The caption has no noun (paper).
    NoNoun,
    /// The caption has special characters (paper).
    SpecialCharacters,
    /// The caption contains a blocked word.
    BlockedWord,
    /// One side of the image is too short.
    SmallImage,
    /// The image is too long and narrow.
    AspectRatio,
    /// Image and caption do not match (paper: similarity above 0.5).
    LowSimilarity,
    /// The caption occurs too often: boilerplate such as 点击查看大图.
    FrequentCaption,
    /// An earlier sample has the same caption.
    DuplicateCaption,
    /// An earlier sample has the same or nearly the same image.
    DuplicateImage,
}

impl Rule {
    /// All rules in their order.
    pub const ALL: [Self; 11] = [
        Self::Bad,
        Self::TooLong,
        Self::NoNoun,
        Self::SpecialCharacters,
        Self::BlockedWord,
        Self::SmallImage,
        Self::AspectRatio,
        Self::LowSimilarity,
        Self::FrequentCaption,
        Self::DuplicateCaption,
        Self::DuplicateImage,
    ];

    /// The rule with this number in [`Rule::ALL`].
    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}
