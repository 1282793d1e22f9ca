//! Tables of captions: JSON lines, CSV, TSV and parquet files. They are read in batches of rows ([`Rows`]), and rows can be
//! written back unchanged ([`Writer`]).

mod delimited;
mod json_lines;
mod parquet;
mod replace;
mod row;
#[cfg(test)]
mod tests;

pub use replace::ReplacingWriter;
pub use row::Row;

use super::{
    bad::Bad,
    source_file::{foreign_format, open_regular},
};
use crate::error::{Context, Hint, Result, ensure, failed, usage};
use std::{
    fs::File,
    io::{BufWriter, Read, Seek, Write},
    path::Path,
};

/// Maximum size of one row in bytes; rows of Chinese-CLIP's tables hold an image as base64 text.
pub const MAX_ROW: usize = 128 << 20;
/// A batch ends with this many rows.
const BATCH_ROWS: usize = 4096;
/// A batch also ends with this many bytes.
const BATCH_BYTES: usize = 16 << 20;

/// The extensions of the files that [`Table::open`] reads.
pub const EXTENSIONS: [&str; 5] = ["jsonl", "ndjson", "csv", "tsv", "parquet"];

/// A table that is read from its start to its end.
pub struct Table {
    reader: Reader,
    rows: u64,
}

enum Reader {
    JsonLines(json_lines::Reader),
    Delimited(delimited::Reader),
    Parquet(parquet::Reader),
}

impl Table {
    /// Opens a table; its format follows from its extension, in lower or upper case.
    ///
    /// # Errors
    /// The file cannot be read, its extension is none of [`EXTENSIONS`], or its content has another format.
    pub fn open(path: &Path) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        let mut file = open_regular(path).with_context(|| format!("cannot open {}", path.display()))?;
        check_content(path, &extension, &mut file)?;
        let reader = match extension.as_str() {
            "jsonl" | "ndjson" => Reader::JsonLines(json_lines::Reader::new(file)),
            "csv" => Reader::Delimited(delimited::Reader::new(file, b',', path)?),
            "tsv" => Reader::Delimited(delimited::Reader::new(file, b'\t', path)?),
            "parquet" => Reader::Parquet(parquet::Reader::new(file, path)?),
            _ => {
                let message = format!("{} is not a table that can be read", path.display());
                return Err(usage(message, format_args!("name a file that ends in .{}", EXTENSIONS.join(", ."))));
            }
        };
        Ok(Self { reader, rows: 0 })
    }

    /// The next rows, in order; `None` after the last one. A damaged row is an error of [`Rows::get`], not of this call.
    ///
    /// # Errors
    /// The file cannot be read, or it is damaged so that no further row can be found.
    pub fn next_batch(&mut self) -> Result<Option<Rows>> {
        let content = match &mut self.reader {
            Reader::JsonLines(reader) => reader.next_batch()?.map(Content::JsonLines),
            Reader::Delimited(reader) => reader.next_batch()?.map(Content::Delimited),
            Reader::Parquet(reader) => reader.next_batch()?.map(Content::Parquet),
        };
        let first_row = self.rows;
        let rows = content.map(|content| Rows { first_row, content });
        self.rows += rows.as_ref().map_or(0, |rows| rows.len() as u64);
        Ok(rows)
    }

    /// The names of the columns; `None` for JSON lines, where each row has its own.
    pub fn columns(&self) -> Option<Vec<String>> {
        match &self.reader {
            Reader::JsonLines(_) => None,
            Reader::Delimited(reader) => Some(reader.columns()),
            Reader::Parquet(reader) => Some(reader.columns()),
        }
    }

    /// Checks that a table with fixed columns has the column `name`; `option` is what named it.
    ///
    /// # Errors
    /// There is no such column.
    pub fn require(&self, name: &str, option: &str, path: &Path) -> Result<()> {
        let Some(columns) = self.columns() else { return Ok(()) };
        let message = format!("{} has no column `{name}`", path.display());
        ensure!(
            columns.iter().any(|column| column == name),
            usage(message, format_args!("its columns are {}; choose with {option}", columns.join(", ")))
        );
        Ok(())
    }

    /// A writer for rows of this table, in its format and with its columns.
    ///
    /// # Errors
    /// The header cannot be written.
    pub fn writer<'a>(&self, file: &'a mut BufWriter<File>) -> Result<Writer<'a>> {
        Ok(match &self.reader {
            Reader::JsonLines(_) => Writer::JsonLines(file),
            Reader::Delimited(reader) => Writer::Delimited(Box::new(reader.writer(file)?)),
            Reader::Parquet(reader) => Writer::Parquet(Box::new(reader.writer(file)?)),
        })
    }
}

/// Refuses content that contradicts the extension, so that a renamed file is not read as thousands of bad rows.
fn check_content(path: &Path, extension: &str, file: &mut File) -> Result<()> {
    let mut head = Vec::new();
    Read::by_ref(file).take(512).read_to_end(&mut head)?;
    file.rewind()?;
    let (shown, text) = (path.display(), extension != "parquet");
    let binary = head.contains(&0) || foreign_format(&head).is_some_and(|format| !head.is_ascii() && is_packed(format));
    ensure!(
        !text || !(binary || head.starts_with(b"PAR1")),
        failed(
            format_args!("{shown} is not text"),
            format_args!("it is {}", foreign_format(&head).unwrap_or("binary"))
        )
    );
    let array = head.trim_ascii_start().starts_with(b"[") && matches!(extension, "jsonl" | "ndjson");
    ensure!(
        !array,
        failed(
            format_args!("{shown} is one JSON list, not JSON lines"),
            "write one object on each line: `jq -c '.[]'`"
        )
    );
    Ok(())
}

fn is_packed(format: &str) -> bool {
    format.starts_with("compressed") || format.starts_with("a zip")
}

/// Consecutive rows of a table.
pub struct Rows {
    /// Number of rows of the table before these.
    pub first_row: u64,
    content: Content,
}

enum Content {
    JsonLines(json_lines::Lines),
    Delimited(delimited::Records),
    Parquet(arrow_array::RecordBatch),
}

impl Rows {
    /// Number of rows, damaged ones included.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::JsonLines(lines) => lines.len(),
            Content::Delimited(records) => records.len(),
            Content::Parquet(batch) => batch.num_rows(),
        }
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `index` of these rows. The error names the row in the table, counted from 1.
    ///
    /// # Errors
    /// The row is damaged.
    pub fn get(&self, index: usize) -> Result<Row<'_>, Bad> {
        let found = match &self.content {
            Content::JsonLines(lines) => lines.row(index),
            Content::Delimited(records) => records.row(index),
            Content::Parquet(batch) => Ok(Row::Parquet { batch, index }),
        };
        found.map_err(|bad| self.locate(index, bad))
    }

    /// Adds the number of row `index` in the table to the location of a bad row.
    pub fn locate(&self, index: usize, bad: Bad) -> Bad {
        Bad::new(bad.cause, format_args!("row {}: {}", self.first_row + index as u64 + 1, bad.place))
    }
}

/// Writes rows of a [`Table`] unchanged.
pub enum Writer<'a> {
    JsonLines(&'a mut BufWriter<File>),
    Delimited(Box<csv::Writer<&'a mut BufWriter<File>>>),
    Parquet(Box<parquet::FileWriter<'a>>),
}

impl Writer<'_> {
    /// Writes those rows for which `keep` is true.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, rows: &Rows, keep: &[bool]) -> Result<()> {
        match (self, &rows.content) {
            (Self::JsonLines(file), Content::JsonLines(lines)) => {
                for (line, _) in lines.iter().zip(keep).filter(|(_, keep)| **keep) {
                    file.write_all(line)?;
                    file.write_all(b"\n")?;
                }
                Ok(())
            }
            (Self::Delimited(writer), Content::Delimited(records)) => records.write(writer, keep),
            (Self::Parquet(writer), Content::Parquet(batch)) => parquet::write(writer, batch, keep),
            _ => Err(failed("rows of another format", "write rows with the writer of their own table")),
        }
    }

    /// Writes what is still buffered, and the end of the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::JsonLines(file) => file.flush().context("cannot write the table"),
            Self::Delimited(mut writer) => writer.flush().context("cannot write the table"),
            Self::Parquet(writer) => writer.close().map(drop).hint("cannot write the table", "is the disk full?"),
        }
    }
}
