//! Recall of image-to-text and text-to-image retrieval, as Chinese-CLIP's evaluation reports it: all captions of an image
//! count as right, and so do captions equal to one of them.

use super::{super::Rate, super::choose, Samples};
use crate::{
    error::{Context, Result, ensure, usage},
    generate::Matching,
};
use candle_core::Tensor;
use rayon::prelude::*;
use serde::Serialize;

/// Queries whose cosines with all answers are in memory together.
const QUERIES: usize = 256;

/// Recall in both directions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Retrieval {
    pub images: usize,
    /// Captions; one that several images share counts once for each.
    pub captions: usize,
    pub image_to_text: Recall,
    pub text_to_image: Recall,
    /// Mean of the six recalls.
    pub mean_recall: f64,
}

/// Recall of one direction: a right answer is among the first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recall {
    pub r1: Rate,
    pub r5: Rate,
    pub r10: Rate,
    /// Mean of the three.
    pub mean_recall: f64,
}

/// Share of samples whose partner has the highest cosine in a group of `candidates` samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Candidates {
    pub candidates: usize,
    pub chance: f64,
    pub image_to_text: Rate,
    pub text_to_image: Rate,
}

/// Recall over all samples.
///
/// # Errors
/// The samples have no captions.
pub fn retrieval(samples: &Samples) -> Result<Retrieval> {
    let texts = samples.texts()?;
    let mut images_of = vec![Vec::new(); texts.dim(0)?];
    for (image, captions) in samples.captions.iter().enumerate() {
        for row in captions {
            images_of.get_mut(*row).context("a caption without an embedding")?.push(image);
        }
    }
    let shared: Vec<usize> = images_of.iter().map(Vec::len).collect();
    let ones = vec![1; samples.captions.len()];
    let image_to_text = recall(&ranks(&samples.images, texts, &samples.captions, &shared)?, &ones);
    let text_to_image = recall(&ranks(texts, &samples.images, &images_of, &ones)?, &shared);
    Ok(Retrieval {
        images: samples.captions.len(),
        captions: shared.iter().sum(),
        mean_recall: (image_to_text.mean_recall + text_to_image.mean_recall) / 2.0,
        image_to_text,
        text_to_image,
    })
}

/// The rank of the best right answer of each query, counted from 1: ties count against it. An answer takes `counts`
/// places.
fn ranks(queries: &Tensor, answers: &Tensor, right: &[Vec<usize>], counts: &[usize]) -> Result<Vec<usize>> {
    let mut ranks = Vec::with_capacity(right.len());
    let total = queries.dim(0)?;
    for start in (0..total).step_by(QUERIES) {
        let length = QUERIES.min(total - start);
        let cosines = Matching::cosines(&queries.narrow(0, start, length)?, answers)?.to_vec2::<f32>()?;
        let rank = |(cosines, right): (&Vec<f32>, &Vec<usize>)| {
            let best =
                right.iter().filter_map(|answer| cosines.get(*answer)).copied().fold(f32::NEG_INFINITY, f32::max);
            let before = cosines.iter().zip(counts).enumerate();
            let before = before.filter(|(answer, (cosine, _))| **cosine >= best && !right.contains(answer));
            1 + before.map(|(_, (_, count))| count).sum::<usize>()
        };
        let right = right.get(start..start + length).unwrap_or_default();
        ranks.extend(cosines.par_iter().zip(right).map(rank).collect::<Vec<_>>());
    }
    Ok(ranks)
}

/// Recall of queries that count `weights` times.
fn recall(ranks: &[usize], weights: &[usize]) -> Recall {
    let all = weights.iter().sum();
    let among = |first: usize| {
        let hits = ranks.iter().zip(weights).filter(|(rank, _)| **rank <= first).map(|(_, weight)| weight).sum();
        Rate::new(hits, all)
    };
    let [r1, r5, r10] = [1, 5, 10].map(among);
    Recall { r1, r5, r10, mean_recall: (r1.rate + r5.rate + r10.rate) / 3.0 }
}

/// R@1 among the samples of a group: consecutive `count` samples of an order that `seed` chooses. Each sample has its
/// first caption; a caption that belongs to the image is not counted against it. An incomplete group is left out.
///
/// # Errors
/// There are fewer than `count` samples.
pub fn among_candidates(samples: &Samples, count: usize, seed: u64) -> Result<Candidates> {
    let total = samples.captions.len();
    let message = format!("--candidates {count} is not from 2 to the number of samples, {total}");
    ensure!((2..=total).contains(&count), usage(message, "lower --candidates, or give more data"));
    let order = choose(total, total, seed, "matcher candidates", 0);
    let (mut of_images, mut of_texts, mut tries) = (0, 0, 0);
    for group in order.chunks_exact(count) {
        let captions = group.iter().map(|sample| samples.first_caption(*sample)).collect::<Result<Vec<_>>>()?;
        let index = |rows: &[usize]| {
            Tensor::from_vec(
                rows.iter().map(|row| *row as u32).collect::<Vec<_>>(),
                rows.len(),
                samples.images.device(),
            )
        };
        let images = samples.images.index_select(&index(group)?, 0)?;
        let texts = samples.texts()?.index_select(&index(&captions)?, 0)?;
        let wins = |cosines: &[f32], own: usize, also_right: &dyn Fn(usize) -> bool| {
            let best = cosines.get(own).copied().unwrap_or(f32::NEG_INFINITY);
            cosines.iter().enumerate().all(|(i, cosine)| i == own || *cosine < best || also_right(i))
        };
        let rows = Matching::cosines(&images, &texts)?.to_vec2::<f32>()?;
        let columns = Matching::cosines(&texts, &images)?.to_vec2::<f32>()?;
        for (own, ((image, caption), (row, column))) in
            group.iter().zip(&captions).zip(rows.iter().zip(&columns)).enumerate()
        {
            let text_is_right = |i: usize| captions.get(i).is_some_and(|other| samples.has(*image, *other));
            let image_is_right = |i: usize| group.get(i).is_some_and(|other| samples.has(*other, *caption));
            of_images += usize::from(wins(row, own, &text_is_right));
            of_texts += usize::from(wins(column, own, &image_is_right));
        }
        tries += count;
    }
    Ok(Candidates {
        candidates: count,
        chance: 1.0 / count as f64,
        image_to_text: Rate::new(of_images, tries),
        text_to_image: Rate::new(of_texts, tries),
    })
}
