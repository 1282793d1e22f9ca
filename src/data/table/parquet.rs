//! Parquet files, through Arrow.

use crate::error::{Hint, Result};
use arrow_array::{ArrayRef, BooleanArray, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::{
    arrow::{
        ArrowWriter,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    basic::Compression,
    file::properties::WriterProperties,
};
use std::{fs::File, io::BufWriter, path::Path, sync::Arc};

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
        writer(file, self.schema.clone())
    }

    /// A writer whose column `column` holds UTF-8, and with the column `original` of that column's type.
    pub fn replacing_writer<'a>(
        &self,
        file: &'a mut BufWriter<File>,
        column: &str,
        original: &str,
    ) -> Result<FileWriter<'a>> {
        writer(file, replaced_schema(&self.schema, column, original))
    }
}

fn writer(file: &mut BufWriter<File>, schema: SchemaRef) -> Result<FileWriter<'_>> {
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    ArrowWriter::try_new(file, schema, Some(properties)).hint("cannot write a parquet file", HINT)
}

/// Without the metadata of other tools, which names the columns that were there before.
fn replaced_schema(schema: &Schema, column: &str, original: &str) -> SchemaRef {
    let is_it = |field: &&Arc<Field>| field.name() == column;
    let before = schema.fields().iter().find(is_it).map(|field| field.data_type().clone());
    let fields = schema.fields().iter().map(|field| {
        if is_it(&field) { Arc::new(Field::new(column, DataType::Utf8, true)) } else { Arc::clone(field) }
    });
    let new = before.map(|before| Arc::new(Field::new(original, before, true)));
    Arc::new(Schema::new(fields.chain(new).collect::<Vec<_>>()))
}

const HINT: &str = "is the file complete? compression: none, snappy, gzip or zstd";

/// Writes those rows for which `keep` is true.
pub fn write(writer: &mut FileWriter<'_>, batch: &RecordBatch, keep: &[bool]) -> Result<()> {
    let kept = arrow_select::filter::filter_record_batch(batch, &BooleanArray::from(keep.to_vec()));
    kept.and_then(|kept| writer.write(&kept).map_err(Into::into)).hint("cannot write a parquet file", HINT)
}

/// Writes those rows that have a text, which replaces the column `column`; the column becomes `original`.
pub fn write_replaced(
    writer: &mut FileWriter<'_>,
    batch: &RecordBatch,
    column: &str,
    original: &str,
    texts: &[Option<String>],
) -> Result<()> {
    let message = "cannot write a parquet file";
    let keep = BooleanArray::from(texts.iter().map(Option::is_some).collect::<Vec<_>>());
    let kept = arrow_select::filter::filter_record_batch(batch, &keep).hint(message, HINT)?;
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(texts.iter().flatten()));
    let schema = replaced_schema(&kept.schema(), column, original);
    let names = kept.schema();
    let columns = names.fields().iter().zip(kept.columns());
    let columns = columns.map(|(field, array)| if field.name() == column { &texts } else { array });
    let columns = columns.chain(kept.column_by_name(column)).map(Arc::clone).collect();
    let replaced = RecordBatch::try_new(schema, columns).hint(message, HINT)?;
    writer.write(&replaced).hint(message, HINT)
}
