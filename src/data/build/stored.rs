//! Sources that have samples already: folders of images, tar shards, and img2dataset's shards with their parquet files.

use super::{
    emit::Emit,
    reader::{Reader, update},
    row::{Image, Row},
};
use crate::{
    config,
    data::{
        bad::{Bad, Cause},
        dataset::Source,
        table::Table,
    },
    error::{Context, Result},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub struct Stored {
    source: Arc<Source>,
}

impl Stored {
    /// # Errors
    /// Nothing was found.
    pub fn open(source: &str, cache: &config::Data) -> Result<Self> {
        Ok(Self { source: Arc::new(Source::open_with(source, 1.0, cache)?) })
    }
}

impl Reader for Stored {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        for (shard, of_shard) in self.source.shards.iter().enumerate() {
            for sample in 0..of_shard.len() as usize {
                let image = Image::Stored { source: self.source.clone(), shard, sample };
                rows.row(Ok(Row { image, ..Row::default() }))?;
            }
        }
        self.files().iter().try_for_each(|table| count_failed_downloads(table, rows))?;
        rows.damages(self.source.damage())
    }

    /// The parquet files that img2dataset writes beside its shards.
    fn files(&self) -> Vec<PathBuf> {
        let tables = self.source.shards.iter().map(|shard| shard.path.with_extension("parquet"));
        tables.filter(|table| table.is_file()).collect()
    }

    fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.source.shards {
            hasher.update(shard.digest(true)?.as_bytes());
        }
        for path in self.files() {
            update(&mut hasher, &path).with_context(|| format!("cannot read the metadata of {}", path.display()))?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// Counts the rows of img2dataset's parquet file that have no sample, because their image could not be downloaded.
fn count_failed_downloads(path: &Path, rows: &mut Emit) -> Result<()> {
    let mut table = Table::open(path)?;
    while let Some(batch) = table.next_batch()? {
        for row in (0..batch.len()).filter_map(|index| batch.get(index).ok()) {
            let text = |column| row.text(column).ok().flatten().unwrap_or_default();
            let (status, key, error) = (text("status"), text("key"), text("error_message"));
            if !status.is_empty() && status != "success" {
                let place = format_args!("{}: {key}: {status}: {error}", path.display());
                rows.damage(Bad::new(Cause::NoImage, place))?;
            }
        }
    }
    Ok(())
}
