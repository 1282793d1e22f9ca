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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use candle_core::Device;

    /// Random samples; the captions of an image are one to three of `texts`.
    fn samples(images: usize, texts: usize) -> Samples {
        let mut random = Random::keyed(5, "retrieval", 0, 0);
        let mut tensor = |rows: usize| {
            let values: Vec<f32> = (0..rows * 6).map(|_| random.normal() as f32).collect();
            let tensor = Tensor::from_vec(values, (rows, 6), &Device::Cpu).unwrap();
            tensor.broadcast_div(&tensor.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap()).unwrap()
        };
        let (image_rows, text_rows) = (tensor(images), tensor(texts));
        let captions = (0..images).map(|i| (0..1 + i % 3).map(|j| (i + j * j) % texts).collect()).collect();
        Samples { images: image_rows, texts: Some(text_rows), captions, labels: vec![None; images] }
    }

    #[test]
    fn recall_is_that_of_sorted_lists() {
        let samples = samples(21, 10);
        let found = retrieval(&samples).unwrap();
        let cosines = Matching::cosines(&samples.images, samples.texts().unwrap()).unwrap().to_vec2::<f32>().unwrap();
        // Each caption of each image, as the lines of Chinese-CLIP's files.
        let lines: Vec<usize> = samples.captions.iter().flatten().copied().collect();
        assert_eq!((found.images, found.captions), (21, lines.len()));
        for (first, rates) in [
            (1, [&found.image_to_text.r1, &found.text_to_image.r1]),
            (5, [&found.image_to_text.r5, &found.text_to_image.r5]),
            (10, [&found.image_to_text.r10, &found.text_to_image.r10]),
        ] {
            let of_image = |image: &usize| {
                let mut sorted = lines.clone();
                sorted.sort_by(|a, b| cosines[*image][*b].total_cmp(&cosines[*image][*a]));
                sorted[..first].iter().any(|text| samples.has(*image, *text))
            };
            let of_text = |text: &&usize| {
                let mut sorted: Vec<usize> = (0..21).collect();
                sorted.sort_by(|a, b| cosines[*b][**text].total_cmp(&cosines[*a][**text]));
                sorted[..first].iter().any(|image| samples.has(*image, **text))
            };
            let hits = [(0..21).filter(of_image).count(), lines.iter().filter(of_text).count()];
            assert_eq!(rates.map(|rate| rate.hits), hits, "{first}");
            assert_eq!(rates.map(|rate| rate.of), [21, lines.len()]);
        }
    }

    #[test]
    fn candidates_are_groups_and_equal_captions_are_right() {
        let mut samples = samples(21, 10);
        let all = among_candidates(&samples, 21, 3).unwrap();
        let few = among_candidates(&samples, 4, 3).unwrap();
        assert_eq!((all.image_to_text.of, few.image_to_text.of, few.chance), (21, 20, 0.25));
        assert!(few.image_to_text.hits >= all.image_to_text.hits);
        assert_eq!(few, among_candidates(&samples, 4, 3).unwrap());
        assert!(among_candidates(&samples, 22, 3).is_err() && among_candidates(&samples, 1, 3).is_err());
        samples.captions.iter_mut().for_each(|captions| *captions = vec![0]);
        let same = among_candidates(&samples, 7, 3).unwrap();
        assert_eq!((same.image_to_text.rate, same.text_to_image.rate), (1.0, 1.0));
    }

    #[test]
    fn ties_count_against_the_model() {
        let mut samples = samples(6, 6);
        samples.images = Tensor::ones((6, 6), candle_core::DType::F32, &Device::Cpu).unwrap();
        samples.texts = Some(samples.images.clone());
        samples.captions = (0..6).map(|i| vec![i]).collect();
        let found = retrieval(&samples).unwrap();
        assert_eq!((found.image_to_text.r5.hits, found.image_to_text.r10.hits), (0, 6));
        assert_eq!(among_candidates(&samples, 2, 0).unwrap().image_to_text.hits, 0);
    }
}
