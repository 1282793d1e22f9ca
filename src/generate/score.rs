//! The log likelihood of a text given an image.

use super::Models;
use crate::{
    error::{Result, ensure},
    model::{Batch, Tokens},
    ops::softmax::log_sum_exp,
    runtime,
};
use candle_core::DType;
use rayon::prelude::*;

/// Batch size in pairs; the logits of a batch over the whole vocabulary are in memory together.
const BATCH: usize = 16;

impl Models {
    /// Mean log probability per token of the text (`[SEP]` included) given the image, for each pair of image codes
    /// (raster order) and text (`[CLS]`, tokens, `[SEP]`).
    ///
    /// # Errors
    /// The numbers of images and texts differ, or a code or token is not in the vocabulary.
    pub fn score(&self, codes: &[Vec<u32>], texts: &[&[u32]]) -> Result<Vec<f64>> {
        ensure!(codes.len() == texts.len(), "{} images and {} texts", codes.len(), texts.len());
        let mut scores = Vec::with_capacity(codes.len());
        for (codes, texts) in codes.chunks(BATCH).zip(texts.chunks(BATCH)) {
            scores.extend(self.score_batch(codes, texts)?);
        }
        Ok(scores)
    }

    fn score_batch(&self, codes: &[Vec<u32>], texts: &[&[u32]]) -> Result<Vec<f64>> {
        let device = &runtime::device()?;
        let rows: Vec<Vec<u32>> = texts.iter().map(|text| text.to_vec()).collect();
        let width = rows.iter().map(Vec::len).max().unwrap_or(0);
        let text = Tokens::pad(&rows, width, self.text.pad(), device)?;
        let codes = Tokens::pad(codes, self.generator.grid().len(), 0, device)?.ids;
        let batch = Batch::image_to_text(codes, text)?;
        let logits = self.generator.logits(&batch)?;
        let vocabulary = logits.dim(2)?;
        let values: Vec<f32> = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let score = |(text, values): (&Vec<u32>, &[f32])| {
            let targets = &text[1..];
            let rows = targets.iter().zip(values.chunks(vocabulary));
            let log_p = rows.map(|(&token, row)| f64::from(row[token as usize]) - log_sum_exp(row));
            log_p.sum::<f64>() / targets.len() as f64
        };
        Ok(rows.par_iter().zip(values.par_chunks((width - 1) * vocabulary)).map(score).collect())
    }
}
