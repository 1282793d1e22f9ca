//! One shard: compared with what an earlier run left, else its images are read and checked in parallel and written.

use super::{
    Report,
    emit::{Message, Numbered},
    reader::update,
    row::{Image, Sample, json, load},
    settings::{Keys, Settings},
    stats_path,
};
use crate::{
    bounded_read,
    data::{
        bad::{Bad, BadCounts},
        output::{MadeFrom, Standing, append, write_whole},
    },
    error::{Context, Result},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    io::Write,
    path::Path,
    sync::mpsc::{Receiver, sync_channel},
    thread,
};
use tar::Builder;

/// The counts of a shard, stored beside it so that a resumed build reports the same.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    rows: u64,
    samples: u64,
    bad: BadCounts,
    ignored: BadCounts,
}

impl Stats {
    /// `None` if there is no such file or another tool wrote it.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&bounded_read::read(path, bounded_read::TEXT).ok()?).ok()
    }

    fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)?;
        write_whole(path, |file| Ok(file.write_all(&text).map(|()| true)?))
    }

    fn add_to(self, report: &mut Report) {
        report.rows += self.rows;
        report.samples += self.samples;
        report.bad.merge(self.bad);
        report.ignored.merge(self.ignored);
    }
}

/// The batches of rows that a source sends, shard by shard.
pub struct Incoming {
    messages: Receiver<Message>,
    ended: bool,
    /// Damage that belongs to no row.
    pub damage: BadCounts,
    /// Files that belong to no row.
    pub ignored: BadCounts,
}

impl Incoming {
    pub fn new(messages: Receiver<Message>) -> Self {
        Self { messages, ended: false, damage: BadCounts::default(), ignored: BadCounts::default() }
    }

    /// The next batch of the current shard; `None` at its end, and at the end of the source.
    ///
    /// # Errors
    /// The source cannot be read further.
    pub fn next_batch(&mut self) -> Result<Option<Vec<Numbered>>> {
        while !self.ended {
            match self.messages.recv() {
                Ok(Message::Rows(rows)) => return Ok(Some(rows)),
                Ok(Message::Damage(counts)) => self.damage.merge(counts),
                Ok(Message::Ignored(counts)) => self.ignored.merge(counts),
                Ok(Message::Failed(error)) => return Err(error),
                Ok(Message::EndOfShard) | Err(_) => self.ended = true,
            }
        }
        Ok(None)
    }

    /// Continues with the next shard.
    pub fn begin_shard(&mut self) {
        self.ended = false;
    }
}

type Loaded = Vec<(u64, Result<Sample, Bad>)>;

pub struct Shard<'a> {
    pub path: &'a Path,
    pub keys: Keys,
    /// Whether rows contain their images, so that they are not held in memory together.
    pub embedded: bool,
}

impl Shard<'_> {
    /// Builds the shard that begins with the batch `first`, unless it is finished.
    ///
    /// # Errors
    /// The source cannot be read further, or the shard cannot be written.
    pub fn build(
        &self,
        first: Vec<Numbered>,
        incoming: &mut Incoming,
        made_from: &MadeFrom<Settings>,
        report: &mut Report,
        progress: &impl Fn(u64),
    ) -> Result<()> {
        if self.embedded {
            // The digest of the source covers the images.
            if Standing::of(self.path, made_from)? == Standing::Finished {
                let mut rows = first.len() as u64;
                while let Some(batch) = incoming.next_batch()? {
                    rows += batch.len() as u64;
                }
                self.keep(rows, report, progress);
                return Ok(());
            }
            let rest = std::iter::from_fn(|| incoming.next_batch().transpose());
            return self.write(std::iter::once(Ok(first)).chain(rest), made_from, report, progress);
        }
        let mut batches = vec![first];
        while let Some(batch) = incoming.next_batch()? {
            batches.push(batch);
        }
        let recipe = Settings { images: images_digest(&batches), ..made_from.recipe.clone() };
        let made_from = MadeFrom { recipe, ..made_from.clone() };
        if Standing::of(self.path, &made_from)? == Standing::Finished {
            self.keep(batches.iter().map(|batch| batch.len() as u64).sum(), report, progress);
            return Ok(());
        }
        self.write(batches.into_iter().map(Ok), &made_from, report, progress)
    }

    fn keep(&self, rows: u64, report: &mut Report, progress: &impl Fn(u64)) {
        report.skipped_shards += 1;
        progress(rows);
        // Without its counts, a shard still counts as finished.
        Stats::read(&stats_path(self.path)).unwrap_or_else(|| Stats { rows, ..Stats::default() }).add_to(report);
    }

    fn write(
        &self,
        batches: impl Iterator<Item = Result<Vec<Numbered>>> + Send,
        made_from: &MadeFrom<Settings>,
        report: &mut Report,
        progress: &impl Fn(u64),
    ) -> Result<()> {
        let mut stats = Stats::default();
        let write = |file: &mut std::io::BufWriter<std::fs::File>| -> Result<bool> {
            thread::scope(|scope| -> Result<()> {
                // The next batch is read and checked while the current one is written.
                let (sender, loaded) = sync_channel::<Result<Loaded>>(1);
                scope.spawn(move || {
                    for batch in batches {
                        let batch =
                            batch.map(|rows| rows.into_par_iter().map(|row| (row.number, row.row.and_then(load))));
                        // The writer stopped with an error.
                        if sender.send(batch.map(|rows| rows.collect())).is_err() {
                            return;
                        }
                    }
                });
                let mut tar = Builder::new(file);
                made_from.write(&mut tar)?;
                let mut taken = HashSet::new();
                for batch in loaded {
                    let batch = batch?;
                    progress(batch.len() as u64);
                    for (number, sample) in batch {
                        stats.rows += 1;
                        match sample.and_then(|sample| self.member_files(number, sample, &mut taken)) {
                            Ok(sample) => sample.append(&mut tar, &mut stats)?,
                            Err(bad) => stats.bad.add(bad),
                        }
                    }
                }
                // Rows of a shard that was not downloaded are not lost.
                stats.bad.check_fetched()?;
                tar.finish()?;
                Ok(())
            })?;
            if stats.samples > 0 {
                stats.write(&stats_path(self.path))?;
            }
            Ok(stats.samples > 0)
        };
        write_whole(self.path, write).with_context(|| format!("cannot write {}", self.path.display()))?;
        *if stats.samples > 0 { &mut report.shards } else { &mut report.unusable_shards } += 1;
        stats.add_to(report);
        Ok(())
    }

    /// Names a sample and writes its text and JSON.
    fn member_files(&self, number: u64, sample: Sample, taken: &mut HashSet<String>) -> Result<MemberFiles, Bad> {
        let Sample { id, image, extension, captions, mut fields, ignored } = sample;
        let mut key = format!("{number:09}");
        match (self.keys, &id) {
            (Keys::Number, Some(id)) => {
                fields.entry("source_key").or_insert_with(|| id.as_str().into());
            }
            (Keys::Id, Some(id)) => {
                let plain = plain_key(id);
                let plain = if taken.contains(&plain) { format!("{plain}_{key}") } else { plain };
                key = if plain.is_empty() { key } else { plain };
                taken.insert(key.clone());
            }
            (_, None) => {}
        }
        let json = json(fields, &key, &captions)?;
        Ok(MemberFiles { key, image, extension, caption: captions.into_iter().next(), json, ignored })
    }
}

/// A key for an id: a key has no dots, because it ends at the first one.
fn plain_key(id: &str) -> String {
    id.trim_matches('/').replace(|c: char| c == '.' || c.is_control(), "_")
}

/// The files of a sample.
struct MemberFiles {
    key: String,
    image: Vec<u8>,
    extension: &'static str,
    caption: Option<String>,
    json: Vec<u8>,
    ignored: Option<Bad>,
}

impl MemberFiles {
    fn append(self, tar: &mut Builder<impl Write>, stats: &mut Stats) -> Result<()> {
        let name = |extension| format!("{}.{extension}", self.key);
        append(tar, &name(self.extension), &self.image)?;
        if let Some(caption) = &self.caption {
            append(tar, &name("txt"), caption.as_bytes())?;
        }
        append(tar, &name("json"), &self.json)?;
        stats.samples += 1;
        self.ignored.into_iter().for_each(|bad| stats.ignored.add(bad));
        Ok(())
    }
}

/// Digest of the separate image files of a shard. Missing files count too: once they are there, the shard is built again.
fn images_digest(batches: &[Vec<Numbered>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for Numbered { number, row } in batches.iter().flatten() {
        if let Ok(row) = row
            && let Image::File { path, name } = &row.image
        {
            hasher.update(&number.to_le_bytes()).update(name.as_bytes()).update(&[0]);
            // An unreadable file is a bad row.
            let _ = update(&mut hasher, path);
        }
    }
    hasher.finalize().to_hex().to_string()
}
