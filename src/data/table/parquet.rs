//! Parquet files, through Arrow.

use crate::error::{Hint, Result};
use arrow_array::{BooleanArray, RecordBatch};
use arrow_schema::SchemaRef;
use parquet::{
    arrow::{
        ArrowWriter,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    basic::Compression,
    file::properties::WriterProperties,
};
use std::{fs::File, io::BufWriter, path::Path};

/// Rows of a batch: few enough for a column of images to fit in memory.
const BATCH_ROWS: usize = 512;

pub type FileWriter<'a> = ArrowWriter<&'a mut BufWriter<File>>;

/// Reads the row groups of a parquet file.
pub struct Reader {
    reader: ParquetRecordBatchReader,
    schema: SchemaRef,
    shown: String,
}

impl Reader {
    pub fn new(file: File, path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let message = format!("cannot read {shown}");
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).hint(&message, HINT)?;
        let schema = builder.schema().clone();
        let reader = builder.with_batch_size(BATCH_ROWS).build().hint(&message, HINT)?;
        Ok(Self { reader, schema, shown })
    }

    pub fn columns(&self) -> Vec<String> {
        self.schema.fields().iter().map(|field| field.name().clone()).collect()
    }

    pub fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        self.reader.next().transpose().hint(format_args!("cannot read {}", self.shown), HINT)
    }

    pub fn writer<'a>(&self, file: &'a mut BufWriter<File>) -> Result<FileWriter<'a>> {
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        ArrowWriter::try_new(file, self.schema.clone(), Some(properties)).hint("cannot write a parquet file", HINT)
    }
}

const HINT: &str = "is the file complete? compression: none, snappy, gzip or zstd";

/// Writes those rows for which `keep` is true.
pub fn write(writer: &mut FileWriter<'_>, batch: &RecordBatch, keep: &[bool]) -> Result<()> {
    let kept = arrow_select::filter::filter_record_batch(batch, &BooleanArray::from(keep.to_vec()));
    kept.and_then(|kept| writer.write(&kept).map_err(Into::into)).hint("cannot write a parquet file", HINT)
}
