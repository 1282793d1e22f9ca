//! Broken twins of the files in each format: what cannot be used is counted by cause or refused, and nothing is doubled.

use super::{
    Request,
    tests::{broken, build, golden, golden_text, read, request, twin, with_hint},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{
    fs,
    path::{Path, PathBuf},
};

pub(super) const CAT: &str = "COCO_val2014_000000550529";

/// `text` with the first `夜晚` in GBK.
pub(super) fn in_gbk(text: &str) -> Vec<u8> {
    let at = text.find("夜晚").unwrap();
    [&text.as_bytes()[..at], b"\xd2\xb9\xcd\xed", &text.as_bytes()[at + "夜晚".len()..]].concat()
}

pub(super) fn with_mark_and_crlf(text: &str) -> Vec<u8> {
    format!("\u{feff}{}", text.replace('\n', "\r\n")).into_bytes()
}

/// The request for a twin is refused with a text, and nothing is written.
pub(super) fn refused(name: &str, text: &[u8], change: impl Fn(Request) -> Request, expected: &str) {
    let (folder, request) = twin(name, text);
    let output = folder.path().join("out");
    let error = build(&change(request), &output).unwrap_err();
    assert!(with_hint(&error).contains(expected), "{expected}: {}", with_hint(&error));
    assert!(!output.exists(), "{expected}");
}

#[test]
fn each_json_format_has_its_twins() {
    let sources = [
        ("captions_val2014.json", None, 4),
        ("caption_train_annotations_20170902.json", None, 4),
        ("FM-CH-QA.json", Some("train".to_owned()), 2),
    ];
    for (name, split, samples) in sources {
        let text = golden_text(name).replace("}, {", "},\n{");
        let of_split = |request| Request { split: split.clone(), ..request };
        let found = |text: &[u8], break_image: &dyn Fn(PathBuf)| {
            let (folder, request) = twin("a.json", text);
            break_image(folder.path().join(format!("images/{CAT}.jpg")));
            let report = build(&of_split(request), &folder.path().join("out")).unwrap();
            (report.samples, report.bad.to_string())
        };
        assert_eq!(found(&with_mark_and_crlf(&text), &|_| {}), (samples, String::new()), "{name}");
        let (kept, bad) = found(text.as_bytes(), &|image| fs::remove_file(image).unwrap());
        assert!(kept == samples - 1 && bad.starts_with("1 no-image (") && bad.contains("550529"), "{name}: {bad}");
        let (kept, bad) = found(text.as_bytes(), &|image| fs::write(image, "<html>404</html>").unwrap());
        assert!(kept == samples - 1 && bad.starts_with("1 bad-image ("), "{name}: {bad}");
        let (kept, bad) = found(text.as_bytes(), &|image| {
            let bytes = fs::read(&image).unwrap();
            fs::write(image, &bytes[..bytes.len() / 2]).unwrap();
        });
        assert!(kept == samples - 1 && bad.starts_with("1 bad-image ("), "{name}: {bad}");
        refused("a.json", &in_gbk(&text), of_split, "iconv");
        // Between two characters and within one.
        let night = text.find("夜晚").unwrap();
        for length in [night, night + 1] {
            refused("a.json", &text.as_bytes()[..length], of_split, "truncated");
        }
        refused("a.json", b"", of_split, "truncated");
    }
}

#[test]
fn ids_that_occur_twice_in_json_are_counted_once() {
    let keep = |_: &Path| {};
    let coco = golden_text("captions_val2014.json").replace("\"id\": 11", "\"id\": 10");
    let (samples, bad) = broken("a.json", coco.as_bytes(), keep);
    assert!(samples == 4 && bad.starts_with("1 duplicate (") && bad.contains("annotation 10 of image 42)"), "{bad}");
    // An id of an annotation may occur again with another image.
    let coco = golden_text("captions_val2014.json").replace("\"id\": 20", "\"id\": 10");
    assert_eq!(broken("a.json", coco.as_bytes(), keep), (4, String::new()));

    let aic = golden_text("caption_train_annotations_20170902.json");
    let (samples, bad) = broken("a.json", aic.replace("000000000042", "000000550529").as_bytes(), keep);
    assert_eq!((samples, bad), (3, format!("1 duplicate ({CAT}.jpg)")));
    for (from, to, cause) in [
        ("[\"夜晚的街道\"]", "[]", "1 no-caption ("),
        ("[\"夜晚的街道\"]", "[7]", "1 bad-row ("),
        ("\"caption\": [\"夜晚的街道\"]", "\"text\": 1", "1 bad-row ("),
        ("\"COCO_val2014_000000000007.png\"", "\"../x.png\"", "1 unsafe-name ("),
        ("\"COCO_val2014_000000000007.png\"", "null", "1 bad-row ("),
    ] {
        let (samples, bad) = broken("a.json", aic.replace(from, to).as_bytes(), keep);
        assert!(samples == 3 && bad.starts_with(cause), "{to}: {bad}");
    }

    let questions = |from: &str, to: &str| {
        let (folder, request) = twin("a.json", golden_text("FM-CH-QA.json").replace(from, to).as_bytes());
        let output = folder.path().join("out");
        let report = build(&Request { split: Some("train".into()), ..request }, &output).unwrap();
        let asked = read(&output).values().map(|sample| sample.json["questions"].as_array().unwrap().len()).sum();
        (report.samples, asked, report.bad.to_string())
    };
    let (samples, asked, bad): (u64, usize, String) = questions("\"question_id\": 3", "\"question_id\": 1");
    assert!((samples, asked) == (2, 2) && bad.starts_with("1 duplicate (") && bad.contains("question 1 of"), "{bad}");
    assert_eq!(questions("\"question_id\": 2", "\"question_id\": 1"), (2, 3, String::new()));
    let (samples, asked, bad) = questions("\"Answer\": \"两个。\", ", "");
    assert!((samples, asked) == (1, 2) && bad.starts_with("1 bad-row ("), "{bad}");
}

#[test]
fn caption_lists_have_their_twins() {
    for list in ["imageid.human-written-caption.txt", "flickr-form.txt"] {
        let text = golden_text(list);
        let first = text.lines().next().unwrap();
        let (samples, bad) = broken("a.txt", format!("{text}{first}\n").as_bytes(), |_| {});
        assert!(samples == 4 && bad.starts_with("1 duplicate (") && bad.contains("line 7: COCO_val2014"), "{bad}");
        let remove = |images: &Path| fs::remove_file(images.join(format!("{CAT}.jpg"))).unwrap();
        assert_eq!(broken("a.txt", text.as_bytes(), remove), (3, format!("1 no-image ({CAT})")));
        let (samples, bad) = broken("a.txt", &in_gbk(&text), |_| {});
        assert!(samples == 3 && bad.starts_with("1 not-utf8 (") && bad.contains("line 6"), "{bad}");
        assert_eq!(broken("a.txt", &with_mark_and_crlf(&text), |_| {}), (4, String::new()));
        // Two files that the id could mean.
        let copy = |images: &Path| {
            fs::copy(images.join(format!("{CAT}.jpg")), images.join(format!("{CAT}.jpeg"))).map(drop).unwrap();
        };
        let (samples, bad) = broken("a.txt", text.as_bytes(), copy);
        assert_eq!((samples, bad), (3, format!("1 duplicate ({CAT} is both {CAT}.jpeg and {CAT}.jpg)")));
    }
}

/// Builds the pair of files of Chinese-CLIP: number of samples, number of captions, damage.
fn pair(images: &[u8], texts: &[u8]) -> (u64, usize, String) {
    let (folder, request) = twin("t_imgs.tsv", images);
    fs::write(folder.path().join("t_texts.jsonl"), texts).unwrap();
    let output = folder.path().join("out");
    let report = build(&request, &output).unwrap();
    (report.samples, read(&output).values().map(|sample| sample.captions().len()).sum(), report.bad.to_string())
}

#[test]
fn pairs_of_files_have_their_twins() {
    let (images, texts) = (golden_text("train_imgs.tsv"), golden_text("train_texts.jsonl"));
    let (of_images, of_texts) = (images.as_bytes(), texts.as_bytes());
    assert_eq!(pair(&with_mark_and_crlf(&images), &with_mark_and_crlf(&texts)), (4, 5, String::new()));
    let again = images.lines().next().unwrap();
    assert_eq!(pair(format!("{images}{again}\n").as_bytes(), of_texts), (4, 5, "1 duplicate (550529)".into()));
    let (samples, captions, bad) = pair(of_images, texts.repeat(2).as_bytes());
    assert!((samples, captions) == (4, 5) && bad.starts_with("5 duplicate ("), "{bad}");
    assert!(bad.contains("line 5: text_id 0 of image 550529"), "{bad}");
    let (_, captions, bad) = pair(of_images, texts.replace("[42]", "[42, 42]").as_bytes());
    assert!(captions == 5 && bad.starts_with("1 duplicate (") && bad.contains("text_id 1 of image 42"), "{bad}");
    let night = texts.replace("一张图画", "夜晚");
    let (samples, captions, bad) = pair(of_images, &in_gbk(&night));
    assert!((samples, captions) == (2, 3) && bad.contains("2 no-caption") && bad.contains("1 not-utf8"), "{bad}");
    let (samples, _, bad) = pair(of_images, texts.replace("[42]", "[43]").as_bytes());
    assert!(samples == 3 && bad.contains("1 no-image") && bad.contains("1 no-caption (42)"), "{bad}");
    let (samples, _, bad) = pair(of_images, texts.replace("[42]", "[]").as_bytes());
    assert!(samples == 3 && bad.contains("1 bad-row") && bad.contains("line 2"), "{bad}");
    let start = images.find("550529\t").unwrap() + "550529\t".len();
    let line = images[start..].find('\n').unwrap();
    let with_image = |base64: &str| format!("{}{base64}{}", &images[..start], &images[start + line..]);
    for (base64, cause) in [
        ("!!!".to_owned(), "1 bad-base64 (550529"),
        (images[start..start + line - 3].to_owned(), "1 bad-base64 (550529"),
        (BASE64_STANDARD.encode("<html>404</html>"), "1 bad-image (550529"),
        (String::new(), "1 bad-image (550529"),
    ] {
        let (samples, _, bad) = pair(with_image(&base64).as_bytes(), of_texts);
        assert!(samples == 3 && bad.starts_with(cause), "{cause}: {bad}");
    }
}

/// Builds a copy of img2dataset's shards after a change: number of samples, damage.
fn downloaded(change: impl Fn(&Path)) -> crate::error::Result<(u64, String)> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(golden("img2dataset")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
    }
    change(&source);
    let output = folder.path().join("out");
    let built = build(&request(&source), &output).map(|report| {
        assert!(report.ignored.is_empty(), "{}", report.ignored);
        (report.samples, report.bad.to_string())
    });
    assert!(built.is_ok() || !output.exists());
    built
}

type Member = (String, Vec<u8>);

/// Writes a shard again with other members.
fn rewrite(shard: &Path, change: impl Fn(Vec<Member>) -> Vec<Member>) {
    let bytes = fs::read(shard).unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let members = archive.entries().unwrap().map(|entry| {
        let (mut entry, mut content) = (entry.unwrap(), Vec::new());
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        (entry.path().unwrap().display().to_string(), content)
    });
    let members = change(members.collect());
    let mut builder = tar::Builder::new(fs::File::create(shard).unwrap());
    members.iter().for_each(|(name, content)| crate::data::output::append(&mut builder, name, content).unwrap());
    builder.finish().unwrap();
}

fn cut(path: &Path, length: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

#[test]
fn shards_of_img2dataset_have_their_twins() {
    let shard = |folder: &Path| folder.join("00000.tar");
    let renamed = |members: Vec<Member>, from: &str, to: &str| -> Vec<Member> {
        members.into_iter().map(|(name, content)| (name.replace(from, to), content)).collect()
    };
    let (samples, bad) = downloaded(|_| {}).unwrap();
    let failed = "00001.parquet: 000010: failed_to_download";
    assert!(samples == 3 && bad.starts_with("1 no-image (") && bad.contains(failed), "{bad}");
    // The shard ends in the first header of the second sample, in its image, and after its image.
    for (length, others) in [(6656 + 88, "2 no-image ("), (8192 + 100, "2 no-image ("), (9216 + 300, "1 no-caption (")]
    {
        let (samples, bad) = downloaded(|folder| cut(&shard(folder), length)).unwrap();
        assert!(samples == 2 && bad.contains("1 broken-tar (") && bad.contains(others), "{length}: {bad}");
        assert_eq!(bad.contains("00000.parquet: 000001: not in "), others == "2 no-image (", "{bad}");
    }
    let without = |members: Vec<Member>| members.into_iter().filter(|(name, _)| !name.starts_with("000001.")).collect();
    let (samples, bad) = downloaded(|folder| rewrite(&shard(folder), without)).unwrap();
    assert!(samples == 2 && bad.starts_with("2 no-image (") && bad.contains("000001: not in "), "{bad}");
    let no_image = |members| renamed(members, "000001.jpg", "000001.jpg2");
    let (samples, bad) = downloaded(|folder| rewrite(&shard(folder), no_image)).unwrap();
    assert!(samples == 2 && bad.starts_with("2 no-image (") && bad.contains("00000.tar: 000001"), "{bad}");
    let (samples, bad) = downloaded(|folder| fs::remove_file(shard(folder)).unwrap()).unwrap();
    assert!(samples == 1 && bad.starts_with("3 no-image (") && bad.contains("000000: not in "), "{bad}");
    // A key that occurs again after another one, and at once.
    let again = |members: Vec<Member>| members.iter().chain(&members[..3]).cloned().collect();
    let (samples, bad) = downloaded(|folder| rewrite(&shard(folder), again)).unwrap();
    assert!(samples == 3 && bad.contains("1 duplicate (") && bad.contains("00000.tar: 000000"), "{bad}");
    let (samples, bad) =
        downloaded(|folder| rewrite(&shard(folder), |members| renamed(members, "000001.", "000000."))).unwrap();
    assert!(samples == 1 && bad.contains("1 duplicate (") && bad.contains("2 no-image ("), "{bad}");
    // The table of another shard.
    let other = |folder: &Path| {
        fs::copy(folder.join("00000.parquet"), folder.join("00001.parquet")).map(|_| ()).unwrap();
    };
    let (samples, bad) = downloaded(other).unwrap();
    assert!(samples == 3 && bad.starts_with("2 no-image (") && bad.contains("00001.parquet: 000000: not in"), "{bad}");
    // The table names a key twice.
    let (samples, bad) = downloaded(|folder| doubled_rows(&folder.join("00000.parquet"))).unwrap();
    assert!(samples == 3 && bad.contains("2 duplicate (") && bad.contains("00000.parquet: 000000"), "{bad}");
    // The table is cut in the middle, or empty.
    for length in [0, 1000] {
        let error = downloaded(|folder| cut(&folder.join("00001.parquet"), length)).unwrap_err();
        let said = with_hint(&error);
        assert!(said.contains("00001.parquet is damaged") && said.contains("or remove it"), "{said}");
    }
    let (samples, bad) = downloaded(|folder| fs::remove_file(folder.join("00001.parquet")).unwrap()).unwrap();
    assert_eq!((samples, bad.as_str()), (3, ""));
}

/// Writes each row of a parquet file twice.
fn doubled_rows(path: &Path) {
    let mut table = crate::data::table::Table::open(path).unwrap();
    let mut doubled = std::io::BufWriter::new(fs::File::create(path.with_extension("new")).unwrap());
    let mut writer = table.writer(&mut doubled).unwrap();
    while let Some(rows) = table.next_batch().unwrap() {
        let keep = vec![true; rows.len()];
        (0..2).for_each(|_| writer.write(&rows, &keep).unwrap());
    }
    writer.finish().unwrap();
    drop(doubled);
    fs::rename(path.with_extension("new"), path).unwrap();
}
