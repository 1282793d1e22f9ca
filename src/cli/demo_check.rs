//! Says what a model does not know: words of a prompt before generation; and of the demo, images that do not show their
//! prompt and captions that do not fit their image, by the built-in matcher.

use super::prompts;
use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::{Result, ensure},
    generate::{GeneratedImage, Matching, Models, Request},
    report,
};
use image::RgbImage;
use std::collections::HashSet;

/// The least probability, by the matcher, that an image and its text are a pair. Of the demo's images, 6 % of prompts in
/// `heldout_style` are below it, 21 % in `heldout_concept`, and 97 % of scenes and lines of poetry, which it does not know;
/// of its captions, 2 %, 18 % and 97 % (docs/demo.md).
pub const LEAST: f64 = 0.2;

/// The built-in matcher, for the demo only: it knows nothing of what other models were trained on.
pub struct DemoCheck(Option<Matching>);

impl DemoCheck {
    /// Loads the matcher if the model is the demo.
    ///
    /// # Errors
    /// The matcher is damaged.
    pub fn new(is_demo: bool) -> Result<Self> {
        let open = || Matching::open(&Bundle::open(DEMO_NAME)?.matcher_folder()?);
        Ok(Self(is_demo.then(open).transpose()?))
    }

    /// The probability that each image and each of its texts are a pair; `None`: the model is not the demo.
    ///
    /// # Errors
    /// The matcher is damaged.
    pub fn scores(&self, images: &[RgbImage], texts: &[Vec<String>]) -> Result<Vec<Vec<Option<f64>>>> {
        let Some(matching) = self.0.as_ref().filter(|_| !images.is_empty()) else {
            return Ok(texts.iter().map(|texts| vec![None; texts.len()]).collect());
        };
        let (images, of) = (matching.embed_images(images)?, texts.concat());
        let cosines = Matching::cosines(&images, &matching.embed_texts(&of)?)?.to_vec2::<f32>()?;
        let mut first = 0;
        let scores = |(cosines, texts): (&Vec<f32>, &Vec<String>)| {
            let own = cosines.iter().skip(first).take(texts.len());
            first += texts.len();
            own.map(|&cosine| matching.score(cosine.into())).collect()
        };
        Ok(cosines.iter().zip(texts).map(scores).collect())
    }
}

/// Checks prompts and their images; each prompt gets one warning at most.
pub struct PromptCheck {
    demo: DemoCheck,
    warned: HashSet<String>,
}

impl PromptCheck {
    /// Checks the words of the prompts, with a warning about those that the model ignores.
    ///
    /// # Errors
    /// A prompt has no words, or the matcher is damaged.
    pub fn new<'a>(models: &Models, prompts: impl IntoIterator<Item = &'a String>, is_demo: bool) -> Result<Self> {
        let mut warned = HashSet::new();
        for prompt in prompts {
            if !check_words(models, prompt)? {
                warned.insert(prompt.clone());
            }
        }
        Ok(Self { demo: DemoCheck::new(is_demo)?, warned })
    }

    /// The probability that each image is of its prompt, with a warning where it is low for all images of the prompt.
    ///
    /// # Errors
    /// The matcher is damaged.
    pub fn images(&mut self, requests: &[Request], generated: &[GeneratedImage]) -> Result<Vec<Option<f64>>> {
        let images: Vec<RgbImage> = generated.iter().map(|generated| generated.image.clone()).collect();
        let texts: Vec<&str> = requests.iter().map(|request| request.prompt.as_str()).collect();
        let of_image: Vec<Vec<String>> = texts.iter().map(|text| vec![(*text).to_owned()]).collect();
        let scores: Vec<Option<f64>> = self.demo.scores(&images, &of_image)?.concat();
        let shown = texts.iter().zip(&scores).filter(|(_, score)| score.is_none_or(|score| score >= LEAST));
        let shown: HashSet<&str> = shown.map(|(text, _)| *text).collect();
        for text in texts.iter().filter(|text| !shown.contains(**text)) {
            if self.warned.insert((*text).to_owned()) {
                let quoted = quoted(text);
                report::warn(format_args!(
                    "the image may not show {quoted}: the demo only knows emoji of single things"
                ));
            }
        }
        Ok(scores)
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
