//! Tables: CSV, TSV, JSON lines and parquet, with the columns that the user names.

use super::{
    emit::Emit,
    images::Images,
    json::ICONV,
    reader::Reader,
    row::{Image, Row},
    settings::Columns,
};
use crate::{
    data::{
        bad::{Bad, BadCounts, Cause},
        table::{self, Table},
    },
    error::{Result, ensure, failed, usage},
};
use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// Usual names of the columns of images (file names or bytes) and captions, in order of preference.
const IMAGE_COLUMNS: [&str; 6] = ["image", "file_name", "image_path", "filepath", "file", "path"];
const CAPTION_COLUMNS: [&str; 4] = ["captions", "caption", "text", "title"];

/// The rows of a table.
pub struct Rows {
    path: PathBuf,
    images: Images,
    columns: Columns,
    embedded: bool,
}

impl Rows {
    /// Chooses the columns that the user did not name by their usual names.
    ///
    /// # Errors
    /// The table cannot be read, or it lacks a column.
    pub fn open(path: PathBuf, images: Images, columns: &Columns) -> Result<Self> {
        let mut table = Table::open(&path)?;
        let fixed = table.columns();
        check_unique(fixed.as_deref().unwrap_or_default(), &path)?;
        let chosen = columns.captions.iter().map(|name| (name, "--caption-column"));
        let chosen = chosen.chain(columns.image.iter().map(|name| (name, "--image-column")));
        for (name, option) in chosen.chain(columns.key.iter().map(|name| (name, "--key-column"))) {
            table.require(name, option, &path)?;
        }
        let (batch, mut damage) = (table.next_batch()?, BadCounts::default());
        let rows = batch.iter().flat_map(|rows| (0..rows.len()).map(|n| rows.get(n)));
        let first: Vec<table::Row> = rows.filter_map(|row| row.map_err(|bad| damage.add(bad)).ok()).collect();
        let names = fixed.map_or_else(|| fields(&first, &damage, columns, &path), Ok)?;
        let usual = |usual: &[&str], option: &str| {
            let found = usual.iter().find(|name| names.iter().any(|other| other == *name));
            let message = format!("{} has none of the columns {}", path.display(), usual.join(", "));
            found.map(|name| (*name).to_owned()).ok_or_else(|| {
                usage(message, format_args!("its columns are {}; choose one with {option}", names.join(", ")))
            })
        };
        let image = columns.image.clone().map_or_else(|| usual(&IMAGE_COLUMNS, "--image-column"), Ok)?;
        let captions = match &columns.captions[..] {
            [] => vec![usual(&CAPTION_COLUMNS, "--caption-column")?],
            named => named.to_vec(),
        };
        let embedded = columns.base64 || first.iter().any(|row| row.bytes(&image).is_some());
        let columns = Columns { image: Some(image), captions, ..columns.clone() };
        Ok(Self { path, images, columns, embedded })
    }

    fn row(&self, row: &table::Row) -> Result<Row, Bad> {
        let mut captions = Vec::new();
        for column in &self.columns.captions {
            captions.extend(row.texts(column)?.into_iter().map(Cow::into_owned));
        }
        let key = self.columns.key.as_ref().map(|column| row.text(column)).transpose()?.flatten();
        let image = self.columns.image.as_ref().map_or(Ok(Image::Missing), |column| self.image(row, column))?;
        let mut fields = row.fields();
        for column in self.columns.captions.iter().chain(&self.columns.image).chain(&self.columns.key) {
            fields.remove(column);
        }
        Ok(Row { id: key.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty()), image, captions, fields })
    }

    fn image(&self, row: &table::Row, column: &str) -> Result<Image, Bad> {
        if let Some(bytes) = row.bytes(column) {
            return Ok(Image::Bytes(bytes.to_vec()));
        }
        let Some(text) = row.text(column)? else { return Ok(Image::Missing) };
        match text.trim() {
            "" => Ok(Image::Missing),
            text if self.columns.base64 => Ok(Image::Base64(text.to_owned())),
            name => self.images.file(name),
        }
    }
}

/// Refuses a header that names a column twice: only one of them could be read.
fn check_unique(names: &[String], path: &Path) -> Result<()> {
    let mut seen = BTreeSet::new();
    let twice = names.iter().find(|name| !name.is_empty() && !seen.insert(*name));
    twice.map_or(Ok(()), |name| {
        let message = format!("{} has two columns `{name}`", path.display());
        Err(failed(message, "give each column a name of its own in the first line"))
    })
}

/// The fields of the first rows of JSON lines. Only those that occur can be meant.
///
/// # Errors
/// No row can be read, or no row has a field that the user named.
fn fields(first: &[table::Row], damage: &BadCounts, columns: &Columns, path: &Path) -> Result<Vec<String>> {
    let shown = path.display();
    let hint = if damage.has(Cause::NotUtf8) { ICONV } else { "write one JSON object on each line" };
    let found = if damage.is_empty() { "it is empty".to_owned() } else { damage.to_string() };
    ensure!(!first.is_empty(), failed(format_args!("no row of {shown} can be read: {found}"), hint));
    let objects = first.iter().filter_map(|row| if let table::Row::Json(object) = row { Some(object) } else { None });
    let names: BTreeSet<&String> = objects.flat_map(serde_json::Map::keys).collect();
    let missing = |names_of: &[&String]| names_of.iter().all(|name| !names.contains(name));
    let captions: Vec<&String> = columns.captions.iter().collect();
    let (image, key) = (columns.image.as_ref(), columns.key.as_ref());
    let named =
        [(&captions[..], "--caption-column"), (image.as_slice(), "--image-column"), (key.as_slice(), "--key-column")];
    for (wanted, option) in named {
        let (Some(name), true) = (wanted.first(), missing(wanted)) else { continue };
        let listed = names.iter().take(20).map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(usage(
            format_args!("none of the first {} rows of {shown} has the field `{name}`", first.len()),
            format_args!("they have {listed}; choose with {option}"),
        ));
    }
    Ok(names.into_iter().cloned().collect())
}

impl Reader for Rows {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        let mut table = Table::open(&self.path)?;
        let shown = self.path.display();
        while let Some(batch) = table.next_batch()? {
            for index in 0..batch.len() {
                let row = batch.get(index).and_then(|row| self.row(&row).map_err(|bad| batch.locate(index, bad)));
                rows.row(row.map_err(|bad| Bad::new(bad.cause, format_args!("{shown}: {}", bad.place))))?;
            }
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.path.clone()]
    }

    fn embedded(&self) -> bool {
        self.embedded
    }
}
