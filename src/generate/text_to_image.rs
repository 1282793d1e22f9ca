//! Text to image (paper §2.4): generates the codes one by one, then decodes them with the image tokenizer.

use super::{
    Models,
    ranking::{BestOf, Scores},
    sampling::{Sampling, guide},
};
use crate::{
    error::{Context, Result, ensure},
    model::Source,
    random::Random,
};
use image::RgbImage;
use rayon::prelude::*;

/// Number of images generated in one batch.
const BATCH: usize = 64;

/// An image to generate. The result depends only on its prompt and seed, not on other requests in the batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    pub prompt: String,
    pub seed: u64,
    /// What guidance leads away from; empty: from images without a text.
    pub negative: String,
    /// The first codes of the image in raster order, which are not drawn; empty: all are.
    pub given: Vec<u32>,
}

impl Request {
    /// An image of a prompt, all of it drawn.
    pub fn new(prompt: impl Into<String>, seed: u64) -> Self {
        Self { prompt: prompt.into(), seed, ..Self::default() }
    }
}

/// A generated image.
#[derive(Debug, Clone)]
pub struct GeneratedImage {
    pub image: RgbImage,
    /// The image's codes in raster order.
    pub codes: Vec<u32>,
    /// Which of the candidates it is, counted from 0.
    pub candidate: usize,
    /// The scores of all candidates.
    pub scores: Vec<Scores>,
}

impl GeneratedImage {
    /// What its candidate was ranked by.
    pub fn score(&self) -> f64 {
        self.scores.get(self.candidate).map_or(f64::NAN, |scores| scores.rank)
    }
}

/// One candidate of one request.
#[derive(Clone, Copy)]
struct Draw {
    request: usize,
    seed: u64,
    candidate: u64,
}

/// The best candidate of a request so far.
#[derive(Clone, Default)]
struct Best {
    candidate: usize,
    codes: Vec<u32>,
    /// Of all candidates so far.
    scores: Vec<Scores>,
}

impl Best {
    fn add(&mut self, codes: Vec<u32>, scores: Scores) {
        if self.scores.get(self.candidate).is_none_or(|best| scores.rank > best.rank) {
            (self.candidate, self.codes) = (self.scores.len(), codes);
        }
        self.scores.push(scores);
    }
}

impl Models {
    /// Generates the image of every request: the best of its candidates. `advance` is called with the
    /// number of codes generated since its last call.
    ///
    /// # Errors
    /// A logit is not finite: the weights are damaged.
    pub fn generate_images(
        &self,
        requests: &[Request],
        sampling: &Sampling,
        best_of: &BestOf,
        mut advance: impl FnMut(u64),
    ) -> Result<Vec<GeneratedImage>> {
        let mut best: Vec<Best> = vec![Best::default(); requests.len()];
        self.each_candidate(requests, sampling, best_of, &mut advance, |request, codes, scores| {
            best[request].add(codes, scores);
            Ok(())
        })?;
        let prompts = self.prompts(requests)?;
        // One image at a time, so that its pixels do not depend on other images.
        let finish = |(Best { candidate, codes, scores }, prompt): (Best, &Vec<u32>)| {
            let image = self.images(&[prompt], std::slice::from_ref(&codes))?.pop();
            Ok(GeneratedImage { image: image.context("the decoder returned no image")?, codes, candidate, scores })
        };
        best.into_iter().zip(&prompts).map(finish).collect()
    }

    /// Generates all candidates of every request and calls `found` with the request's index, the codes in raster order
    /// and the scores of each; candidates of a request come one after the other. `advance` as for
    /// [`Models::generate_images`].
    ///
    /// # Errors
    /// As [`Models::generate_images`], or an error of `found`.
    pub fn each_candidate(
        &self,
        requests: &[Request],
        sampling: &Sampling,
        best_of: &BestOf,
        mut advance: impl FnMut(u64),
        mut found: impl FnMut(usize, Vec<u32>, Scores) -> Result<()>,
    ) -> Result<()> {
        let prompts = self.prompts(requests)?;
        let draw = |request, candidate| Draw { request, seed: requests[request].seed, candidate: candidate as u64 };
        let draws: Vec<Draw> =
            (0..requests.len()).flat_map(|j| (0..best_of.count.max(1)).map(move |c| draw(j, c))).collect();
        for chunk in draws.chunks(BATCH) {
            let codes = self.draw_codes(requests, &prompts, chunk, sampling, &mut advance)?;
            let tokens: Vec<&[u32]> = chunk.iter().map(|draw| prompts[draw.request].as_slice()).collect();
            let texts: Vec<&str> = chunk.iter().map(|draw| requests[draw.request].prompt.as_str()).collect();
            let scores = self.rank(&best_of.ranking, &codes, (&texts, &tokens))?;
            for ((draw, codes), scores) in chunk.iter().zip(codes).zip(scores) {
                found(draw.request, codes, scores)?;
            }
        }
        Ok(())
    }

    /// The codes of every request's first candidate, in raster order; `advance` as for [`Models::generate_images`].
    ///
    /// # Errors
    /// As [`Models::generate_images`].
    pub fn generate_codes(
        &self,
        requests: &[Request],
        sampling: &Sampling,
        mut advance: impl FnMut(u64),
    ) -> Result<Vec<Vec<u32>>> {
        let prompts = self.prompts(requests)?;
        let draw = |(request, Request { seed, .. }): (usize, &Request)| Draw { request, seed: *seed, candidate: 0 };
        let draws: Vec<Draw> = requests.iter().enumerate().map(draw).collect();
        let codes = draws.chunks(BATCH).map(|chunk| self.draw_codes(requests, &prompts, chunk, sampling, &mut advance));
        Ok(codes.collect::<Result<Vec<_>>>()?.concat())
    }

    /// The tokens of the prompts.
    fn prompts(&self, requests: &[Request]) -> Result<Vec<Vec<u32>>> {
        requests.iter().map(|request| self.text.encode(&request.prompt, self.generator.max_text())).collect()
    }

    /// The codes of each candidate. The prefill of a prompt is computed once for all its candidates.
    fn draw_codes(
        &self,
        requests: &[Request],
        prompts: &[Vec<u32>],
        draws: &[Draw],
        sampling: &Sampling,
        advance: &mut impl FnMut(u64),
    ) -> Result<Vec<Vec<u32>>> {
        let (first, last) = (draws.first().map_or(0, |d| d.request), draws.last().map_or(0, |d| d.request));
        let mut sources = prompts[first..=last].to_vec();
        let mut rows: Vec<usize> = draws.iter().map(|draw| draw.request - first).collect();
        let guided = sampling.is_guided();
        if guided {
            // The second half of the rows is the branch that classifier-free guidance leads away from.
            let mut negatives: Vec<&str> = Vec::new();
            for draw in draws {
                let negative = requests[draw.request].negative.as_str();
                let known = negatives.iter().position(|known| *known == negative);
                let place = known.unwrap_or_else(|| {
                    negatives.push(negative);
                    negatives.len() - 1
                });
                rows.push(sources.len() + place);
            }
            for negative in negatives {
                sources.push(self.text.encode(negative, self.generator.max_text())?);
            }
        }
        let (mut state, first) = self.decoder.start(&Source::text_to_image(&sources))?;
        state.reorder(&rows)?;
        let of_source: Vec<&[f32]> = first.chunks_exact(state.vocabulary()).collect();
        let mut first: Vec<f32> = rows.iter().flat_map(|&row| of_source[row]).copied().collect();
        let mut logits = first.as_mut_slice();

        let count = self.generator.grid().len();
        let mut codes: Vec<Vec<u32>> = vec![Vec::with_capacity(count); draws.len()];
        for position in 0..count {
            let mut next = next_codes(logits, draws, (sampling, count), position)?;
            for (code, draw) in next.iter_mut().zip(draws) {
                *code = requests[draw.request].given.get(position).copied().unwrap_or(*code);
            }
            codes.iter_mut().zip(&next).for_each(|(codes, &code)| codes.push(code));
            advance(draws.len() as u64);
            if position + 1 < count {
                logits = state.logits_next(&if guided { next.repeat(2) } else { next })?;
            }
        }
        Ok(codes)
    }
}

/// Logits → the code at a position of a candidate of the image with this seed. `sampling` is that of the position.
///
/// # Errors
/// A logit is not finite.
pub(super) fn next_code(
    logits: &[f32],
    sampling: &Sampling,
    seed: u64,
    (candidate, position): (u64, u64),
) -> Result<u32> {
    sampling.draw(logits, Random::keyed(seed, "paint", candidate, position).unit())
}

/// Logits `(rows, vocabulary)` → the next code of each draw, at `position` of `count` codes. With guidance, the second half of the rows is the branch that
/// it leads away from.
fn next_codes(
    values: &mut [f32],
    draws: &[Draw],
    (sampling, count): (&Sampling, usize),
    position: usize,
) -> Result<Vec<u32>> {
    let (guided, sampling) = (sampling.is_guided(), &sampling.at(position, count));
    let vocabulary = values.len() / draws.len() / if guided { 2 } else { 1 };
    ensure!(vocabulary > 0, "the model has an empty vocabulary");
    let (conditional, unconditional) = values.split_at_mut(draws.len() * vocabulary);
    if guided {
        guide(conditional, unconditional, sampling.guidance);
    }
    let draw = |(row, draw): (&[f32], &Draw)| next_code(row, sampling, draw.seed, (draw.candidate, position as u64));
    conditional.par_chunks(vocabulary).zip(draws).map(draw).collect()
}
