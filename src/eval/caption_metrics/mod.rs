//! Metrics of captions against references, as COCO's evaluation (pycocoevalcap) computes them, with characters as tokens:
//! BLEU, METEOR, ROUGE-L, CIDEr-D and CIDEr.
//!
//! Published figures for Chinese differ in their tokens (words of a segmenter, characters, with or without punctuation)
//! more than in their models; the convention belongs to the figure.

mod bleu;
mod case;
mod cider;
mod coco;
mod meteor;
mod meteor_alignment;
mod meteor_jar;
mod rouge;

pub use case::Scores;
pub use coco::{ImageId, Sample, captions, read};

use super::captioning::{self, Settings};
use crate::{error::Result, generate::Models};
use case::{Case, tokens};
use cider::{Variant, cider};
use std::path::Path;

/// Captions samples that have captions of their own, which are the references.
///
/// # Errors
/// The data cannot be read, or the model is damaged.
pub fn caption(models: &Models, settings: &Settings) -> Result<Vec<Sample>> {
    let (captioned, _) = captioning::run(models, settings, true, |_| true)?;
    let sample = |found: captioning::Captioned| Sample {
        id: ImageId::Text(found.record.key),
        caption: found.caption,
        references: found.record.captions,
    };
    Ok(captioned.into_iter().map(sample).collect())
}

/// The scores of each metric, by the names that pycocoevalcap gives them: `CIDEr` is CIDEr-D, and `CIDEr_plain` the metric
/// without clipping and length penalty. With the path of METEOR's jar, `METEOR_jar` is its score.
///
/// # Errors
/// METEOR's jar cannot be run.
pub fn measure(
    samples: &[Sample],
    drop_punctuation: bool,
    meteor_jar: Option<&Path>,
) -> Result<Vec<(&'static str, Scores)>> {
    let case = |sample: &Sample| Case {
        caption: tokens(&sample.caption, drop_punctuation),
        references: sample.references.iter().map(|reference| tokens(reference, drop_punctuation)).collect(),
    };
    let cases: Vec<Case> = samples.iter().map(case).collect();
    let names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"];
    let mut scores: Vec<(&str, Scores)> = names.into_iter().zip(bleu::bleu(&cases)).collect();
    scores.push(("METEOR", meteor::meteor(&cases)));
    if let Some(jar) = meteor_jar {
        scores.push(("METEOR_jar", meteor_jar::meteor(jar, &cases)?));
    }
    scores.push(("ROUGE_L", rouge::rouge_l(&cases)));
    scores.push(("CIDEr", cider(&cases, Variant::D)));
    scores.push(("CIDEr_plain", cider(&cases, Variant::Plain)));
    Ok(scores)
}

#[cfg(test)]
mod tests;
