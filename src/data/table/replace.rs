//! Writes rows of a table with one column replaced; its content moves to a new, last column.

use super::{Content, Reader, Row, Rows, Table, Writer};
use crate::error::{Context, Result, ensure, failed, usage};
use serde_json::Value;
use std::{fs::File, io::BufWriter, io::Write, path::Path};

/// The writer of [`Table::replacing_writer`].
pub struct ReplacingWriter<'a> {
    writer: Writer<'a>,
    column: String,
    original: String,
}

impl Table {
    /// A writer for rows of this table in which the column `column` has another text, and the new column `original` has what
    /// was there before. JSON objects are written with sorted keys; a replaced column of a parquet file holds UTF-8.
    ///
    /// # Errors
    /// There is no column `column`, or already a column `original`; the header cannot be written.
    pub fn replacing_writer<'a>(
        &self,
        path: &Path,
        column: &str,
        original: &str,
        file: &'a mut BufWriter<File>,
    ) -> Result<ReplacingWriter<'a>> {
        self.require(column, "--caption-column", path)?;
        let taken = self.columns().is_some_and(|columns| columns.iter().any(|name| name == original));
        let message = format!("{} already has a column `{original}`", path.display());
        ensure!(!taken && column != original, usage(message, HINT));
        let writer = match &self.reader {
            Reader::JsonLines(_) => Writer::JsonLines(file),
            Reader::Delimited(reader) => Writer::Delimited(Box::new(reader.writer_with(file, original)?)),
            Reader::Parquet(reader) => Writer::Parquet(Box::new(reader.replacing_writer(file, column, original)?)),
        };
        Ok(ReplacingWriter { writer, column: column.to_owned(), original: original.to_owned() })
    }
}

const HINT: &str = "choose another name for the caption before its translation with --original-column";

impl ReplacingWriter<'_> {
    /// Writes those rows that have a text in `texts`, which replaces the column.
    ///
    /// # Errors
    /// The file cannot be written, or a JSON object already has the new key.
    pub fn write(&mut self, rows: &Rows, texts: &[Option<String>]) -> Result<()> {
        match (&mut self.writer, &rows.content) {
            (Writer::JsonLines(file), Content::JsonLines(lines)) => {
                for (index, text) in texts.iter().enumerate().filter_map(|(index, text)| Some((index, text.as_ref()?)))
                {
                    let Ok(Row::Json(mut object)) = lines.row(index) else { continue };
                    let before = object.insert(self.column.clone(), Value::String(text.clone()));
                    let taken = object.insert(self.original.clone(), before.unwrap_or_default()).is_some();
                    let row = rows.first_row + index as u64 + 1;
                    ensure!(!taken, failed(format_args!("row {row} already has a key `{}`", self.original), HINT));
                    serde_json::to_writer(&mut **file, &object).context("cannot write the table")?;
                    file.write_all(b"\n").context("cannot write the table")?;
                }
                Ok(())
            }
            (Writer::Delimited(writer), Content::Delimited(records)) => records.replace(writer, &self.column, texts),
            (Writer::Parquet(writer), Content::Parquet(batch)) => {
                super::parquet::write_replaced(writer, batch, &self.column, &self.original, texts)
            }
            _ => Err(failed("rows of another format", "write rows with the writer of their own table")),
        }
    }

    /// Writes what is still buffered, and the end of the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self) -> Result<()> {
        self.writer.finish()
    }
}
