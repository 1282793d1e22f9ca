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
        match self {
            Self::Generator | Self::EndToEnd => true,
            Self::ImageTokenizer | Self::Matcher => false,
        }
    }

    /// Whether its model has a reconstructor of its own beside the image tokenizer.
    pub fn has_reconstructor(self) -> bool {
        match self {
            Self::EndToEnd => true,
            Self::Generator | Self::ImageTokenizer | Self::Matcher => false,
        }
    }

    /// Whether low-rank adapters can be trained for its model.
    pub fn has_adapters(self) -> bool {
        match self {
            Self::Generator => true,
            Self::EndToEnd | Self::ImageTokenizer | Self::Matcher => false,
        }
    }

    /// Whether its model reads text, so that its folder holds a vocabulary.
    pub fn has_vocabulary(self) -> bool {
        match self {
            Self::Generator | Self::EndToEnd | Self::Matcher => true,
            Self::ImageTokenizer => false,
        }
    }

    /// Whether its model can be used where one of the task `wanted` is needed. An end-to-end generator is a generator too.
    pub fn serves_as(self, wanted: Self) -> bool {
        match wanted {
            Self::Generator => self.is_generator(),
            Self::EndToEnd | Self::ImageTokenizer | Self::Matcher => self == wanted,
        }
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
