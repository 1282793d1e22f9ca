//! Tables and folders: read back equal, and their broken twins.

use super::{
    Columns, Request,
    tests::{build, check_all, expected, golden, read, request, sha256, twin},
    twin_tests::{CAT, in_gbk, refused, with_mark_and_crlf},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{fs, path::Path};

/// The columns `id`, `file`, `zh` and, for images as base64, `image`.
fn columns(base64: bool) -> Columns {
    let image = if base64 { "image" } else { "file" };
    let captions = ["zh", "zh2"].map(str::to_owned).to_vec();
    Columns { image: Some(image.into()), base64, captions, key: Some("id".into()) }
}

/// The table of the expected samples in a format: ids, file names, captions and images in base64.
fn table(extension: &str) -> String {
    let number = |name: &str| name.split(['_', '.']).nth(2).unwrap().trim_start_matches('0').to_owned();
    let mut rows = Vec::new();
    for entry in fs::read_dir(golden("images")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let (id, image) = (number(&name), BASE64_STANDARD.encode(fs::read(&path).unwrap()));
        let captions = expected().remove(&id).unwrap().1;
        let second = captions.get(1).cloned().unwrap_or_default();
        rows.push([id, name, captions[0].clone(), second, image]);
    }
    rows.sort();
    let names = ["id", "file", "zh", "zh2", "image"];
    if extension == "jsonl" {
        let row = |cells: &[String; 5]| {
            serde_json::Map::from_iter(names.map(String::from).into_iter().zip(cells.clone().map(Into::into)))
        };
        return rows.iter().map(|row_| serde_json::Value::Object(row(row_)).to_string() + "\n").collect();
    }
    let separator = if extension == "tsv" { "\t" } else { "," };
    let lines = std::iter::once(names.map(String::from)).chain(rows);
    lines.map(|cells| cells.join(separator) + "\n").collect()
}

#[test]
fn tables_of_text_are_read_back_equal() {
    for extension in ["csv", "tsv", "jsonl"] {
        for base64 in [false, true] {
            let (_folder, request) = twin(&format!("a.{extension}"), table(extension).as_bytes());
            check_all(&Request { columns: columns(base64), ..request }, |sample| {
                sample.json["source_key"].as_str().unwrap().to_owned()
            });
        }
    }
    // Captions with everything that a format must quote; a list in one column; base64 for the web as a data URL.
    let odd = ["a \"red\"\tcar, 🐱\r\non the \\grass", "；|，", "'"];
    let image = fs::read(golden("images").join(format!("{CAT}.jpg"))).unwrap();
    let url = format!("data:image/jpeg;base64,{}", base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(&image));
    let cleaned = ["a \"red\" car, 🐱 on the \\grass", "；|，", "'"];
    let json = serde_json::json!({"zh": odd, "image": url, "width": 24, "note": {"deep": [1, null]}}).to_string();
    let quoted = odd.map(|caption| format!("\"{}\"", caption.replace('"', "\"\"")));
    let csv = format!("zh,zh2,zh3,image\n{},\"{url}\"\n", quoted.join(","));
    let tsv = format!("zh\tzh2\tzh3\timage\n{}\t{url}\n", quoted.join("\t"));
    let columns_of_captions = ["zh", "zh2", "zh3"];
    for (name, text, names) in [
        ("a.jsonl", json, &columns_of_captions[..1]),
        ("a.csv", csv, &columns_of_captions),
        ("a.tsv", tsv, &columns_of_captions),
    ] {
        let (folder, request) = twin(name, text.as_bytes());
        let captions = names.iter().map(|name| (*name).to_owned()).collect();
        let columns = Columns { image: Some("image".into()), base64: true, captions, key: None };
        let report = build(&Request { columns, ..request }, &folder.path().join("out")).unwrap();
        assert_eq!((report.samples, report.bad.to_string()), (1, String::new()), "{name}");
        let sample = read(&folder.path().join("out")).remove("000000000").unwrap();
        assert_eq!(sample.captions(), cleaned, "{name}");
        assert_eq!((sha256(&sample.image), sample.text.as_str()), (sha256(&image), cleaned[0]), "{name}");
        assert!(name != "a.jsonl" || sample.json["width"] == 24 && sample.json["note"]["deep"][0] == 1);
    }
}

#[test]
fn tables_of_text_have_their_twins() {
    for extension in ["csv", "tsv", "jsonl"] {
        let (name, text) = (format!("a.{extension}"), table(extension));
        let with_columns = |base64: bool| move |request| Request { columns: columns(base64), ..request };
        let found = |text: &[u8], base64: bool, break_images: &dyn Fn(&Path)| {
            let (folder, request) = twin(&name, text);
            break_images(&folder.path().join("images"));
            let report = build(&with_columns(base64)(request), &folder.path().join("out")).unwrap();
            (report.samples, report.bad.to_string())
        };
        let keep = |_: &Path| {};
        assert_eq!(found(&with_mark_and_crlf(&text), false, &keep), (4, String::new()), "{name}");
        assert_eq!(found(&with_mark_and_crlf(&text), true, &keep), (4, String::new()), "{name}");
        let again = text.lines().last().unwrap();
        let (samples, bad) = found(format!("{text}{again}\n").as_bytes(), false, &keep);
        assert!(samples == 4 && bad.starts_with("1 duplicate (7)"), "{name}: {bad}");
        let (samples, bad) = found(&in_gbk(&text), false, &keep);
        assert!(samples == 3 && bad.starts_with("1 not-utf8 (") && bad.contains(&name), "{bad}");
        let remove = |images: &Path| fs::remove_file(images.join(format!("{CAT}.jpg"))).unwrap();
        let (samples, bad) = found(text.as_bytes(), false, &remove);
        assert!(samples == 3 && bad.starts_with("1 no-image (") && bad.contains(CAT), "{bad}");
        let jpeg = &BASE64_STANDARD.encode(fs::read(golden("images").join(format!("{CAT}.jpg"))).unwrap());
        let (samples, bad) = found(text.replace(jpeg, "!!!").as_bytes(), true, &keep);
        assert!(samples == 3 && bad.starts_with("1 bad-base64 (550529"), "{bad}");
        let (samples, bad) = found(text.replace(jpeg, "PGh0bWw+").as_bytes(), true, &keep);
        assert!(samples == 3 && bad.starts_with("1 bad-image (550529"), "{bad}");
        let (samples, bad) = found(text.replace(jpeg, "").as_bytes(), true, &keep);
        assert!(samples == 3 && bad.starts_with("1 no-image (550529"), "{bad}");
        // Base64 where file names are expected: long text is not printed in whole.
        let long = text.replace("\timage\n", "\tlong\n").replace(jpeg, &jpeg.repeat(10));
        let (folder, request) =
            twin(&name, long.replace(",image\n", ",long\n").replace("\"image\"", "\"long\"").as_bytes());
        let with_long = Columns { image: Some("long".into()), ..columns(false) };
        let report = build(&Request { columns: with_long, ..request }, &folder.path().join("out")).unwrap();
        let bad = report.bad.to_string();
        assert!(report.samples == 0 && bad.starts_with("4 no-image (") && bad.contains("--base64"), "{bad}");
        assert!(bad.len() < 4000, "{} bytes", bad.len());
        for (wrong, option) in [("image", "--image-column"), ("caption", "--caption-column"), ("key", "--key-column")] {
            let change = |request| {
                let mut columns = columns(false);
                match wrong {
                    "image" => columns.image = Some("photo".into()),
                    "caption" => columns.captions = vec!["en".into()],
                    _ => columns.key = Some("number".into()),
                }
                Request { columns, ..request }
            };
            refused(&name, text.as_bytes(), change, option);
            refused(&name, text.as_bytes(), change, "zh, zh2");
        }
        refused(&name, b"", with_columns(false), "empty");
        // Nothing that could be read: no column can be chosen.
        let gbk = [b"\xb1\xea\xcc\xe2 ", text.as_bytes()].concat();
        let first = gbk.iter().position(|byte| *byte == b'\n').unwrap();
        refused(&name, &gbk[..first], |request| Request { columns: Columns::default(), ..request }, "iconv");
    }
    let twice = table("csv").replace("zh2", "zh");
    refused("a.csv", twice.as_bytes(), |request| Request { columns: columns(false), ..request }, "two columns `zh`");
    // In JSON lines, one of the caption fields is enough, and each row may lack some.
    let (folder, request) = twin("a.jsonl", table("jsonl").replace("\"zh2\"", "\"other\"").as_bytes());
    let report = build(&Request { columns: columns(false), ..request }, &folder.path().join("out")).unwrap();
    assert_eq!((report.samples, report.bad.total()), (4, 0));
}

#[test]
fn folders_have_their_twins() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    let image = |name: &str, to: &str| {
        let to = source.join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(golden("images").join(name), to).unwrap();
    };
    let text = |name: &str, content: &[u8]| fs::write(source.join(name), content).unwrap();
    let (jpeg, png) = (format!("{CAT}.jpg"), "COCO_val2014_000000000007.png");
    for name in ["mark", "gbk", "json", "bad-json", "none", "empty", "cut", "sub/both"] {
        image(&jpeg, &format!("{name}.jpg"));
    }
    image(png, "sub/both.png");
    image(png, "html.png");
    text("mark.txt", "\u{feff}夜晚的街道\r\n街道\r\n".as_bytes());
    text("gbk.txt", b"\xd2\xb9\xcd\xed");
    text("json.json", "\u{feff}{\"caption\": \"夜晚\",\r\n \"id\": 7}".as_bytes());
    text("bad-json.json", b"{\"caption\": ");
    text("bad-json.txt", "夜晚".as_bytes());
    text("empty.txt", b" \r\n");
    text("cut.txt", "夜晚".as_bytes());
    let bytes = fs::read(source.join("cut.jpg")).unwrap();
    text("cut.jpg", &bytes[..bytes.len() / 2]);
    text("html.png", b"<html>404</html>");
    text("html.txt", "夜晚".as_bytes());
    text("sub/both.txt", "夜晚".as_bytes());
    text("alone.txt", "夜晚".as_bytes());
    text("clip.mp4", b"film");
    let output = folder.path().join("out");
    let report = build(&request(&source), &output).unwrap();
    let samples = read(&output);
    let kept: Vec<&str> = samples.values().map(|sample| sample.json["source_key"].as_str().unwrap()).collect();
    assert_eq!(kept, ["bad-json", "json", "mark", "sub/both", "sub/both_png"]);
    assert_eq!(samples.values().map(|sample| sample.captions().len()).collect::<Vec<_>>(), [1, 1, 2, 1, 1]);
    assert!(samples.values().any(|sample| sample.captions() == ["夜晚的街道", "街道"]));
    let bad = report.bad.to_string();
    for part in ["1 not-utf8 (", "2 no-caption (", "2 bad-image ("] {
        assert!(bad.contains(part), "{part}: {bad}");
    }
    assert_eq!((report.rows, report.bad.total()), (10, 5), "{bad}");
    let ignored = report.ignored.to_string();
    for part in ["1 bad-json (", "1 unknown-kind (", "clip.mp4", "1 no-image (", "alone.txt"] {
        assert!(ignored.contains(part), "{part}: {ignored}");
    }
    // A second run finds the same again, though all shards are finished.
    let again = build(&request(&source), &output).unwrap();
    assert_eq!((again.shards, again.samples, again.bad), (0, report.samples, report.bad));
    assert_eq!(again.ignored.to_string(), ignored);
}
