//! One row of a table, and its cells by column name.

use crate::data::bad::{Bad, Cause};
use arrow_array::{Array, ArrayRef, RecordBatch, cast::AsArray, types};
use arrow_schema::DataType;
use csv::ByteRecord;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// One row. A column that the row lacks and a null cell are both "no cell".
#[derive(Debug)]
pub enum Row<'a> {
    Json(Map<String, Value>),
    Delimited { header: &'a ByteRecord, record: &'a ByteRecord },
    Parquet { batch: &'a RecordBatch, index: usize },
}

impl Row<'_> {
    /// The text of a cell; numbers are written as text. `None` if there is no cell.
    ///
    /// # Errors
    /// The cell is not UTF-8, or it is a list or an object.
    pub fn text(&self, column: &str) -> Result<Option<Cow<'_, str>>, Bad> {
        match self {
            Self::Json(object) => object.get(column).map_or(Ok(None), |value| json_text(column, value)),
            Self::Delimited { header, record } => {
                let Some(cell) = field(header, record, column) else { return Ok(None) };
                let text = std::str::from_utf8(cell).map_err(|e| not_utf8(column, e))?;
                Ok(Some(Cow::Borrowed(text)))
            }
            Self::Parquet { batch, index } => match cell(batch, column, *index) {
                Some((array, index)) => arrow_text(column, array, index),
                None => Ok(None),
            },
        }
    }

    /// The texts of a cell: those of a list, or the only one. Empty if there is no cell.
    ///
    /// # Errors
    /// A text is not UTF-8, or the cell is an object or a list of other things.
    pub fn texts(&self, column: &str) -> Result<Vec<Cow<'_, str>>, Bad> {
        match self {
            Self::Json(object) => {
                if let Some(Value::Array(list)) = object.get(column) {
                    return list.iter().filter_map(|value| json_text(column, value).transpose()).collect();
                }
            }
            Self::Delimited { .. } => {}
            Self::Parquet { batch, index } => {
                if let Some((array, index)) = cell(batch, column, *index)
                    && let Some(list) = list(array, index)
                {
                    let texts = (0..list.len()).filter(|item| list.is_valid(*item));
                    let texts = texts.filter_map(|item| arrow_text(column, &list, item).transpose());
                    return texts.map(|text| Ok(Cow::Owned(text?.into_owned()))).collect();
                }
            }
        }
        Ok(self.text(column)?.into_iter().collect())
    }

    /// The bytes of a binary cell of a parquet file. `None` if there is no cell or it holds something else.
    pub fn bytes(&self, column: &str) -> Option<&[u8]> {
        let Self::Parquet { batch, index } = self else { return None };
        let (array, index) = cell(batch, column, *index)?;
        match array.data_type() {
            DataType::Binary => Some(array.as_binary::<i32>().value(index)),
            DataType::LargeBinary => Some(array.as_binary::<i64>().value(index)),
            DataType::BinaryView => Some(array.as_binary_view().value(index)),
            // datasets of Hugging Face store an image as a struct of `bytes` and `path`.
            DataType::Struct(_) => {
                let bytes = array.as_struct().column_by_name("bytes")?.as_binary_opt::<i32>()?;
                bytes.is_valid(index).then(|| bytes.value(index))
            }
            _ => None,
        }
    }

    /// The cells that JSON can hold, by column name; numbers stay numbers in JSON lines and parquet files.
    pub fn fields(&self) -> Map<String, Value> {
        match self {
            Self::Json(object) => object.clone(),
            Self::Delimited { header, record } => {
                let name = |bytes: &[u8]| std::str::from_utf8(bytes).map(str::to_owned).ok();
                header
                    .iter()
                    .zip(record.iter())
                    .filter_map(|(key, cell)| Some((name(key)?, name(cell)?.into())))
                    .collect()
            }
            Self::Parquet { batch, index } => {
                let schema = batch.schema();
                let field = |name: &String| {
                    let (array, index) = cell(batch, name, *index)?;
                    let value = match array.data_type() {
                        DataType::List(_) | DataType::LargeList(_) => {
                            self.texts(name).ok()?.into_iter().map(Cow::into_owned).collect()
                        }
                        kind => {
                            let text = arrow_text(name, array, index).ok()??;
                            let scalar = kind.is_numeric() || *kind == DataType::Boolean;
                            let value = scalar.then(|| serde_json::from_str(&text).ok()).flatten();
                            value.unwrap_or_else(|| text.into_owned().into())
                        }
                    };
                    Some((name.clone(), value))
                };
                schema.fields().iter().filter_map(|column| field(column.name())).collect()
            }
        }
    }

    /// The number in a cell. `None` if there is no cell or it holds no number.
    pub fn number(&self, column: &str) -> Option<f64> {
        match self {
            Self::Json(object) => {
                let value = object.get(column)?;
                value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())
            }
            _ => self.text(column).ok()??.trim().parse().ok(),
        }
    }
}

fn json_text<'a>(column: &str, value: &'a Value) -> Result<Option<Cow<'a, str>>, Bad> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(Cow::Borrowed(text))),
        Value::Number(number) => Ok(Some(Cow::Owned(number.to_string()))),
        Value::Bool(flag) => Ok(Some(Cow::Owned(flag.to_string()))),
        Value::Array(_) | Value::Object(_) => Err(not_text(column)),
    }
}

fn not_text(column: &str) -> Bad {
    Bad::new(Cause::BadRow, format_args!("column `{column}` does not hold text"))
}

fn not_utf8(column: &str, error: std::str::Utf8Error) -> Bad {
    Bad::new(Cause::NotUtf8, format_args!("column `{column}`: {error}"))
}

fn field<'a>(header: &ByteRecord, record: &'a ByteRecord, column: &str) -> Option<&'a [u8]> {
    let index = header.iter().position(|name| name == column.as_bytes())?;
    record.get(index)
}

/// The array of a column and the row in it, unless the cell is null.
fn cell<'a>(batch: &'a RecordBatch, column: &str, index: usize) -> Option<(&'a ArrayRef, usize)> {
    let array = batch.column_by_name(column)?;
    (index < array.len() && array.is_valid(index)).then_some((array, index))
}

fn list(array: &ArrayRef, index: usize) -> Option<ArrayRef> {
    match array.data_type() {
        DataType::List(_) => Some(array.as_list::<i32>().value(index)),
        DataType::LargeList(_) => Some(array.as_list::<i64>().value(index)),
        _ => None,
    }
}

fn arrow_text<'a>(column: &str, array: &'a ArrayRef, index: usize) -> Result<Option<Cow<'a, str>>, Bad> {
    let utf8 = |bytes: &'a [u8]| std::str::from_utf8(bytes).map_err(|e| not_utf8(column, e));
    let text = match array.data_type() {
        DataType::Utf8 => Cow::Borrowed(array.as_string::<i32>().value(index)),
        DataType::LargeUtf8 => Cow::Borrowed(array.as_string::<i64>().value(index)),
        DataType::Utf8View => Cow::Borrowed(array.as_string_view().value(index)),
        DataType::Binary => Cow::Borrowed(utf8(array.as_binary::<i32>().value(index))?),
        DataType::LargeBinary => Cow::Borrowed(utf8(array.as_binary::<i64>().value(index))?),
        DataType::Int64 => Cow::Owned(array.as_primitive::<types::Int64Type>().value(index).to_string()),
        DataType::Int32 => Cow::Owned(array.as_primitive::<types::Int32Type>().value(index).to_string()),
        DataType::UInt64 => Cow::Owned(array.as_primitive::<types::UInt64Type>().value(index).to_string()),
        DataType::UInt32 => Cow::Owned(array.as_primitive::<types::UInt32Type>().value(index).to_string()),
        DataType::Float64 => Cow::Owned(array.as_primitive::<types::Float64Type>().value(index).to_string()),
        DataType::Float32 => Cow::Owned(array.as_primitive::<types::Float32Type>().value(index).to_string()),
        DataType::Boolean => Cow::Owned(array.as_boolean().value(index).to_string()),
        DataType::Null => return Ok(None),
        _ => return Err(not_text(column)),
    };
    Ok(Some(text))
}
