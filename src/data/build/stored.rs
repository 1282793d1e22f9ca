//! Sources that have samples already: folders of images, tar shards, and img2dataset's shards with their parquet files.

use super::{
    emit::Emit,
    reader::{Reader, update},
    row::{Image, Row},
    seen::Seen,
};
use crate::{
    config,
    data::{
        bad::{Bad, BadCounts, Cause},
        dataset::Source,
        paths,
        record::IMAGE_EXTENSIONS,
        shard::Shard,
        table::Table,
    },
    error::{Context, Hint, Result},
};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

pub struct Stored {
    source: Arc<Source>,
    /// Parquet files of img2dataset whose shard is missing.
    without_shard: Vec<PathBuf>,
    /// Files that belong to no sample.
    ignored: BadCounts,
}

impl Stored {
    /// # Errors
    /// Nothing was found, or a parquet file beside a shard is damaged.
    pub fn open(source: &str, cache: &config::Data) -> Result<Self> {
        let opened = Arc::new(Source::open_with(source, 1.0, cache)?);
        let mut stored = Self { source: opened, without_shard: Vec::new(), ignored: BadCounts::default() };
        let tables = stored.tables();
        let root = Path::new(source);
        let files = if root.is_dir() { paths::files(root)? } else { Vec::new() };
        if tables.is_empty() {
            stored.ignored = stored.source.ignored.clone();
            texts_without_image(&files).into_iter().for_each(|bad| stored.ignored.add(bad));
        } else {
            let missing = |path: &&PathBuf| is_numbered(path) && !path.with_extension("tar").exists();
            stored.without_shard = files.iter().filter(missing).cloned().collect();
        }
        // A file that was cut is found before anything is written.
        for path in stored.files() {
            let message = format!("{} is damaged", path.display());
            Table::open(&path).hint(message, "copy it again, or remove it: the shards alone can be built too")?;
        }
        Ok(stored)
    }

    /// The parquet files that img2dataset writes beside its shards.
    fn tables(&self) -> Vec<PathBuf> {
        let tables = self.source.shards.iter().map(table_of);
        tables.filter(|table| table.is_file()).collect()
    }
}

fn table_of(shard: &Shard) -> PathBuf {
    shard.path.with_extension("parquet")
}

/// Whether a file is named as img2dataset names its tables: `00012.parquet`.
fn is_numbered(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    path.extension().is_some_and(|extension| extension == "parquet") && stem.bytes().all(|byte| byte.is_ascii_digit())
}

/// The text files of a folder of images that have no image beside them.
fn texts_without_image(files: &[PathBuf]) -> Vec<Bad> {
    let lower = |path: &Path| path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let is_image = |path: &&PathBuf| IMAGE_EXTENSIONS.contains(&lower(path).as_str());
    let images: HashSet<PathBuf> = files.iter().filter(is_image).map(|path| path.with_extension("")).collect();
    let texts = files.iter().filter(|path| !images.is_empty() && lower(path) == "txt");
    let alone = texts.filter(|path| !images.contains(&path.with_extension("")));
    alone.map(|path| Bad::new(Cause::NoImage, path.display())).collect()
}

impl Reader for Stored {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        for (shard, of_shard) in self.source.shards.iter().enumerate() {
            let table = table_of(of_shard);
            if table.is_file() {
                let keys = (0..of_shard.len() as usize).filter_map(|sample| of_shard.key(sample).ok());
                check_table(&table, &keys.collect(), rows)?;
            }
            for sample in 0..of_shard.len() as usize {
                let image = Image::Stored { source: self.source.clone(), shard, sample };
                rows.row(Ok(Row { image, ..Row::default() }))?;
            }
        }
        self.without_shard.iter().try_for_each(|table| check_table(table, &HashSet::new(), rows))?;
        rows.ignored(self.ignored.clone())?;
        rows.damages(self.source.damage())
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files = self.tables();
        files.extend(self.without_shard.iter().cloned());
        files
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

/// Counts the rows of img2dataset's parquet file that have no sample: their image could not be downloaded, their key
/// occurs twice, or they are not among the `keys` of the shard.
fn check_table(path: &Path, keys: &HashSet<String>, rows: &mut Emit) -> Result<()> {
    let (mut table, mut seen) = (Table::open(path)?, Seen::default());
    let (shown, shard) = (path.display(), path.with_extension("tar"));
    while let Some(batch) = table.next_batch()? {
        for row in (0..batch.len()).filter_map(|index| batch.get(index).ok()) {
            let text = |column| row.text(column).ok().flatten().unwrap_or_default();
            let (status, key, error) = (text("status"), text("key"), text("error_message"));
            let bad = if !status.is_empty() && status != "success" {
                Bad::new(Cause::NoImage, format_args!("{shown}: {key}: {status}: {error}"))
            } else if key.is_empty() {
                continue;
            } else if !seen.is_new(&key) {
                Bad::new(Cause::Duplicate, format_args!("{shown}: {key}"))
            } else if !keys.contains(key.as_ref()) {
                Bad::new(Cause::NoImage, format_args!("{shown}: {key}: not in {}", shard.display()))
            } else {
                continue;
            };
            rows.damage(bad)?;
        }
    }
    Ok(())
}
