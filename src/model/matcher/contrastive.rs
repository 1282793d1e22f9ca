//! Contrastive losses over all pairs of all ranks: InfoNCE (CLIP, arXiv 2103.00020) and the sigmoid loss (SigLIP, arXiv
//! 2303.15343).
//!
//! A rank computes the logits of its own images with all texts and of its own texts with all images. Ranks exchange their
//! embeddings and, for InfoNCE, the log-sum-exp of their rows; from these each computes the exact gradients of its own
//! embeddings, so that no gradients travel.

use super::head::unnormalized;
use crate::{
    config::ContrastiveLoss,
    dist::{Group, Number},
    error::{Result, ensure, failed},
    ops::{
        gemm::{Beta, Matrix, gemm},
        simd::Real,
    },
};
use rayon::prelude::*;
use std::ops::Range;

/// This rank's pairs.
pub struct Pairs<'a, T> {
    /// Embeddings of length 1, (pairs, embedding).
    pub images: &'a [T],
    /// Embeddings of length 1, (pairs, embedding).
    pub texts: &'a [T],
    /// Equal for equal texts: such pairs are not negatives of each other.
    pub captions: &'a [u64],
}

/// The loss and its gradients.
#[derive(Debug)]
pub struct Gradients<T> {
    /// This rank's part of the loss; the parts of all ranks add up to it.
    pub loss: f64,
    /// This rank's number of images and texts that are closest to their partner, among all partners.
    pub correct: usize,
    /// (pairs, embedding)
    pub images: Vec<T>,
    /// (pairs, embedding)
    pub texts: Vec<T>,
    /// With respect to the logarithm of the scale and to the bias: this rank's part, as of the loss.
    pub scale: [f64; 2],
}

/// The mean loss of all pairs of all ranks. `scale`: the logarithm of the scale, and the bias.
///
/// InfoNCE is the mean of both directions. The sigmoid loss is summed over a row, as in SigLIP.
///
/// # Errors
/// An embedding is not finite or has no length, they do not fit together, or a rank does not come.
pub fn contrastive<T: Real + Number>(
    kind: ContrastiveLoss,
    pairs: &Pairs<T>,
    [scale, bias]: [f64; 2],
    group: &Group,
) -> Result<Gradients<T>> {
    let count = pairs.captions.len();
    let fits = pairs.images.len() == pairs.texts.len() && count > 0 && pairs.images.len().is_multiple_of(count);
    ensure!(fits, "{} images' and {} texts' numbers for {count} pairs", pairs.images.len(), pairs.texts.len());
    for (what, embeddings) in [("image", pairs.images), ("text", pairs.texts)] {
        check(what, embeddings, count)?;
    }
    let (images, texts) = (gathered(group, pairs.images)?, gathered(group, pairs.texts)?);
    let captions: Vec<Vec<u64>> = group.gather(pairs.captions.to_vec())?.iter().map(|part| part.to_vec()).collect();
    let first: usize = captions[..group.rank()].iter().map(Vec::len).sum();
    let captions = captions.concat();
    let all = All { captions: &captions, own: first..first + count, scale: scale.exp(), bias };
    let mut rows = [Rows::new(&all, pairs.images, &texts), Rows::new(&all, pairs.texts, &images)];
    let correct = rows.iter().map(|rows| rows.correct(&all)).sum();
    let [loss, scale, bias] = match kind {
        ContrastiveLoss::Infonce => infonce(&all, &mut rows, group)?,
        ContrastiveLoss::Sigmoid => sigmoid(&all, &mut rows),
    };
    let [images, texts] = rows.map(|rows| rows.embedding_gradient(&all));
    Ok(Gradients { loss, correct, images, texts, scale: [scale, bias] })
}

fn check<T: Real>(what: &str, embeddings: &[T], count: usize) -> Result<()> {
    let Some(wrong) = unnormalized(embeddings, embeddings.len() / count) else { return Ok(()) };
    let message = format!("the embedding of {what} {} of {count} is not finite or has no length", wrong + 1);
    Err(failed(message, "the training diverges: resume from an older checkpoint with a lower train.learning_rate"))
}

fn gathered<T: Number>(group: &Group, ours: &[T]) -> Result<Vec<T>> {
    Ok(group.gather(ours.to_vec())?.iter().flat_map(|part| part.iter().copied()).collect())
}

/// What the rows of both directions share.
struct All<'a> {
    /// Of all pairs.
    captions: &'a [u64],
    /// This rank's pairs.
    own: Range<usize>,
    scale: f64,
    bias: f64,
}

impl All<'_> {
    fn count(&self) -> usize {
        self.captions.len()
    }

    /// Whether `column` is neither the partner of `row` nor a negative: another pair with the same caption.
    fn ignores(&self, row: usize, column: usize) -> bool {
        row != column && self.captions[row] == self.captions[column]
    }
}

/// This rank's rows of one direction.
struct Rows<'a, T> {
    /// Embeddings of all partners, (all pairs, embedding).
    partners: &'a [T],
    /// Logits (pairs, all pairs), later the gradient of the loss with respect to them.
    logits: Vec<T>,
}

impl<'a, T: Real> Rows<'a, T> {
    fn new(all: &All, own: &[T], partners: &'a [T]) -> Self {
        let (rows, columns, width) = (all.own.len(), all.count(), partners.len() / all.count());
        let mut logits = vec![T::from_f64(all.bias); rows * columns];
        let transposed = Matrix::new(partners, columns, width).t();
        gemm(&mut logits, Beta::One, all.scale, Matrix::new(own, rows, width), transposed);
        Self { partners, logits }
    }

    /// Rows whose partner has the highest logit.
    fn correct(&self, all: &All) -> usize {
        let best = |(logits, row): &(&[T], usize)| {
            let negatives = |column: &usize| column != row && !all.ignores(*row, *column);
            (0..all.count()).filter(negatives).all(|column| logits[column] < logits[*row])
        };
        self.logits.chunks_exact(all.count()).zip(all.own.clone()).filter(best).count()
    }

    /// Log-sum-exp of each row.
    fn log_sums(&self, all: &All) -> Vec<f64> {
        let rows = self.logits.par_chunks_exact(all.count()).zip(all.own.clone());
        let log_sum = |(logits, row): (&[T], usize)| {
            let counted = || logits.iter().enumerate().filter(|(column, _)| !all.ignores(row, *column));
            let max = counted().map(|(_, logit)| logit.to_f64()).fold(f64::NEG_INFINITY, f64::max);
            max + counted().map(|(_, logit)| (logit.to_f64() - max).exp()).sum::<f64>().ln()
        };
        rows.map(log_sum).collect()
    }

    /// Replaces each logit by its gradient, which `f` returns with terms to sum: of the loss, and of the gradients of the
    /// logarithm of the scale and of the bias. `f` gets the logit, its row and its column.
    fn differentiate(&mut self, all: &All, f: impl Fn(f64, usize, usize) -> (f64, [f64; 3]) + Sync) -> [f64; 3] {
        let rows = self.logits.par_chunks_exact_mut(all.count()).zip(all.own.clone());
        let row_sums = |(logits, row): (&mut [T], usize)| {
            let mut sums = [0.0; 3];
            for (column, logit) in logits.iter_mut().enumerate() {
                let (gradient, terms) = match all.ignores(row, column) {
                    true => (0.0, [0.0; 3]),
                    false => f(logit.to_f64(), row, column),
                };
                *logit = T::from_f64(gradient);
                sums = add(sums, terms);
            }
            sums
        };
        rows.map(row_sums).collect::<Vec<_>>().into_iter().fold([0.0; 3], add)
    }

    /// The gradient of this rank's embeddings, from that of their logits.
    fn embedding_gradient(self, all: &All) -> Vec<T> {
        let (rows, columns, width) = (all.own.len(), all.count(), self.partners.len() / all.count());
        let mut gradient = vec![T::ZERO; rows * width];
        let (logits, partners) = (Matrix::new(&self.logits, rows, columns), Matrix::new(self.partners, columns, width));
        gemm(&mut gradient, Beta::Zero, all.scale, logits, partners);
        gradient
    }
}

fn add(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

/// Cross-entropy of each image over all texts and of each text over all images, the mean of all of them.
fn infonce<T: Real>(all: &All, rows: &mut [Rows<T>; 2], group: &Group) -> Result<[f64; 3]> {
    let ours = [rows[0].log_sums(all), rows[1].log_sums(all)];
    let of_all = [gathered(group, &ours[0])?, gathered(group, &ours[1])?];
    let weight = 0.5 / all.count() as f64;
    let mut sums = [0.0; 3];
    for (direction, rows) in rows.iter_mut().enumerate() {
        let (ours, theirs) = (&of_all[direction], &of_all[1 - direction]);
        let terms = rows.differentiate(all, |logit, row, column| {
            let partner = f64::from(row == column);
            // The logit is part of the softmax of its row, and of that of its column in the other direction.
            let in_row = weight * ((logit - ours[row]).exp() - partner);
            let in_column = weight * ((logit - theirs[column]).exp() - partner);
            let loss = partner * weight * (ours[row] - logit);
            (in_row + in_column, [loss, in_row * (logit - all.bias), 0.0])
        });
        sums = add(sums, terms);
    }
    Ok(sums)
}

/// Binary cross-entropy of each image with each text, divided by the number of images.
fn sigmoid<T: Real>(all: &All, rows: &mut [Rows<T>; 2]) -> [f64; 3] {
    let weight = 1.0 / all.count() as f64;
    let sign = |row, column| if row == column { 1.0 } else { -1.0 };
    let gradient = |logit: f64, sign: f64| -sign * weight / (1.0 + (sign * logit).exp());
    let [images, texts] = rows;
    // Both directions are the same logits: only those of the images are summed.
    texts.differentiate(all, |logit, row, column| (gradient(logit, sign(row, column)), [0.0; 3]));
    images.differentiate(all, |logit, row, column| {
        let sign = sign(row, column);
        let gradient = gradient(logit, sign);
        let loss = weight * ((-sign * logit).max(0.0) + (-logit.abs()).exp().ln_1p());
        (gradient, [loss, gradient * (logit - all.bias), gradient])
    })
}
