use super::*;
use crate::data::{Cause, Source};
use serde_json::Value;
pub(super) use sha2_of::sha256;
use std::{collections::BTreeMap, fs};

/// SHA-256 by the system's tool, as in the golden file.
mod sha2_of {
    use std::{
        io::Write,
        process::{Command, Stdio},
    };

    pub fn sha256(bytes: &[u8]) -> String {
        let mut tool = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        tool.stdin.take().unwrap().write_all(bytes).unwrap();
        let output = tool.wait_with_output().unwrap();
        String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
    }
}

pub(super) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/build").join(name)
}

pub(super) fn request(source: &Path) -> Request {
    Request { source: source.to_str().unwrap().to_owned(), images: Some(golden("images")), ..Request::default() }
}

fn builder(request: &Request, output: &Path, samples: u64, keys: Keys) -> Result<Builder> {
    let format = guess(request)?;
    let (split, columns) = (request.split.clone(), request.columns.clone());
    Ok(Builder {
        reader: open(request, format)?,
        source: PathBuf::from(&request.source),
        output: output.to_path_buf(),
        settings: Settings { format, samples, keys, split, columns, images: String::new() },
    })
}

pub(super) fn build(request: &Request, output: &Path) -> Result<Report> {
    builder(request, output, 3, Keys::Number)?.run(|_| {})
}

pub(super) fn with_hint(error: &crate::error::Error) -> String {
    format!("{error:#} {}", crate::error::hint_of(error).unwrap_or_default())
}

/// One sample that was read back.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stored {
    pub image: Vec<u8>,
    pub text: String,
    pub json: Value,
}

impl Stored {
    pub fn captions(&self) -> Vec<&str> {
        self.json["captions"].as_array().unwrap().iter().map(|caption| caption.as_str().unwrap()).collect()
    }
}

pub(super) fn read(output: &Path) -> BTreeMap<String, Stored> {
    let source = Source::open(output.to_str().unwrap(), 1.0).unwrap();
    assert_eq!(source.damage().total(), 0);
    let samples =
        source.shards.iter().flat_map(|shard| (0..shard.len() as usize).map(move |n| shard.members(n, None).unwrap()));
    let stored = samples.map(|(key, members)| {
        let image = members.get("jpg").or(members.get("png")).unwrap().to_vec();
        let text = String::from_utf8(members.get("txt").unwrap_or_default().to_vec()).unwrap();
        (key, Stored { image, text, json: serde_json::from_slice(members.get("json").unwrap()).unwrap() })
    });
    stored.collect()
}

/// Image digests and captions by image id.
pub(super) fn expected() -> BTreeMap<String, (String, Vec<String>)> {
    let value: Value = serde_json::from_slice(&fs::read(golden("expected.json")).unwrap()).unwrap();
    let image = |image: &Value| {
        let text = |name: &str| image[name].as_str().unwrap().to_owned();
        let captions = image["captions"].as_array().unwrap().iter().map(|c| c.as_str().unwrap().to_owned());
        (text("image_id"), (text("sha256"), captions.collect()))
    };
    value["images"].as_array().unwrap().iter().map(image).collect()
}

/// Builds `request` and compares all samples with the golden file.
pub(super) fn check_all(request: &Request, id: impl Fn(&Stored) -> String) {
    let output = tempfile::tempdir().unwrap();
    let report = build(request, output.path()).unwrap();
    assert_eq!((report.rows, report.samples, report.shards, report.bad.total()), (4, 4, 2, 0), "{}", report.bad);
    let mut expected = expected();
    for (key, sample) in read(output.path()) {
        let (digest, captions) = expected.remove(&id(&sample)).unwrap_or_else(|| panic!("{key}: {:?}", sample.json));
        assert_eq!(sha256(&sample.image), digest, "{key}");
        assert_eq!(sample.captions(), captions, "{key}");
        assert_eq!((sample.text, &sample.json["key"]), (captions[0].clone(), &Value::from(key)));
    }
    assert!(expected.is_empty());
}

/// The number in a COCO file name.
fn coco_number(name: &Value) -> String {
    let digits = name.as_str().unwrap().trim_start_matches("COCO_val2014_");
    digits.split('.').next().unwrap().trim_start_matches('0').to_owned()
}

#[test]
fn annotations_with_images_are_read_back_equal() {
    check_all(&request(&golden("captions_val2014.json")), |sample| {
        sample.json["image_id"].as_str().unwrap().to_owned()
    });
    check_all(&request(&golden("caption_train_annotations_20170902.json")), |sample| {
        coco_number(&sample.json["source_key"])
    });
    for list in ["imageid.human-written-caption.txt", "flickr-form.txt"] {
        check_all(&request(&golden(list)), |sample| coco_number(&sample.json["image_id"]));
    }
}

#[test]
fn tables_are_read_back_equal() {
    let captions = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let id = |sample: &Stored| sample.json["source_key"].as_str().unwrap().to_owned();
    for image in ["image", "picture"] {
        let columns = Columns { image: Some(image.into()), key: Some("id".into()), ..Columns::default() };
        check_all(&Request { columns, ..request(&golden("pairs.parquet")) }, id);
    }
    let columns = Columns { key: Some("key".into()), captions: captions(&["zh", "zh2"]), ..Columns::default() };
    let csv = Request { columns, ..request(&golden("pairs.csv")) };
    let output = tempfile::tempdir().unwrap();
    build(&csv, output.path()).unwrap();
    let samples = read(output.path());
    assert_eq!(samples["000000000"].captions(), ["一只红色的猫坐在窗台上", "窗台上有一只猫"]);
    assert_eq!(samples["000000003"].json["source_key"], "7");
    let unnamed = Request { columns: Columns::default(), ..csv.clone() };
    let error = build(&unnamed, &output.path().join("x")).unwrap_err();
    assert!(with_hint(&error).contains("--caption-column"), "{error}");
    let columns = Columns { captions: captions(&["en"]), ..Columns::default() };
    let error = build(&Request { columns, ..csv }, &output.path().join("x")).unwrap_err();
    assert!(error.to_string().contains("no column `en`"), "{error}");
}

#[test]
fn pairs_of_files_of_chinese_clip_are_read_back_equal() {
    let output = tempfile::tempdir().unwrap();
    let report = build(&request(&golden("")), output.path()).unwrap();
    assert_eq!((report.samples, report.bad.total()), (4, 0), "{}", report.bad);
    let (samples, expected) = (read(output.path()), expected());
    for sample in samples.values() {
        let (digest, captions) = &expected[sample.json["image_id"].as_str().unwrap()];
        assert_eq!(sha256(&sample.image), *digest);
        assert!(sample.captions()[0] == "一张图画" || captions.iter().any(|caption| caption == sample.captions()[0]));
    }
    assert_eq!(samples["000000000"].captions(), ["一只红色的猫坐在窗台上", "窗台上有一只猫"]);
    assert_eq!(
        (&samples["000000000"].json["text_ids"], &samples["000000000"].json["split"]),
        (&vec![0, 2].into(), &"train".into())
    );
}

#[test]
fn questions_of_fmiqa_are_stored_by_split() {
    let output = tempfile::tempdir().unwrap();
    let whole = request(&golden("FM-CH-QA.json"));
    let error = build(&whole, output.path()).unwrap_err();
    assert!(with_hint(&error).contains("--split"), "{error}");
    let report = build(&Request { split: Some("train".into()), ..whole }, output.path()).unwrap();
    assert_eq!((report.rows, report.samples, report.bad.total()), (2, 2, 0));
    let samples = read(output.path());
    let questions = &samples["000000000"].json["questions"];
    assert_eq!((&questions[0]["question"], &questions[0]["answer"]), (&"猫是什么颜色的？".into(), &"红色。".into()));
    assert_eq!((&questions[1]["question"], questions.as_array().unwrap().len()), (&"猫在哪里？".into(), 2));
}

#[test]
fn shards_of_img2dataset_keep_their_bytes_and_count_failed_downloads() {
    let output = tempfile::tempdir().unwrap();
    let report = build(&request(&golden("img2dataset")), output.path()).unwrap();
    assert_eq!((report.rows, report.samples, report.bad.total()), (3, 3, 1));
    assert!(report.bad.has(Cause::NoImage) && report.bad.to_string().contains("failed_to_download"), "{}", report.bad);
    let (before, after) = (read(&golden("img2dataset")), read(output.path()));
    let pair = |sample: &Stored| (sample.image.clone(), sample.text.clone(), sample.json["url"].clone());
    assert!(before.values().map(pair).eq(after.values().map(pair)));
}

/// A folder with a copy of the images, and `name` with the content `text`.
pub(super) fn twin(name: &str, text: &[u8]) -> (tempfile::TempDir, Request) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("images")).unwrap();
    for entry in fs::read_dir(golden("images")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join("images").join(path.file_name().unwrap())).unwrap();
    }
    fs::write(folder.path().join(name), text).unwrap();
    let request = Request { images: Some(folder.path().join("images")), ..request(&folder.path().join(name)) };
    (folder, request)
}

pub(super) fn golden_text(name: &str) -> String {
    fs::read_to_string(golden(name)).unwrap()
}

/// Builds a broken twin: its samples, and the causes with their counts.
pub(super) fn broken(name: &str, text: &[u8], break_images: impl Fn(&Path)) -> (u64, String) {
    let (folder, request) = twin(name, text);
    break_images(&folder.path().join("images"));
    let report = build(&request, &folder.path().join("out")).unwrap();
    (report.samples, report.bad.to_string())
}

#[test]
fn bad_rows_are_left_out_and_counted() {
    let keep = |_: &Path| {};
    let coco = golden_text("captions_val2014.json");
    let remove = |images: &Path| fs::remove_file(images.join("COCO_val2014_000000000042.jpg")).unwrap();
    let (samples, bad) = broken("a.json", coco.as_bytes(), remove);
    assert!(samples == 3 && bad.starts_with("1 no-image") && bad.contains("000000000042.jpg"), "{bad}");
    let garbage = |images: &Path| fs::write(images.join("COCO_val2014_000000000042.jpg"), "<html>404</html>").unwrap();
    let (samples, bad) = broken("a.json", coco.as_bytes(), garbage);
    assert!(samples == 3 && bad.starts_with("1 bad-image"), "{bad}");
    let (samples, bad) = broken("a.json", coco.replace("\"id\": 42,", "\"id\": 7,").as_bytes(), keep);
    assert!(samples == 3 && bad.contains("1 duplicate (7)") && bad.contains("no-image"), "{bad}");
    let (samples, bad) =
        broken("a.json", coco.replace("COCO_val2014_000000000042.jpg", "../images/x.jpg").as_bytes(), keep);
    assert!(samples == 3 && bad.starts_with("1 unsafe-name"), "{bad}");
    let (samples, bad) = broken("a.json", format!("\u{feff}{coco}").replace("\n", "\r\n").as_bytes(), keep);
    assert_eq!((samples, bad.as_str()), (4, ""));

    let list = golden_text("imageid.human-written-caption.txt");
    let mut gbk = list.clone().into_bytes();
    gbk.extend(b"COCO_val2014_000000000042#2\t\xd7\xc0\xd7\xd3\nno number\n");
    let (samples, bad) = broken("a.txt", &gbk, keep);
    assert!(samples == 4 && bad.contains("1 not-utf8") && bad.contains("1 bad-row") && bad.contains("line 7"), "{bad}");
    let crlf = format!("\u{feff}{}", list.replace('\n', "\r\n"));
    assert_eq!(broken("a.txt", crlf.as_bytes(), keep), (4, String::new()));
}

#[test]
fn bad_rows_of_tables_are_left_out_and_counted() {
    let keep = |_: &Path| {};
    let name = "COCO_val2014_000000000042.jpg";
    let rows = format!(
        "{{\"image\":\"{name}\",\"caption\":\"猫\"}}\n{{\"image\":\"none.jpg\",\"caption\":\"猫\"}}\n\
        {{\"image\":\"{name}\",\"caption\":\"\"}}\n{{\"image\":\"{name}\",\"caption\":{{}}}}\nnot json\n{{\"caption\":\"猫\"}}\n"
    );
    let (samples, bad) = broken("a.jsonl", rows.as_bytes(), keep);
    assert_eq!(samples, 1);
    for part in ["2 no-image", "1 no-caption", "1 bad-json", "1 bad-row", "a.jsonl: row 4"] {
        assert!(bad.contains(part), "{part}: {bad}");
    }
    let images = golden_text("train_imgs.tsv");
    let (folder, request) = twin("t_imgs.tsv", format!("9\t!!!\nno tab\n{images}").as_bytes());
    fs::write(
        folder.path().join("t_texts.jsonl"),
        golden_text("train_texts.jsonl") + "{\"text_id\": 9, \"text\": 3}\n",
    )
    .unwrap();
    let report = build(&request, &folder.path().join("out")).unwrap();
    let bad = report.bad.to_string();
    assert!(report.samples == 4 && bad.contains("1 bad-base64") && bad.contains("2 bad-row"), "{bad}");
    fs::remove_file(folder.path().join("t_texts.jsonl")).unwrap();
    assert!(build(&request, &folder.path().join("out2")).unwrap_err().to_string().contains("t_texts.jsonl"));
}

#[test]
fn damaged_files_are_refused_before_anything_is_written() {
    let coco = golden_text("captions_val2014.json");
    let mut gbk = coco.clone().into_bytes();
    let night = gbk.windows(6).position(|bytes| bytes == "夜晚".as_bytes()).unwrap();
    gbk.splice(night..night + 6, *b"\xd7\xc0");
    let half = &coco.as_bytes()[..coco.len() / 2];
    let cases: [(&str, &[u8], &str); 6] = [
        ("a.json", half, "truncated"),
        ("a.json", &gbk, "iconv"),
        ("a.json", b"[]", "--format"),
        ("a.json", b"{\"images\": [{\"id\": 1}]}", "--format"),
        ("a.txt", b"just words\n", "--format"),
        ("a.pdf", b"%PDF", "--format"),
    ];
    for (name, text, expected) in cases {
        let (folder, request) = twin(name, text);
        let output = folder.path().join("out");
        let error = build(&request, &output).unwrap_err();
        assert!(with_hint(&error).contains(expected), "{expected}: {error:?}");
        assert!(!output.exists());
    }
}

/// Names and contents of the shards.
pub(super) fn shards(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = paths
        .filter(|path| path.is_file() && !path.ends_with(index::INDEX_FILE))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into(), fs::read(path).unwrap()));
    let mut shards: Vec<(String, Vec<u8>)> = named.collect();
    shards.sort();
    shards
}

#[test]
fn a_second_run_keeps_finished_shards_and_repairs_the_rest() {
    let (folder, request) = twin("a.json", golden_text("captions_val2014.json").as_bytes());
    let output = folder.path().join("out");
    build(&request, &output).unwrap();
    let whole = shards(&output);
    assert_eq!(
        whole.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json"]
    );
    fs::remove_file(output.join("00001.tar")).unwrap();
    fs::write(output.join("00001.tar.0123456789abcdef.tmp"), "half").unwrap();
    let report = build(&request, &output).unwrap();
    assert_eq!((report.shards, report.skipped_shards, report.samples), (1, 1, 4));
    assert_eq!(shards(&output), whole);
    // An image of the first shard changes.
    let image = folder.path().join("images/COCO_val2014_000000000042.jpg");
    fs::copy(folder.path().join("images/COCO_val2014_000000550529.jpg"), image).unwrap();
    let report = build(&request, &output).unwrap();
    assert_eq!((report.shards, report.skipped_shards), (1, 1));
}

#[test]
fn shards_of_other_sources_and_settings_are_never_replaced() {
    let (folder, request) = twin("a.json", golden_text("captions_val2014.json").as_bytes());
    let output = folder.path().join("out");
    build(&request, &output).unwrap();
    let whole = shards(&output);
    let refused = |error: crate::error::Error, part: &str| {
        assert!(error.to_string().contains(part), "{part}: {error}");
        assert_eq!(shards(&output), whole);
    };
    refused(builder(&request, &output, 2, Keys::Number).unwrap().run(|_| {}).unwrap_err(), "other settings");
    fs::copy(folder.path().join("a.json"), folder.path().join("b.json")).unwrap();
    let other = Request { source: folder.path().join("b.json").to_str().unwrap().into(), ..request.clone() };
    refused(build(&other, &output).unwrap_err(), "was built from");
    let text = golden_text("captions_val2014.json").replace("夜晚", "傍晚") + " ";
    fs::write(folder.path().join("a.json"), text).unwrap();
    refused(build(&request, &output).unwrap_err(), "has changed since");
    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("00000.tar"), "not ours").unwrap();
    let error = build(&request, &foreign).unwrap_err();
    assert!(error.to_string().contains("was not written by"), "{error}");
    assert_eq!(fs::read(foreign.join("00000.tar")).unwrap(), b"not ours");
}

#[test]
fn keys_are_ids_if_wanted_and_shards_do_not_depend_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let request = request(&golden("captions_val2014.json"));
    let run = |name: &str, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let builder = builder(&request, &folder.path().join(name), 3, Keys::Id).unwrap();
        pool.install(|| builder.run(|_| {})).unwrap();
        shards(&folder.path().join(name))
    };
    assert_eq!(run("one", 1), run("four", 4));
    let keys: Vec<String> = read(&folder.path().join("one")).into_keys().collect();
    assert_eq!(keys, ["1000", "42", "550529", "7"]);
}
