//! CSV and TSV with a header line. Quotes follow RFC 4180.

use super::{BATCH_BYTES, BATCH_ROWS, MAX_ROW, Row};
use crate::{
    data::bad::{Bad, Cause},
    error::{Context, Hint, Result, ensure, failed},
};
use csv::ByteRecord;
use std::{
    cell::Cell,
    fs::File,
    io::{self, BufWriter, Read},
    path::Path,
    rc::Rc,
};

/// Bytes that may be read before the next row is complete. An unclosed quote would otherwise read the whole file.
struct Bounded {
    file: File,
    left: Rc<Cell<usize>>,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            return Err(io::Error::other("a row that does not end; is a quote not closed?"));
        }
        let read = self.file.read(buffer)?;
        self.left.set(self.left.get().saturating_sub(read));
        Ok(read)
    }
}

/// Reads the records of a CSV or TSV file.
pub struct Reader {
    reader: csv::Reader<Bounded>,
    left: Rc<Cell<usize>>,
    header: ByteRecord,
    delimiter: u8,
    shown: String,
}

/// Records below one header.
pub struct Records {
    header: ByteRecord,
    records: Vec<ByteRecord>,
}

impl Reader {
    pub fn new(file: File, delimiter: u8, path: &Path) -> Result<Self> {
        let left = Rc::new(Cell::new(MAX_ROW));
        let bounded = Bounded { file, left: Rc::clone(&left) };
        let mut builder = csv::ReaderBuilder::new();
        let mut reader = builder.delimiter(delimiter).flexible(true).buffer_capacity(1 << 20).from_reader(bounded);
        let shown = path.display().to_string();
        let header = reader.byte_headers().hint(format_args!("cannot read the header of {shown}"), HINT)?.clone();
        // The csv crate removes a byte order mark by itself.
        let text = header.iter().all(|name| std::str::from_utf8(name).is_ok());
        let reason = format!("the header of {shown} is not UTF-8");
        ensure!(text, failed(reason, "convert the file: `iconv -f GB18030 -t UTF-8`"));
        ensure!(!header.is_empty(), failed(format_args!("{shown} is empty"), HINT));
        Ok(Self { reader, left, header, delimiter, shown })
    }

    pub fn columns(&self) -> Vec<String> {
        self.header.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    }

    pub fn next_batch(&mut self) -> Result<Option<Records>> {
        let (mut records, mut bytes) = (Vec::new(), 0);
        while records.len() < BATCH_ROWS && bytes < BATCH_BYTES {
            let mut record = ByteRecord::new();
            self.left.set(MAX_ROW);
            let read = self.reader.read_byte_record(&mut record);
            if !read.hint(format_args!("cannot read {}", self.shown), HINT)? {
                break;
            }
            bytes += record.as_slice().len();
            records.push(record);
        }
        Ok((!records.is_empty()).then(|| Records { header: self.header.clone(), records }))
    }

    pub fn writer<'a>(&self, file: &'a mut BufWriter<File>) -> Result<csv::Writer<&'a mut BufWriter<File>>> {
        let mut builder = csv::WriterBuilder::new();
        let mut writer = builder.delimiter(self.delimiter).flexible(true).from_writer(file);
        writer.write_byte_record(&self.header).context("cannot write the header of the table")?;
        Ok(writer)
    }

    /// The same with one more column.
    pub fn writer_with<'a>(
        &self,
        file: &'a mut BufWriter<File>,
        column: &str,
    ) -> Result<csv::Writer<&'a mut BufWriter<File>>> {
        let mut builder = csv::WriterBuilder::new();
        let mut writer = builder.delimiter(self.delimiter).flexible(true).from_writer(file);
        let header = self.header.iter().chain([column.as_bytes()]);
        writer.write_record(header).context("cannot write the header of the table")?;
        Ok(writer)
    }
}

const HINT: &str = "the first line must name the columns; a quote in a field must be doubled";

impl Records {
    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn row(&self, index: usize) -> Result<Row<'_>, Bad> {
        let record = self.records.get(index).ok_or_else(|| Bad::new(Cause::BadRow, "missing"))?;
        let (columns, fields) = (self.header.len(), record.len());
        if fields != columns {
            let counts = format_args!("{fields} fields, but the header names {columns} columns");
            return Err(Bad::new(Cause::BadRow, counts));
        }
        Ok(Row::Delimited { header: &self.header, record })
    }

    pub fn write(&self, writer: &mut csv::Writer<&mut BufWriter<File>>, keep: &[bool]) -> Result<()> {
        for (record, _) in self.records.iter().zip(keep).filter(|(_, keep)| **keep) {
            writer.write_byte_record(record).context("cannot write the table")?;
        }
        Ok(())
    }

    /// Writes the records that have a text, which replaces the field `column`; the field moves to the end.
    pub fn replace(
        &self,
        writer: &mut csv::Writer<&mut BufWriter<File>>,
        column: &str,
        texts: &[Option<String>],
    ) -> Result<()> {
        let at = self.header.iter().position(|name| name == column.as_bytes());
        for (record, text) in self.records.iter().zip(texts).filter_map(|(record, text)| Some((record, text.as_ref()?)))
        {
            let replaced = |(index, field)| if Some(index) == at { text.as_bytes() } else { field };
            let before = at.and_then(|at| record.get(at)).unwrap_or_default();
            let fields = record.iter().enumerate().map(replaced).chain([before]);
            writer.write_record(fields).context("cannot write the table")?;
        }
        Ok(())
    }
}
