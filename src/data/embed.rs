//! Embeds the images and captions of shards. Embeddings are computed once; filters with any threshold then need no images.

use super::{
    bad::{Bad, BadCounts},
    dataset::Source,
    embeddings::{ArrayWriter, PairEmbedder, Record, paths},
    output::{Lock, remove_leftovers, write_whole},
    record::Kind,
    shard::Shard,
};
use crate::error::{Context, Hint, Result, ensure, failed};
use image::RgbImage;
use rayon::prelude::*;
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
};

/// The result of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Number of shards that an earlier run finished and that are unchanged.
    pub skipped_shards: u64,
    /// Number of shards whose embeddings were written.
    pub shards: u64,
    /// Number of samples written, without bad ones.
    pub samples: u64,
    /// Samples whose rows are NaN, and damage of the shards.
    pub bad: BadCounts,
}

/// Embeds shards, beside which the embeddings are written.
pub struct Embedder<'a> {
    pub matcher: PairEmbedder<'a>,
    /// Batch size in samples.
    pub batch_size: usize,
    /// Maximum share of bad samples; above it the run ends with an error.
    pub max_bad_ratio: f64,
    /// Rank of this process: it embeds every `world_size`-th shard.
    pub rank: usize,
    pub world_size: usize,
}

type Pair = (String, Result<(RgbImage, String), Bad>);

impl Embedder<'_> {
    /// Embeds this rank's shards of all sources; `progress` is called with the number of samples of each finished batch.
    ///
    /// # Errors
    /// A file beside a shard is not one of ours or cannot be written, another process embeds the same shard, too many
    /// samples are bad, or an embedding is not finite.
    pub fn run(&self, sources: &[Source], progress: impl Fn(u64)) -> Result<Report> {
        let shards: Vec<&Shard> = sources.iter().flat_map(|source| &source.shards).collect();
        if let Some(folder) = &self.matcher.folder {
            let mut names = BTreeSet::new();
            for shard in &shards {
                let twice = || {
                    failed(format_args!("two shards are named {}", shard.name.display()), "embed them into two folders")
                };
                ensure!(names.insert(&shard.name), twice());
                let parent = folder.join(&shard.name).parent().map(Path::to_path_buf).unwrap_or_default();
                fs::create_dir_all(&parent)
                    .hint(format_args!("cannot create {}", parent.display()), "choose another folder with -o")?;
            }
        }
        self.own(&shards).try_for_each(|shard| check_ours(self.files(shard)))?;
        let mut report = Report::default();
        for shard in self.own(&shards) {
            report.bad.merge(shard.bad.clone());
            let wanted = Record::new(shard, &self.matcher.digest, self.matcher.embedding)?;
            let [array, record] = self.files(shard);
            if Record::read(&record).is_some_and(|record| record.is_of(&wanted)) && array.is_file() {
                report.skipped_shards += 1;
                progress(shard.len());
                continue;
            }
            let _lock = lock(&array)?;
            let _held = shard.hold_before(None)?;
            self.embed_shard(shard, wanted, &mut report, &progress)?;
        }
        Ok(report)
    }

    fn files(&self, shard: &Shard) -> [PathBuf; 2] {
        paths(shard, self.matcher.folder.as_deref())
    }

    /// The shards that this rank embeds.
    pub fn own<'s>(&self, shards: &[&'s Shard]) -> impl Iterator<Item = &'s Shard> {
        shards.iter().skip(self.rank).step_by(self.world_size).copied()
    }

    fn embed_shard(
        &self,
        shard: &Shard,
        mut record: Record,
        report: &mut Report,
        progress: &impl Fn(u64),
    ) -> Result<()> {
        let [array, record_path] = self.files(shard);
        remove_leftovers(&array);
        remove_leftovers(&record_path);
        // The record first: after an interruption it still says that the array is ours.
        record.write(&record_path)?;
        let indices: Vec<usize> = (0..shard.len() as usize).collect();
        let write = |file: &mut BufWriter<File>| -> Result<bool> {
            let mut out = ArrayWriter::new(file, shard.len(), self.matcher.embedding)?;
            for batch in indices.chunks(self.batch_size.max(1)) {
                let read: Vec<Pair> = batch.par_iter().map(|index| self.read(shard, *index)).collect();
                self.write_batch(read, &mut out, &mut record, report)?;
                progress(batch.len() as u64);
            }
            Ok(true)
        };
        write_whole(&array, write).with_context(|| format!("cannot write {}", array.display()))?;
        record.complete = true;
        record.write(&record_path)?;
        report.shards += 1;
        Ok(())
    }

    fn write_batch(
        &self,
        read: Vec<Pair>,
        out: &mut ArrayWriter<'_, BufWriter<File>>,
        record: &mut Record,
        report: &mut Report,
    ) -> Result<()> {
        let (mut images, mut texts, mut good) = (Vec::new(), Vec::new(), Vec::new());
        for (key, pair) in read {
            record.keys.push(key);
            good.push(pair.is_ok());
            match pair {
                Ok((image, text)) => {
                    images.push(image);
                    texts.push(text);
                }
                Err(bad) => {
                    record.bad.add(bad.clone());
                    report.bad.add(bad);
                }
            }
        }
        report.samples += images.len() as u64;
        report.bad.check(report.samples + report.bad.total(), self.max_bad_ratio)?;
        let [images, texts] = match images.is_empty() {
            true => [Vec::new(), Vec::new()],
            false => (self.matcher.embed)(&images, &texts)?,
        };
        let width = self.matcher.embedding.max(1);
        let mut pairs = images.chunks_exact(width).zip(texts.chunks_exact(width));
        for good in good {
            let pair = if good { Some(pairs.next().context("an embedding is missing")?) } else { None };
            out.row(pair.map(|(image, text)| [image, text]))?;
        }
        Ok(())
    }

    fn read(&self, shard: &Shard, index: usize) -> Pair {
        let kind = Kind::Resized(self.matcher.image_size);
        let (key, members) = match shard.members(index, Some(kind)) {
            Ok(found) => found,
            Err(bad) => return (String::new(), Err(bad)),
        };
        let pair = shard.parse(&key, &members, kind, None, &[]).and_then(|record| {
            let none = || Bad::new(super::bad::Cause::NoImage, &key);
            Ok((record.image.ok_or_else(none)?, record.caption))
        });
        (key, pair)
    }
}

/// Refuses to replace files that this command did not write.
fn check_ours([array, record]: [PathBuf; 2]) -> Result<()> {
    let there = |path: &Path| path.symlink_metadata().is_ok();
    let ours = Record::read(&record).is_some() || !there(&record) && !there(&array);
    let what = if there(&record) { record } else { array };
    let message = format!("{} exists and is not a file of this command", what.display());
    ensure!(ours, failed(message, "rename it, or delete it to write it again"));
    Ok(())
}

fn lock(array: &Path) -> Result<Lock> {
    let folder = array.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = format!(".{}.lock", array.file_name().unwrap_or_default().to_string_lossy());
    let busy = || format!("another process is writing {}", array.display());
    Lock::try_take(folder, &name)?.hint(busy(), "wait until it is done")
}
