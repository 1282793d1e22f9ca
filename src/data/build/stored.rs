//! Sources that have samples already: folders of images, tar shards, and img2dataset's shards with their parquet files.

use super::{emit::Emit, reader::Reader, row::Image, row::Row};
use crate::{data::dataset::Source, error::Result};
use std::{path::PathBuf, sync::Arc};

pub struct Stored {
    pub source: Arc<Source>,
}

impl Stored {
    /// # Errors
    /// Nothing was found.
    pub fn open(source: &str) -> Result<Self> {
        Ok(Self { source: Arc::new(Source::open(source, 1.0)?) })
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
        rows.damages(self.source.damage())
    }

    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.source.shards {
            hasher.update(shard.digest(true)?.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}
