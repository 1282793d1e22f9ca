//! Image to text (paper §2.2): captions, and answers to questions about images (paper §4.4), by sampling, greedy decoding
//! or beam search.

use super::{
    Models,
    beam::{self, Beam},
    sampling::{Sampling, log_softmax},
};
use crate::{
    error::{Result, ensure},
    model::Source,
    ops::softmax::log_sum_exp,
    random::Random,
};
use rayon::prelude::*;

/// Number of captions generated in one batch.
const BATCH: usize = 64;

/// The decoding algorithm for captions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decoding {
    /// Sampling token by token. The captions of an image do not depend on the other images; guidance is ignored.
    Sample { sampling: Sampling, seed: u64 },
    /// Beam search: the captions with the largest Σ ln p / lengthᵅ. `width` hypotheses are extended at each step; α is
    /// `length_penalty`, at least 0 (0: sum of log probabilities, 1: mean per token).
    Beam { width: usize, length_penalty: f64 },
}

/// A caption of an image, or an answer to a question about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Caption {
    pub text: String,
    /// Token ids: `[CLS]`, tokens, `[SEP]`.
    pub tokens: Vec<u32>,
    /// Mean log probability per token of the caption, `[SEP]` included, given the image.
    pub score: f64,
}

/// What texts are written for: images as codes and, for answers, a question about each as tokens.
#[derive(Clone, Copy)]
struct Given<'a> {
    codes: &'a [Vec<u32>],
    questions: Option<&'a [Vec<u32>]>,
}

impl<'a> Given<'a> {
    fn chunks(self, size: usize) -> impl Iterator<Item = Self> {
        (0..self.codes.len()).step_by(size).map(move |first| {
            let range = first..self.codes.len().min(first + size);
            Self { codes: &self.codes[range.clone()], questions: self.questions.map(|all| &all[range]) }
        })
    }

    fn source(self, cls: u32) -> Source<'a> {
        match self.questions {
            None => Source::image_to_text(self.codes, cls),
            Some(questions) => Source::visual_question(self.codes, questions, cls),
        }
    }
}

/// A caption that is being sampled.
#[derive(Default, Clone)]
struct Line {
    tokens: Vec<u32>,
    log_p: f64,
}

/// No sequence of this length occurs twice in a caption (`no_repeat_ngram_size` of Hugging Face), so that none goes round in
/// circles. Names of colors and things, which may well occur twice, are shorter.
const REPEATED: usize = 6;

/// The tokens that followed the last `REPEATED − 1` tokens of `tokens` before.
fn repetitions(tokens: &[u32]) -> impl Iterator<Item = u32> {
    let known = tokens.len().saturating_sub(REPEATED - 1);
    let (earlier, last) = (tokens.windows(REPEATED), &tokens[known..]);
    earlier.filter(move |earlier| earlier.starts_with(last)).map(|earlier| earlier[REPEATED - 1])
}

/// Constraints on the next token.
struct Allowed {
    /// For each token: whether it is a special token.
    special: Vec<bool>,
    sep: u32,
    /// Maximum number of tokens of a caption without `[CLS]`, with `[SEP]`: the text positions of the model.
    longest: usize,
}

impl Allowed {
    /// Sets the logits of forbidden tokens to −∞, after the tokens `before`. Special tokens are always forbidden,
    /// `[SEP]` at the first position, everything but `[SEP]` at the last position, and what would make the last
    /// [`REPEATED`] tokens a repetition.
    fn mask(&self, row: &mut [f32], before: &[u32]) {
        for token in repetitions(before) {
            row[token as usize] = f32::NEG_INFINITY;
        }
        let (before, last) = (before.len(), before.len() + 1 >= self.longest);
        for (token, value) in row.iter_mut().enumerate() {
            let allowed = match token as u32 == self.sep {
                true => before > 0 || last,
                false => !last && !self.special.get(token).copied().unwrap_or(true),
            };
            if !allowed {
                *value = f32::NEG_INFINITY;
            }
        }
    }
}

impl Models {
    /// Generates up to `count` captions for the codes of each image, best first. A beam narrower than `count` gives
    /// fewer.
    ///
    /// # Errors
    /// A logit is not finite: the weights are damaged.
    pub fn caption(&self, codes: &[Vec<u32>], decoding: &Decoding, count: usize) -> Result<Vec<Vec<Caption>>> {
        self.write(Given { codes, questions: None }, decoding, count)
    }

    /// Generates up to `count` answers to one question about each image, best first.
    ///
    /// # Errors
    /// As [`Models::caption`], or the numbers of images and questions differ.
    pub fn answer(
        &self,
        codes: &[Vec<u32>],
        questions: &[&str],
        decoding: &Decoding,
        count: usize,
    ) -> Result<Vec<Vec<Caption>>> {
        ensure!(codes.len() == questions.len(), "{} images for {} questions", codes.len(), questions.len());
        let encode = |question: &&str| self.text.encode(question, self.generator.max_text());
        let questions = questions.iter().map(encode).collect::<Result<Vec<_>>>()?;
        self.write(Given { codes, questions: Some(&questions) }, decoding, count)
    }

    fn write(&self, given: Given, decoding: &Decoding, count: usize) -> Result<Vec<Vec<Caption>>> {
        let (vocabulary, sep) = (self.text.vocab_size() as u32, self.text.sep());
        let special = (0..vocabulary).map(|token| self.text.decode(&[token]).is_empty()).collect();
        let allowed = Allowed { special, sep, longest: self.generator.max_text() - 1 };
        let rows = match decoding {
            Decoding::Sample { .. } => count,
            Decoding::Beam { width, .. } => *width,
        };
        let mut captions = Vec::with_capacity(given.codes.len());
        for given in given.chunks((BATCH / rows.max(1)).max(1)) {
            captions.extend(match decoding {
                Decoding::Sample { sampling, seed } => self.sample(given, sampling, *seed, count, &allowed)?,
                Decoding::Beam { width, length_penalty } => {
                    let (sep, longest) = (allowed.sep, allowed.longest);
                    let settings = beam::Settings { width: *width, length_penalty: *length_penalty, sep, longest };
                    self.search(given, settings, count, &allowed)?
                }
            });
        }
        Ok(captions)
    }

    fn sample(
        &self,
        given: Given,
        sampling: &Sampling,
        seed: u64,
        count: usize,
        allowed: &Allowed,
    ) -> Result<Vec<Vec<Caption>>> {
        let (mut state, mut first) = self.decoder.start(&given.source(self.text.cls()))?;
        let mut rows: Vec<usize> = (0..given.codes.len() * count).map(|line| line / count).collect();
        state.reorder(&rows)?;
        let vocabulary = state.vocabulary();
        let mut logits = first.as_mut_slice();
        let mut lines = vec![Line::default(); rows.len()];
        loop {
            let go_on = |(i, line): (usize, &mut Line)| -> Result<()> {
                if line.tokens.last() == Some(&allowed.sep) {
                    return Ok(());
                }
                let row = &logits[rows[i] * vocabulary..][..vocabulary];
                let mut choice = row.to_vec();
                allowed.mask(&mut choice, &line.tokens);
                let unit = Random::keyed(seed, "caption", (i % count) as u64, line.tokens.len() as u64).unit();
                let token = sampling.draw(&choice, unit)?;
                line.log_p += f64::from(row[token as usize]) - log_sum_exp(row);
                line.tokens.push(token);
                Ok(())
            };
            lines.par_iter_mut().enumerate().try_for_each(go_on)?;
            if lines.iter().all(|line| line.tokens.last() == Some(&allowed.sep)) {
                break;
            }
            // Finished captions stay in the batch; tokens after their [SEP] are ignored.
            let last: Vec<u32> = lines.iter().map(|line| line.tokens.last().copied().unwrap_or(allowed.sep)).collect();
            logits = state.logits_next(&last)?;
            rows = (0..lines.len()).collect();
        }
        let caption = |line: &Line| self.finish(&line.tokens, line.log_p / line.tokens.len() as f64);
        let mut captions: Vec<Vec<Caption>> = lines.chunks(count).map(|c| c.iter().map(caption).collect()).collect();
        captions.iter_mut().for_each(|c| c.sort_by(|a, b| b.score.total_cmp(&a.score)));
        Ok(captions)
    }

    fn search(
        &self,
        given: Given,
        settings: beam::Settings,
        count: usize,
        allowed: &Allowed,
    ) -> Result<Vec<Vec<Caption>>> {
        let (mut state, mut first) = self.decoder.start(&given.source(self.text.cls()))?;
        let (vocabulary, mut logits) = (state.vocabulary(), first.as_mut_slice());
        let mut beams: Vec<Beam> = given.codes.iter().map(|_| Beam::new(settings)).collect();
        loop {
            let mut log_p: Vec<Vec<f32>> = logits.par_chunks(vocabulary).map(log_softmax).collect();
            let (mut first, mut index, mut tokens) = (0, Vec::new(), Vec::new());
            for beam in &mut beams {
                let live = beam.live().len();
                let rows = &mut log_p[first..first + live];
                beam.live().iter().zip(rows.iter_mut()).for_each(|(h, row)| allowed.mask(row, &h.tokens));
                index.extend(beam.step(rows).into_iter().map(|parent| first + parent));
                tokens.extend(beam.live().iter().filter_map(|hypothesis| hypothesis.tokens.last().copied()));
                first += live;
            }
            if tokens.is_empty() {
                break;
            }
            state.reorder(&index)?;
            logits = state.logits_next(&tokens)?;
        }
        let captions = |beam: Beam| -> Result<Vec<Caption>> {
            let found = beam.into_finished();
            ensure!(!found.is_empty(), "the model's predictions are not finite numbers; its weights are damaged");
            Ok(found.iter().take(count).map(|h| self.finish(&h.tokens, h.score())).collect())
        };
        beams.into_iter().map(captions).collect()
    }

    fn finish(&self, tokens: &[u32], score: f64) -> Caption {
        let tokens: Vec<u32> = std::iter::once(self.text.cls()).chain(tokens.iter().copied()).collect();
        Caption { text: self.text.decode(&tokens), tokens, score }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_of_six_tokens_do_not_occur_twice() {
        let next = |tokens: &[u32]| repetitions(tokens).collect::<Vec<_>>();
        let loops = [7, 1, 2, 3, 1, 2, 3, 1, 2];
        assert_eq!(next(&loops), [3]);
        assert_eq!(next(&loops[..8]), [2u32; 0], "the last five tokens are new");
        assert_eq!(next(&[5; 5]), [5u32; 0], "no six tokens yet");
        assert_eq!(next(&[5; 6]), [5]);
        assert_eq!(next(&[]), [5u32; 0]);

        let allowed = Allowed { special: vec![false; 4], sep: 0, longest: 20 };
        let mut row = vec![0.0; 4];
        allowed.mask(&mut row, &loops);
        assert_eq!(row, [0.0, 0.0, 0.0, f32::NEG_INFINITY]);
    }
}
