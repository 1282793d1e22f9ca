//! Re-ranking: which of several candidates matches the prompt best (paper §2.4: the best of 60 images, or of 10 after
//! fine-tuning, by an image–text matcher).

use super::{Matching, Models};
use crate::error::{Result, ensure};
use serde::Serialize;

/// Candidates that are decoded at once.
const DECODED: usize = 8;

/// How many candidates are generated for an image, and what ranks them.
pub struct BestOf<'a> {
    pub count: usize,
    pub ranking: Ranking<'a>,
}

impl BestOf<'_> {
    /// One candidate.
    pub const ONE: Self = Self::own(1);

    /// The best of `count` candidates by the generator's own score.
    pub const fn own(count: usize) -> Self {
        Self { count, ranking: Ranking::Own }
    }
}

/// What ranks the candidates of a prompt.
#[derive(Clone, Copy)]
pub enum Ranking<'a> {
    /// Mean log probability of a prompt token given the image, by the generator itself.
    Own,
    /// Cosine of image and prompt by a matcher.
    Matcher(&'a Matching),
    /// The own score plus `weight` · cosine.
    Both { matching: &'a Matching, weight: f64 },
}

/// The scores of a candidate, as far as its ranking needs them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    /// Mean log probability per token of the prompt given the image, by the generator itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own: Option<f64>,
    /// Cosine of image and prompt by the matcher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f64>,
    /// Probability that image and prompt are a pair, by a calibrated matcher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matcher: Option<f64>,
    /// What the candidates are ranked by.
    pub rank: f64,
}

impl Ranking<'_> {
    fn matching(&self) -> Option<&Matching> {
        match self {
            Self::Own => None,
            Self::Matcher(matching) | Self::Both { matching, .. } => Some(matching),
        }
    }

    fn scores(&self, own: Option<f64>, cosine: Option<f64>) -> Scores {
        let rank = match self {
            Self::Own => own.unwrap_or_default(),
            Self::Matcher(_) => cosine.unwrap_or_default(),
            Self::Both { weight, .. } => own.unwrap_or_default() + weight * cosine.unwrap_or_default(),
        };
        let matcher = self.matching().zip(cosine).and_then(|(matching, cosine)| matching.score(cosine));
        Scores { own, cosine, matcher, rank }
    }
}

impl Models {
    /// The scores of each pair of image codes (raster order) and prompt; `prompts` as texts and as tokens.
    ///
    /// # Errors
    /// A score is not finite, or the numbers of images and texts differ.
    pub(super) fn rank(
        &self,
        ranking: &Ranking,
        codes: &[Vec<u32>],
        (prompts, tokens): (&[&str], &[&[u32]]),
    ) -> Result<Vec<Scores>> {
        let own = match ranking {
            Ranking::Own | Ranking::Both { .. } => Some(self.score(codes, tokens)?),
            Ranking::Matcher(_) => None,
        };
        let cosines = ranking.matching().map(|matching| self.cosines(matching, codes, prompts, tokens)).transpose()?;
        let of = |scores: &Option<Vec<f64>>, i: usize| scores.as_ref().and_then(|scores| scores.get(i).copied());
        Ok((0..codes.len()).map(|i| ranking.scores(of(&own, i), of(&cosines, i))).collect())
    }

    /// The cosine of each image with its prompt.
    fn cosines(
        &self,
        matching: &Matching,
        codes: &[Vec<u32>],
        prompts: &[&str],
        tokens: &[&[u32]],
    ) -> Result<Vec<f64>> {
        ensure!(codes.len() == prompts.len(), "{} images and {} prompts", codes.len(), prompts.len());
        // The candidates of a prompt follow each other.
        let groups = || prompts.chunk_by(|a, b| a == b);
        let distinct: Vec<&str> = groups().filter_map(|group| group.first().copied()).collect();
        let texts = matching.embed_texts(&distinct)?.to_vec2::<f32>()?;
        let mut images = Vec::with_capacity(codes.len());
        for (codes, tokens) in codes.chunks(DECODED).zip(tokens.chunks(DECODED)) {
            images.extend(matching.embed_images(&self.images(tokens, codes)?)?.to_vec2::<f32>()?);
        }
        let of_candidates = groups().zip(&texts).flat_map(|(group, text)| group.iter().map(move |_| text));
        let dot = |(image, text): (&Vec<f32>, &Vec<f32>)| image.iter().zip(text).map(|(a, b)| f64::from(a * b)).sum();
        Ok(images.iter().zip(of_candidates).map(dot).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bundle::{Bundle, tiny_matcher},
        generate::{GeneratedImage, Request, Sampling, tests::tiny},
    };
    use safetensors::Dtype;

    const SAMPLING: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

    /// Against the scores of each candidate on its own.
    #[test]
    fn every_ranking_keeps_the_candidate_with_the_highest_score() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = tiny_matcher(folder.path(), Dtype::F32, 1.0);
        bundle.calibrate([3.0, 0.5]).unwrap();
        let (models, matching) = (tiny(), Matching::open(&Bundle::open(&bundle.name()).unwrap()).unwrap());
        let prompts = ["一弯月", "月", "星，一弯月星月"];
        let requests: Vec<Request> =
            prompts.iter().zip(3..).map(|(prompt, seed)| Request::new(*prompt, seed)).collect();
        let generate = |count, ranking| -> Vec<GeneratedImage> {
            models.generate_images(&requests, &SAMPLING, &BestOf { count, ranking }, |_| {}).unwrap()
        };
        let cosine = |generated: &GeneratedImage, prompt: &str| {
            let image = matching.embed_images(std::slice::from_ref(&generated.image)).unwrap();
            let text = matching.embed_texts(&[prompt]).unwrap();
            f64::from(Matching::cosines(&image, &text).unwrap().to_vec2::<f32>().unwrap()[0][0])
        };
        // More candidates than are decoded at once.
        let count = DECODED + 3;
        let [own, by_matcher, both] =
            [Ranking::Own, Ranking::Matcher(&matching), Ranking::Both { matching: &matching, weight: 7.0 }]
                .map(|ranking| generate(count, ranking));
        for (i, prompt) in prompts.iter().enumerate() {
            let [own, by_matcher, both] = [&own[i], &by_matcher[i], &both[i]];
            for generated in [own, by_matcher, both] {
                assert_eq!(generated.scores.len(), count);
                let best = generated.scores.iter().map(|scores| scores.rank).fold(f64::MIN, f64::max);
                assert_eq!(generated.score(), best);
            }
            for (c, scores) in both.scores.iter().enumerate() {
                let (own, cosine) = (own.scores[c].own.unwrap(), by_matcher.scores[c].cosine.unwrap());
                assert!((scores.rank - own - 7.0 * cosine).abs() < 1e-5);
                assert_eq!(scores.matcher, matching.score(scores.cosine.unwrap()));
            }
            assert_eq!((own.scores[0].cosine, by_matcher.scores[0].own), (None, None));
            let chosen = by_matcher.scores[by_matcher.candidate].cosine.unwrap();
            assert!((cosine(by_matcher, prompt) - chosen).abs() < 1e-4, "the image is not the one that was scored");
        }
        assert!((0..3).any(|i| own[i].candidate != by_matcher[i].candidate), "the rankings never differ");
    }
}
