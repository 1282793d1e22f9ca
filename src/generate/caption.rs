//! Pictures to text (paper §2.2): by sampling, greedily, or by beam search.

use super::{
    Models,
    beam::Beam,
    sampling::{Sampling, log_softmax},
};
use crate::{
    error::{Result, ensure},
    model::Source,
    ops::softmax::log_sum_exp,
    random::Random,
};
use rayon::prelude::*;

/// Captions that are written side by side.
const BATCH: usize = 64;

/// How captions are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decoding {
    /// Token by token. A picture's captions depend on no other picture; guidance has no meaning here.
    Sample { sampling: Sampling, seed: u64 },
    /// The likeliest captions that a beam of this width finds.
    Beam { width: usize },
}

/// What was said about a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Caption {
    pub text: String,
    /// `[CLS]` tokens `[SEP]`.
    pub tokens: Vec<u32>,
    /// ln p(caption | picture), a token on average.
    pub score: f64,
}

/// A caption on the way by sampling.
#[derive(Default, Clone)]
struct Line {
    tokens: Vec<u32>,
    log_p: f64,
}

/// Which tokens may come next.
struct Allowed {
    /// By token.
    special: Vec<bool>,
    sep: u32,
    /// Tokens after `[CLS]`, `[SEP]` included, for which there are positions.
    longest: usize,
}

impl Allowed {
    /// −∞ where the token after `before` others may not come: special tokens never, `[SEP]` never first, and
    /// nothing else where the positions end.
    fn mask(&self, row: &mut [f32], before: usize) {
        let last = before + 1 >= self.longest;
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
    /// `count` captions for each picture of codes, the best first; a beam narrower than that gives fewer.
    pub fn describe(&self, codes: &[Vec<u32>], decoding: &Decoding, count: usize) -> Result<Vec<Vec<Caption>>> {
        let (vocabulary, sep) = (self.text.vocab_size() as u32, self.text.sep());
        let special = (0..vocabulary).map(|token| self.text.decode(&[token]).is_empty()).collect();
        let allowed = Allowed { special, sep, longest: self.generator.max_text() - 1 };
        let rows = match decoding {
            Decoding::Sample { .. } => count,
            Decoding::Beam { width } => *width,
        };
        let mut captions = Vec::with_capacity(codes.len());
        for codes in codes.chunks((BATCH / rows.max(1)).max(1)) {
            captions.extend(match decoding {
                Decoding::Sample { sampling, seed } => self.sample(codes, sampling, *seed, count, &allowed)?,
                Decoding::Beam { width } => self.search(codes, *width, count, &allowed)?,
            });
        }
        Ok(captions)
    }

    fn sample(
        &self,
        codes: &[Vec<u32>],
        sampling: &Sampling,
        seed: u64,
        count: usize,
        allowed: &Allowed,
    ) -> Result<Vec<Vec<Caption>>> {
        let (mut state, mut first) = self.decoder.start(&Source::image_to_text(codes, self.text.cls()))?;
        let mut rows: Vec<usize> = (0..codes.len() * count).map(|line| line / count).collect();
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
                let (mut choice, position) = (row.to_vec(), line.tokens.len());
                allowed.mask(&mut choice, position);
                let unit = Random::keyed(seed, "caption", (i % count) as u64, position as u64).unit();
                let token = sampling.draw(&choice, unit)?;
                line.log_p += f64::from(row[token as usize]) - log_sum_exp(row);
                line.tokens.push(token);
                Ok(())
            };
            lines.par_iter_mut().enumerate().try_for_each(go_on)?;
            if lines.iter().all(|line| line.tokens.last() == Some(&allowed.sep)) {
                break;
            }
            // Finished lines go along; what follows their [SEP] is not read.
            let last: Vec<u32> = lines.iter().map(|line| line.tokens.last().copied().unwrap_or(allowed.sep)).collect();
            logits = state.logits_next(&last)?;
            rows = (0..lines.len()).collect();
        }
        let caption = |line: &Line| self.finish(&line.tokens, line.log_p / line.tokens.len() as f64);
        let mut captions: Vec<Vec<Caption>> = lines.chunks(count).map(|c| c.iter().map(caption).collect()).collect();
        captions.iter_mut().for_each(|c| c.sort_by(|a, b| b.score.total_cmp(&a.score)));
        Ok(captions)
    }

    fn search(&self, codes: &[Vec<u32>], width: usize, count: usize, allowed: &Allowed) -> Result<Vec<Vec<Caption>>> {
        let (mut state, mut first) = self.decoder.start(&Source::image_to_text(codes, self.text.cls()))?;
        let (vocabulary, mut logits) = (state.vocabulary(), first.as_mut_slice());
        let mut beams: Vec<Beam> = codes.iter().map(|_| Beam::new(width, allowed.sep)).collect();
        loop {
            let mut log_p: Vec<Vec<f32>> = logits.par_chunks(vocabulary).map(log_softmax).collect();
            let (mut first, mut index, mut tokens) = (0, Vec::new(), Vec::new());
            for beam in &mut beams {
                let live = beam.live().len();
                let rows = &mut log_p[first..first + live];
                beam.live().iter().zip(rows.iter_mut()).for_each(|(h, row)| allowed.mask(row, h.tokens.len()));
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
