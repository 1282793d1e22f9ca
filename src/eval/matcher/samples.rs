//! The embeddings of a data set, in memory.

use super::super::tell_bad;
use crate::{
    config,
    data::{Dataset, Kind, Record},
    error::{Context, Result, ensure},
    generate::Matching,
    report,
};
use candle_core::Tensor;
use rayon::prelude::*;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};

/// Samples that are in memory together.
const BATCH: usize = 128;

/// The samples of a data set with their embeddings.
#[derive(Debug)]
pub struct Samples {
    /// (images, embedding)
    pub images: Tensor,
    /// Of all different captions, (texts, embedding); none if the samples may have no captions.
    pub texts: Option<Tensor>,
    /// The captions of each image as rows of `texts`, the first caption first.
    pub captions: Vec<Vec<usize>>,
    /// The label of each image: a field of its JSON, or else the name of its folder.
    pub labels: Vec<Option<Value>>,
}

impl Samples {
    /// Reads and embeds the first `count` samples of `data` (0: all). `label` is the JSON field of the labels.
    ///
    /// # Errors
    /// The data cannot be read, no sample is usable, or an embedding is not finite.
    pub fn read(
        matching: &Matching,
        data: &[String],
        count: usize,
        with_captions: bool,
        label: Option<&str>,
    ) -> Result<Self> {
        let side = matching.image_size();
        let kind = if with_captions { Kind::Resized(side) } else { Kind::ResizedImages(side) };
        let sources = data.iter().map(|path| config::Source { path: path.clone(), weight: 1.0 }).collect();
        let dataset = Dataset::open(&config::Data { sources, ..config::Data::default() }, kind)?;
        let places = dataset.sources.iter().enumerate();
        let places = places.flat_map(|(source, samples)| (0..samples.len()).map(move |sample| (source, sample)));
        let places: Vec<(usize, u64)> = places.take(if count == 0 { usize::MAX } else { count }).collect();

        let bar = report::bar(places.len() as u64, "embedding");
        let (mut bad, mut images, mut texts) = (dataset.bad.clone(), Vec::new(), Vec::new());
        let (mut captions, mut labels, mut known) = (Vec::new(), Vec::new(), HashMap::new());
        for places in places.chunks(BATCH) {
            let read: Vec<_> = places.par_iter().map(|(source, sample)| dataset.read(*source, *sample)).collect();
            let (mut of_batch, mut new) = (Vec::new(), Vec::new());
            for result in read {
                match result {
                    Ok(record) => {
                        labels.push(label_of(&record, label));
                        let own = if with_captions { record.captions } else { Vec::new() };
                        captions.push(rows(own, &mut known, &mut new));
                        of_batch.push(record.image.context("a sample without an image")?);
                    }
                    Err(e) => bad.add(e),
                }
            }
            if !of_batch.is_empty() {
                images.push(matching.embed_images(&of_batch)?);
            }
            if !new.is_empty() {
                texts.push(matching.embed_texts(&new)?);
            }
            bar.inc(places.len() as u64);
        }
        bar.finish_and_clear();
        tell_bad(&data.join(" "), &bad, captions.len())?;
        let texts = if texts.is_empty() { None } else { Some(Tensor::cat(&texts, 0)?) };
        Ok(Self { images: Tensor::cat(&images, 0)?, texts, captions, labels })
    }

    /// The embeddings of the captions.
    ///
    /// # Errors
    /// There are none.
    pub fn texts(&self) -> Result<&Tensor> {
        self.texts.as_ref().context("the samples have no captions")
    }

    /// The first caption of a sample, as a row of [`Self::texts`].
    ///
    /// # Errors
    /// It has none.
    pub fn first_caption(&self, sample: usize) -> Result<usize> {
        self.captions.get(sample).and_then(|rows| rows.first().copied()).context("a sample without a caption")
    }

    /// Whether a caption belongs to a sample.
    pub fn has(&self, sample: usize, caption: usize) -> bool {
        self.captions.get(sample).is_some_and(|rows| rows.contains(&caption))
    }

    /// The cosine of the image of each pair with the caption of each pair, both as row numbers.
    ///
    /// # Errors
    /// There is no such row.
    pub fn cosines(&self, pairs: &[(usize, usize)]) -> Result<Vec<f64>> {
        ensure!(!pairs.is_empty(), "no pairs");
        let mut cosines = Vec::with_capacity(pairs.len());
        for pairs in pairs.chunks(4096) {
            let index = |of: fn(&(usize, usize)) -> usize| {
                let rows: Vec<u32> = pairs.iter().map(|pair| of(pair) as u32).collect();
                Tensor::from_vec(rows, pairs.len(), self.images.device())
            };
            let images = self.images.index_select(&index(|pair| pair.0)?, 0)?;
            let texts = self.texts()?.index_select(&index(|pair| pair.1)?, 0)?;
            cosines.extend((images * texts)?.sum(1)?.to_vec1::<f32>()?.into_iter().map(f64::from));
        }
        Ok(cosines)
    }
}

/// The rows of captions, each once; `new` gets those that no earlier sample has.
fn rows(captions: Vec<String>, known: &mut HashMap<String, usize>, new: &mut Vec<String>) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    let row = |caption: String| {
        let next = known.len();
        *known.entry(caption).or_insert_with_key(|caption| {
            new.push(caption.clone());
            next
        })
    };
    captions.into_iter().map(row).filter(|row| seen.insert(*row)).collect()
}

/// The JSON field `label`; without a name, the last folder of the key.
fn label_of(record: &Record, label: Option<&str>) -> Option<Value> {
    match label {
        Some(label) => record.meta.get(label).cloned(),
        None => {
            let folder = record.key.rsplit_once('/')?.0;
            Some(Value::from(folder.rsplit('/').next().unwrap_or(folder)))
        }
    }
}
