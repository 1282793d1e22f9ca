//! Embeddings of the images and captions of a shard, in two files beside it:
//!
//! - `NAME.tar.embeddings.npy`: f32 (samples, 2, embedding), in the order of the shard's samples: image, first caption.
//!   The row of a bad sample is NaN.
//! - `NAME.tar.embeddings.json`: what they were made from, and the keys of the samples.
//!
//! For the images of a folder, `NAME.tar` is `images`, in that folder.

use super::{bad::BadCounts, numpy, output::write_whole, paths::EMBEDDINGS, shard::Shard};
use crate::{
    bounded_read,
    error::{Context, Result, ensure},
};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    fs::File,
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Maximum size of a record in bytes.
const MAX_RECORD: u64 = 256 << 20;
const FORMAT: u32 = 1;

/// Embeddings of images and of texts, (count, embedding) each, of length 1.
pub type Embed<'a> = dyn Fn(&[RgbImage], &[String]) -> Result<[Vec<f32>; 2]> + Sync + 'a;

/// A model that embeds images and texts. It is passed down from a floor that knows models.
pub struct PairEmbedder<'a> {
    /// Digest of what makes its embeddings.
    pub digest: String,
    /// Side length of the images that it gets, in pixels.
    pub image_size: u32,
    /// Numbers of an embedding.
    pub embedding: usize,
    /// Folder of the stored embeddings; `None`: beside the shards.
    pub folder: Option<PathBuf>,
    pub embed: &'a Embed<'a>,
}

impl PairEmbedder<'_> {
    /// The cosine of each image and the text of the same number.
    ///
    /// # Errors
    /// An embedding is not finite.
    pub fn cosines(&self, images: &[RgbImage], texts: &[String]) -> Result<Vec<f64>> {
        let [images, texts] = (self.embed)(images, texts)?;
        let width = self.embedding.max(1);
        Ok(images.chunks_exact(width).zip(texts.chunks_exact(width)).map(|(image, text)| dot(image, text)).collect())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// What embeddings were made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// False while the embeddings are being written: the file is then ours but of no use.
    pub complete: bool,
    /// Digest of the shard's samples, sizes and modification times.
    pub shard: String,
    /// Digest of what makes the model's embeddings.
    pub matcher: String,
    pub samples: u64,
    pub embedding: usize,
    /// The samples whose rows are NaN.
    pub bad: BadCounts,
    /// The key of each sample; empty where it is unknown.
    pub keys: Vec<String>,
}

impl Record {
    /// The record of embeddings that are being written.
    ///
    /// # Errors
    /// The shard can no longer be read.
    pub fn new(shard: &Shard, matcher: &str, embedding: usize) -> Result<Self> {
        Ok(Self {
            format: FORMAT,
            complete: false,
            shard: shard.digest(true)?.to_hex().to_string(),
            matcher: matcher.to_owned(),
            samples: shard.len(),
            embedding,
            bad: BadCounts::default(),
            keys: Vec::new(),
        })
    }

    /// Reads a record; `None` if there is none, or the file is something else.
    pub fn read(path: &Path) -> Option<Self> {
        let record: Self = serde_json::from_slice(&bounded_read::read(path, MAX_RECORD).ok()?).ok()?;
        (record.format == FORMAT).then_some(record)
    }

    /// Writes the record atomically.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let write = |file: &mut BufWriter<File>| Ok(serde_json::to_writer(file, self).map(|()| true)?);
        write_whole(path, write).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether these are finished embeddings of the same samples by the same model.
    pub fn is_of(&self, wanted: &Self) -> bool {
        let Self { shard, matcher, samples, embedding, .. } = self;
        let same = (shard, matcher, samples, embedding)
            == (&wanted.shard, &wanted.matcher, &wanted.samples, &wanted.embedding);
        self.complete && same
    }
}

/// The files of a shard's embeddings, the array and its record: in `folder`, or beside the shard.
pub fn paths(shard: &Shard, folder: Option<&Path>) -> [PathBuf; 2] {
    let base = match folder {
        Some(folder) => folder.join(&shard.name),
        None if shard.path.is_dir() => shard.path.join("images"),
        None => shard.path.clone(),
    };
    EMBEDDINGS.map(|ending| {
        let mut name: OsString = base.clone().into_os_string();
        name.push(ending);
        name.into()
    })
}

/// The header of the array.
fn header(samples: u64, embedding: usize) -> Vec<u8> {
    numpy::header("<f4", &[samples as usize, 2, embedding])
}

/// Writes the array of embeddings row by row.
pub struct ArrayWriter<'a, W> {
    out: &'a mut W,
    embedding: usize,
}

impl<'a, W: Write> ArrayWriter<'a, W> {
    /// Writes the header.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(out: &'a mut W, samples: u64, embedding: usize) -> Result<Self> {
        out.write_all(&header(samples, embedding))?;
        Ok(Self { out, embedding })
    }

    /// Writes the embeddings of the image and the caption of a sample; `None`: of a bad sample.
    ///
    /// # Errors
    /// The embeddings have another size, or the file cannot be written.
    pub fn row(&mut self, pair: Option<[&[f32]; 2]>) -> Result<()> {
        let nan = vec![f32::NAN; self.embedding];
        for values in pair.unwrap_or([&nan; 2]) {
            ensure!(values.len() == self.embedding, "{} numbers in an embedding of {}", values.len(), self.embedding);
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// Finished embeddings of a shard, read row by row.
#[derive(Debug)]
pub struct StoredEmbeddings {
    file: File,
    start: u64,
    embedding: usize,
}

impl StoredEmbeddings {
    /// The stored embeddings of a shard by this model; `None` if there are none, or the shard has changed since.
    pub fn open(shard: &Shard, matcher: &PairEmbedder<'_>) -> Option<Self> {
        let [array, record] = paths(shard, matcher.folder.as_deref());
        let (record, embedding) = (Record::read(&record)?, matcher.embedding);
        if !record.is_of(&Record::new(shard, &matcher.digest, embedding).ok()?) {
            return None;
        }
        let file = bounded_read::open(&array).ok()?;
        let expected = header(record.samples, embedding);
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, 0).ok()?;
        let start = expected.len() as u64;
        let length = start + record.samples * 8 * embedding as u64;
        (found == expected && file.metadata().ok()?.len() == length).then_some(Self { file, start, embedding })
    }

    /// The cosine of the image and the first caption of a sample; `None` for a bad sample.
    pub fn cosine(&self, sample: usize) -> Option<f64> {
        let mut bytes = vec![0; 8 * self.embedding];
        let start = self.start + sample as u64 * bytes.len() as u64;
        self.file.read_exact_at(&mut bytes, start).ok()?;
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let (image, text) = numbers.split_at(self.embedding);
        Some(dot(image, text)).filter(|cosine| cosine.is_finite())
    }
}
