use super::*;
use crate::data::bad::Cause;
use arrow_array::{
    ArrayRef, BinaryArray, Int64Array, LargeStringArray, ListArray, RecordBatch, StringArray, types::Int32Type,
};
use std::{fs, path::PathBuf, sync::Arc};

/// Writes `content` as `name` and opens it.
fn table(folder: &Path, name: &str, content: &[u8]) -> Result<Table> {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    Table::open(&path)
}

/// The texts of a column; a bad row is its cause.
fn column(table: &mut Table, name: &str) -> Vec<Result<Option<String>, Cause>> {
    let mut cells = Vec::new();
    while let Some(rows) = table.next_batch().unwrap() {
        for index in 0..rows.len() {
            let row = rows.get(index).map_err(|bad| bad.cause);
            cells.push(row.and_then(|row| {
                row.text(name).map(|text| text.map(|text| text.into_owned())).map_err(|bad| bad.cause)
            }));
        }
    }
    cells
}

fn some(text: &str) -> Result<Option<String>, Cause> {
    Ok(Some(text.to_owned()))
}

#[test]
fn json_lines_with_mark_carriage_returns_and_damage_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let content =
        b"\xef\xbb\xbf{\"caption\":\"\xe6\x9c\x88\",\"id\":7}\r\n\r\n{\"caption\": 1.5}\n[1]\n{\"caption\":\n\
        {\"caption\":\"\xd4\xc2\"}\n{\"other\":0}\n{\"caption\":[\"a\"]}\n{\"caption\":null}";
    let mut table = table(folder.path(), "a.jsonl", content).unwrap();
    let (bad_json, no) = (|| Err(Cause::BadJson), Ok(None));
    let expected =
        [some("月"), some("1.5"), bad_json(), bad_json(), Err(Cause::NotUtf8), no.clone(), Err(Cause::BadRow), no];
    assert_eq!(column(&mut table, "caption"), expected);
}

#[test]
fn the_location_of_a_bad_row_is_its_number_in_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let lines = "{}\n".repeat(BATCH_ROWS) + "{\n";
    let mut table = table(folder.path(), "a.jsonl", lines.as_bytes()).unwrap();
    assert_eq!(table.next_batch().unwrap().unwrap().len(), BATCH_ROWS);
    let rows = table.next_batch().unwrap().unwrap();
    let place = rows.get(0).unwrap_err().place;
    assert!(place.starts_with("row 4097: "), "{place}");
}

#[test]
fn csv_quotes_marks_and_missing_fields_are_handled() {
    let folder = tempfile::tempdir().unwrap();
    let content = "\u{feff}caption,url\r\n\"月,\"\"夜\"\"\n二\",u\r\nonly\r\n星,v\r\n";
    let mut csv = table(folder.path(), "a.csv", content.as_bytes()).unwrap();
    assert_eq!(csv.columns().unwrap(), ["caption", "url"]);
    assert!(csv.require("text", "--caption-column", Path::new("a.csv")).is_err());
    assert_eq!(column(&mut csv, "caption"), [some("月,\"夜\"\n二"), Err(Cause::BadRow), some("星")]);
    let mut tsv = table(folder.path(), "a.TSV", b"id\tcaption\n1\t\xd4\xc2\n2\tb\n").unwrap();
    assert_eq!(column(&mut tsv, "caption"), [Err(Cause::NotUtf8), some("b")]);
}

#[test]
fn an_unclosed_quote_ends_with_an_error_and_not_with_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.csv");
    fs::write(&path, format!("caption\n\"{}", " ".repeat(600))).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(MAX_ROW as u64 + (4 << 20)).unwrap();
    let error = Table::open(&path).unwrap().next_batch().err().unwrap();
    assert!(format!("{error:#}").contains("a quote"), "{error:#}");
}

#[test]
fn parquet_columns_of_several_types_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), Some(2)]), None]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("caption", Arc::new(StringArray::from(vec![Some("月"), None]))),
        ("url", Arc::new(LargeStringArray::from(vec!["u", "v"]))),
        ("width", Arc::new(Int64Array::from(vec![640, 480]))),
        ("image", Arc::new(BinaryArray::from_vec(vec![b"\xff\xd8", b"\x89P"]))),
        ("boxes", Arc::new(lists)),
    ];
    write_parquet(&path, &RecordBatch::try_from_iter(columns).unwrap());
    let rows = Table::open(&path).unwrap().next_batch().unwrap().unwrap();
    let (first, second) = (rows.get(0).unwrap(), rows.get(1).unwrap());
    assert_eq!(first.text("caption").unwrap().as_deref(), Some("月"));
    assert_eq!(second.text("caption").unwrap(), None);
    assert_eq!((first.number("width"), second.text("url").unwrap().as_deref()), (Some(640.0), Some("v")));
    assert_eq!(second.bytes("image"), Some(&b"\x89P"[..]));
    assert_eq!(first.texts("boxes").unwrap(), ["1", "2"]);
    assert_eq!(first.text("boxes").unwrap_err().cause, Cause::BadRow);
    assert_eq!(first.text("nowhere").unwrap(), None);
}

fn write_parquet(path: &Path, batch: &RecordBatch) {
    let file = fs::File::create(path).unwrap();
    let mut writer = ::parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// Writes the rows at even places of a table.
fn every_second(path: &Path) -> PathBuf {
    let output = path.with_file_name(format!("kept-{}", path.file_name().unwrap().to_str().unwrap()));
    let mut table = Table::open(path).unwrap();
    let mut file = BufWriter::new(fs::File::create(&output).unwrap());
    let mut writer = table.writer(&mut file).unwrap();
    while let Some(rows) = table.next_batch().unwrap() {
        let keep: Vec<bool> = (0..rows.len()).map(|index| index % 2 == 0).collect();
        writer.write(&rows, &keep).unwrap();
    }
    writer.finish().unwrap();
    file.flush().unwrap();
    output
}

#[test]
fn kept_rows_are_written_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, "{\"b\": 1.50, \"a\":\"月\"}\n{}\n{damaged\n").unwrap();
    assert_eq!(fs::read_to_string(every_second(&path)).unwrap(), "{\"b\": 1.50, \"a\":\"月\"}\n{damaged\n");
    let path = folder.path().join("a.csv");
    fs::write(&path, "x,y\n\"1,\",2\n3,4\n\"a\nb\",6\n").unwrap();
    assert_eq!(fs::read_to_string(every_second(&path)).unwrap(), "x,y\n\"1,\",2\n\"a\nb\",6\n");
    let path = folder.path().join("a.parquet");
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["一", "二", "三"]));
    write_parquet(&path, &RecordBatch::try_from_iter([("caption", texts)]).unwrap());
    let mut kept = Table::open(&every_second(&path)).unwrap();
    assert_eq!(column(&mut kept, "caption"), [some("一"), some("三")]);
}

/// Replaces the captions of the rows at even places by `译`.
fn replaced(path: &Path) -> Result<PathBuf> {
    let output = path.with_file_name(format!("replaced-{}", path.file_name().unwrap().to_str().unwrap()));
    let mut table = Table::open(path).unwrap();
    let mut file = BufWriter::new(fs::File::create(&output).unwrap());
    let mut writer = table.replacing_writer(path, "caption", "before", &mut file)?;
    while let Some(rows) = table.next_batch().unwrap() {
        let texts: Vec<_> = (0..rows.len()).map(|index| (index % 2 == 0).then(|| "译".to_owned())).collect();
        writer.write(&rows, &texts)?;
    }
    writer.finish().unwrap();
    file.flush().unwrap();
    Ok(output)
}

#[test]
fn a_replaced_column_moves_to_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let of_text = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        replaced(&path).map(|output| fs::read_to_string(output).unwrap())
    };
    let json = of_text("a.jsonl", "{\"id\":1.50,\"caption\":\"a\\nb\"}\n{}\n{\"caption\":2}\n").unwrap();
    assert_eq!(json, "{\"before\":\"a\\nb\",\"caption\":\"译\",\"id\":1.5}\n{\"before\":2,\"caption\":\"译\"}\n");
    assert_eq!(of_text("a.csv", "caption,id\n\"a,b\",1\nc,2\n").unwrap(), "caption,id,before\n译,1,\"a,b\"\n");
    assert!(of_text("b.jsonl", "{\"before\":1}\n").is_err() && of_text("b.csv", "caption,before\n").is_err());

    let path = folder.path().join("a.parquet");
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("caption", Arc::new(LargeStringArray::from(vec![Some("a"), None, Some("c")]))),
        ("width", Arc::new(Int64Array::from(vec![1, 2, 3]))),
    ];
    write_parquet(&path, &RecordBatch::try_from_iter(columns).unwrap());
    let output = replaced(&path).unwrap();
    for (name, expected) in [("caption", ["译", "译"]), ("width", ["1", "3"]), ("before", ["a", "c"])] {
        assert_eq!(column(&mut Table::open(&output).unwrap(), name), expected.map(some), "{name}");
    }
    assert_eq!(Table::open(&output).unwrap().columns().unwrap(), ["caption", "width", "before"]);
}

#[test]
fn other_formats_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, content: &[u8], expected: &str| {
        let error = table(folder.path(), name, content).err().unwrap();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    };
    refused("a.jsonl", b" [{\"caption\": 1}]", "one JSON list");
    refused("b.jsonl", b"\x1f\x8b\x08\0\0", "not text");
    refused("a.csv", b"PAR1\x15\x04", "not text");
    refused("a.parquet", b"caption,url\n", "cannot read");
    refused("a.txt", b"caption", "not a table");
    refused("b.csv", b"", "empty");
    refused("c.csv", b"\xb1\xea\xcc\xe2,url\n", "not UTF-8");
}
