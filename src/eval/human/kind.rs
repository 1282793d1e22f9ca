//! What raters see and the questions that they answer (paper §4.2.3, §4.3, §4.4).

use serde::Serialize;

/// What a study rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Generated images for prompts; the images of all systems stand side by side.
    Images,
    /// Captions of images, one on a page.
    Captions,
    /// Answers to questions about images, one on a page; answers of people are among them.
    Answers,
}

/// A question about each output, answered by a whole number from `low` to `high`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Question {
    pub name: &'static str,
    pub low: i64,
    pub high: i64,
}

/// The name of the Turing question: 1 stands for "by a person", 0 for "by a machine".
pub const PERSON: &str = "person";

const IMAGES: [Question; 3] = [question("clarity", 1, 5), question("texture", 1, 5), question("relevance", 1, 5)];
const CAPTIONS: [Question; 3] = [question("fluency", 0, 2), question("relevance", 0, 2), question("richness", 0, 2)];
const ANSWERS: [Question; 2] = [question("quality", 0, 2), question(PERSON, 0, 1)];

const fn question(name: &'static str, low: i64, high: i64) -> Question {
    Question { name, low, high }
}

impl Kind {
    /// Every kind of output that people rate.
    pub const ALL: [Self; 3] = [Self::Images, Self::Captions, Self::Answers];

    /// The name in the study file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Captions => "captions",
            Self::Answers => "answers",
        }
    }

    /// The questions about an output, in the order of the page.
    pub fn questions(self) -> &'static [Question] {
        match self {
            Self::Images => &IMAGES,
            Self::Captions => &CAPTIONS,
            Self::Answers => &ANSWERS,
        }
    }

    /// The question with this name.
    pub fn question(self, name: &str) -> Option<&'static Question> {
        self.questions().iter().find(|question| question.name == name)
    }
}
