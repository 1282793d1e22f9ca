//! What a configuration trains.

use serde::{Deserialize, Serialize};

/// What `vilg train` trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// An image tokenizer (VQGAN or dVAE): pixels to codes and back.
    ImageTokenizer,
    /// The bidirectional transformer over text tokens and image codes, trained on text→image and image→text.
    Generator,
    /// The same with a reconstructor that learns from its hidden states: images are also trained on as pixels.
    EndToEnd,
    /// The image–text matcher: two encoders, whose embeddings of a matching image and text are close.
    Matcher,
}

impl Task {
    /// Whether its model generates images and captions.
    pub fn is_generator(self) -> bool {
        matches!(self, Self::Generator | Self::EndToEnd)
    }

    /// What it trains, in messages.
    pub fn model(self) -> &'static str {
        match self {
            Self::ImageTokenizer => "an image tokenizer",
            Self::Generator => "a generator",
            Self::EndToEnd => "an end-to-end generator",
            Self::Matcher => "a matcher",
        }
    }

    /// Which folder holds such a model, in messages.
    pub fn hint(self) -> &'static str {
        match self {
            Self::ImageTokenizer => "name the model folder of a run with task = \"image-tokenizer\"",
            Self::Generator => "name the model folder of a run with task = \"generator\" or \"end-to-end\"",
            Self::EndToEnd => "name the model folder of a run with task = \"end-to-end\"",
            Self::Matcher => "name the model folder of a run with task = \"matcher\"",
        }
    }
}
