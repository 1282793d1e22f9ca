//! Builds tar shards from data sets in the formats that others write.
//!
//! A [`Reader`] sends rows, one file a format. [`Builder`] cuts them into shards of equal numbers of rows,
//! reads and checks their images in parallel, and writes each shard atomically. A row keeps its number even if it is bad, so
//! the shards do not depend on the number of threads, and a finished shard can be kept.

mod chinese_clip;
mod coco;
mod coco_cn;
mod emit;
mod fmiqa;
mod groups;
mod images;
mod json;
mod lines;
mod open;
mod reader;
mod row;
mod seen;
mod settings;
mod shard;
mod stored;
mod tables;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod twin_table_tests;
#[cfg(test)]
mod twin_tests;

pub use json::ICONV;
pub use open::{Request, guess, open};
pub use settings::{Columns, Format, Keys, Settings};

use super::{
    bad::BadCounts,
    index,
    output::{Lock, MadeFrom, remove_leftovers},
    paths,
};
use crate::{
    data::remote::{is_remote, shown},
    error::{Hint, Result, ensure, failed},
};
use emit::{Emit, Message};
use reader::Reader;
use serde::Serialize;
use shard::{Incoming, Stats};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::sync_channel,
    thread,
};

/// The result of a build.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Number of rows of the source.
    pub rows: u64,
    /// Number of samples in all shards, those of earlier runs included.
    pub samples: u64,
    /// Number of shards written.
    pub shards: u64,
    /// Number of shards that an earlier run finished.
    pub skipped_shards: u64,
    /// Number of shards without a usable row; nothing was written for them.
    pub unusable_shards: u64,
    /// Rows that were left out, and damage that belongs to no row.
    pub bad: BadCounts,
    /// Damaged JSON of samples that were written, and files that belong to no sample.
    pub ignored: BadCounts,
}

/// Writes the rows of a source as shards `00000.tar`, `00001.tar`, …, each with its `00000_stats.json`.
pub struct Builder {
    pub reader: Box<dyn Reader>,
    /// The source as the user named it.
    pub source: PathBuf,
    pub output: PathBuf,
    pub settings: Settings,
}

impl Builder {
    /// Builds all shards that are missing. `progress` is called with the number of rows of each finished batch.
    ///
    /// # Errors
    /// The source cannot be read; the output folder is locked, or it has shards of another source, of an earlier state of
    /// this one, or with other settings; a file cannot be written.
    pub fn run(&self, progress: impl Fn(u64)) -> Result<Report> {
        let cannot = || format!("cannot create {}", self.output.display());
        fs::create_dir_all(&self.output).hint(cannot(), "choose another folder with -o")?;
        let lock = Lock::take(&self.output)?;
        let made_from = self.made_from()?;
        self.check_output(&made_from)?;
        let (sender, messages) = sync_channel::<Message>(2);
        let mut report = Report::default();
        thread::scope(|scope| -> Result<()> {
            scope.spawn(|| {
                let mut rows = Emit::new(sender, self.settings.samples);
                if let Err(error) = self.reader.read(&mut rows).and_then(|()| rows.finish()) {
                    rows.fail(error);
                }
            });
            let mut incoming = Incoming::new(messages);
            for number in 0.. {
                let Some(first) = incoming.next_batch()? else { break };
                let path = self.output.join(format!("{number:05}.tar"));
                if lock.is_held() {
                    remove_leftovers(&path);
                    remove_leftovers(&stats_path(&path));
                }
                let work = shard::Shard { path: &path, keys: self.settings.keys, embedded: self.reader.embedded() };
                work.build(first, &mut incoming, &made_from, &mut report, &progress)?;
                incoming.begin_shard();
            }
            report.bad.merge(incoming.damage);
            report.ignored.merge(incoming.ignored);
            Ok(())
        })?;
        let shards: Vec<PathBuf> =
            paths::files(&self.output)?.into_iter().filter(|path| is_named(path, ".tar")).collect();
        index::update(&self.output, &shards)?;
        Ok(report)
    }

    fn made_from(&self) -> Result<MadeFrom<Settings>> {
        let path = match self.source.to_str().filter(|source| is_remote(source)) {
            Some(url) => shown(url).into(),
            None => fs::canonicalize(&self.source).or_else(|_| std::path::absolute(&self.source))?,
        };
        Ok(MadeFrom { path, digest: self.reader.digest()?, recipe: self.settings.clone() })
    }

    /// Refuses a folder with shards that this source would be mixed with.
    fn check_output(&self, wanted: &MadeFrom<Settings>) -> Result<()> {
        let cannot = || format!("cannot list {}", self.output.display());
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.output).hint(cannot(), "choose another folder with -o")? {
            paths.push(entry?.path());
        }
        paths.sort();
        for path in paths.iter().filter(|path| is_named(path, ".tar")) {
            check_shard(path, wanted)?;
        }
        for path in paths.iter().filter(|path| is_named(path, "_stats.json")) {
            let message = format!("{} was not written by `vilg data build`", path.display());
            ensure!(Stats::read(path).is_some(), failed(message, "choose another folder with -o"));
        }
        Ok(())
    }
}

fn is_named(path: &Path, end: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(end))
}

fn check_shard(path: &Path, wanted: &MadeFrom<Settings>) -> Result<()> {
    let (shown, hint) = (path.display(), "choose another folder with -o, or delete this one to build it again");
    let none = || format!("{shown} was not written by `vilg data build`");
    let found = MadeFrom::<Settings>::read(path).hint(none(), "choose another folder with -o")?;
    let settings = Settings { images: wanted.recipe.images.clone(), ..found.recipe };
    if settings != wanted.recipe {
        return Err(failed(format_args!("{shown} was built with other settings"), hint));
    }
    if found.digest != wanted.digest {
        let (recorded, requested) = (found.path.display(), wanted.path.display());
        return Err(match found.path == wanted.path {
            true => failed(format_args!("{requested} has changed since {shown} was built from it"), hint),
            false => failed(format_args!("{shown} was built from {recorded}, not from {requested}"), hint),
        });
    }
    Ok(())
}

/// `00000_stats.json` of `00000.tar`.
fn stats_path(shard: &Path) -> PathBuf {
    let stem = shard.file_stem().unwrap_or_default().to_string_lossy();
    shard.with_file_name(format!("{stem}_stats.json"))
}
