//! Says when a model does not know what a prompt asks for: before generation by its words, afterwards by the matcher that is
//! built in beside the demo.

use super::prompts;
use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::{Result, ensure},
    generate::{GeneratedImage, Matching, Models, Request},
    report,
};
use image::RgbImage;
use std::collections::HashSet;

/// The least probability, by the matcher, that an image is of its prompt. Below it are 6 % of the demo's images of prompts in
/// `heldout_style`, 21 % of those in `heldout_concept`, and 97 % of those of scenes and lines of poetry, which it does not know
/// (docs/demo.md).
const LEAST: f64 = 0.2;

/// Checks prompts and their images; each prompt gets one warning at most.
pub struct PromptCheck {
    matching: Option<Matching>,
    warned: HashSet<String>,
}

impl PromptCheck {
    /// Checks the prompts' words with a warning about those that the model ignores. Images are checked only if they are the
    /// demo's (`by_demo`): the built-in matcher knows nothing of other models' images.
    ///
    /// # Errors
    /// A prompt has no words.
    pub fn new<'a>(models: &Models, prompts: impl IntoIterator<Item = &'a String>, by_demo: bool) -> Result<Self> {
        let mut warned = HashSet::new();
        for prompt in prompts {
            if !check_words(models, prompt)? {
                warned.insert(prompt.clone());
            }
        }
        let open = || Matching::open(&Bundle::open(DEMO_NAME)?.matcher_folder()?);
        Ok(Self { matching: by_demo.then(open).transpose()?, warned })
    }

    /// The probability that each image is of its prompt, with a warning where it is low for all images of the prompt;
    /// `None`: images are not checked.
    ///
    /// # Errors
    /// The matcher is damaged.
    pub fn images(&mut self, requests: &[Request], generated: &[GeneratedImage]) -> Result<Vec<Option<f64>>> {
        let Some(matching) = &self.matching else { return Ok(vec![None; generated.len()]) };
        let images: Vec<RgbImage> = generated.iter().map(|generated| generated.image.clone()).collect();
        let texts: Vec<&str> = requests.iter().map(|request| request.prompt.as_str()).collect();
        let cosines = Matching::pair_cosines(&matching.embed_images(&images)?, &matching.embed_texts(&texts)?)?;
        let cosines = cosines.to_vec1::<f32>()?;
        let found: Vec<Option<f64>> = cosines.into_iter().map(|cosine| matching.score(cosine.into())).collect();
        let known: HashSet<&str> = texts
            .iter()
            .zip(&found)
            .filter(|(_, score)| score.is_none_or(|score| score >= LEAST))
            .map(|(t, _)| *t)
            .collect();
        for text in texts.iter().filter(|text| !known.contains(**text)) {
            if self.warned.insert((*text).to_owned()) {
                report::warn(format_args!(
                    "the image may not show {}: the demo only knows single things, as emoji",
                    quoted(text)
                ));
            }
        }
        Ok(found)
    }
}

/// Warns about the words of a prompt that the model ignores; whether it knows at least one.
fn check_words(models: &Models, prompt: &str) -> Result<bool> {
    let (text, longest) = (&models.text, models.generator.max_text());
    let seen = text.encode(prompt, longest)?;
    let tokens = &seen[1..seen.len() - 1];
    ensure!(!tokens.is_empty(), prompts::empty());
    let quoted = quoted(prompt);
    if text.encode(prompt, longest + 1)?.len() > longest {
        report::warn(format_args!("{quoted} is longer than {} tokens; the rest is ignored", longest - 2));
    }
    let unknown = tokens.iter().filter(|&&token| token == text.unk()).count();
    if unknown == tokens.len() {
        report::warn(format_args!("the model knows no word of {quoted}; it was trained on Chinese"));
    } else if unknown > 0 {
        report::warn(format_args!("the model does not know {unknown} of the {} tokens of {quoted}", tokens.len()));
    }
    Ok(unknown < tokens.len())
}

/// The first characters of a prompt, in quotation marks.
fn quoted(prompt: &str) -> String {
    match prompt.char_indices().nth(20) {
        Some((end, _)) => format!("“{}…”", &prompt[..end]),
        None => format!("“{prompt}”"),
    }
}
