//! Shards written by the tests, valid and damaged, read back through the public interface.

use super::*;
use crate::config;
use ::tar::{Builder, EntryType, Header};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A tar built member by member; invalid members are possible.
pub(super) struct Tar(Builder<Vec<u8>>);

impl Tar {
    pub(super) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn raw(mut self, name: &[u8], kind: EntryType, size: u64, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(super) fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        let content = content.as_ref();
        self.raw(name.as_bytes(), EntryType::Regular, content.len() as u64, content)
    }

    /// Adds a sample whose image has a single color.
    pub(super) fn sample(self, key: &str, shade: u8) -> Self {
        self.file(&format!("{key}.png"), image(shade)).file(&format!("{key}.txt"), format!("第{shade}张"))
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    pub(super) fn write(self, path: &Path) {
        fs::write(path, self.bytes()).unwrap();
    }
}

pub(super) fn image(shade: u8) -> Vec<u8> {
    image_file::png(&::image::RgbImage::from_pixel(2, 2, ::image::Rgb([shade; 3]))).unwrap()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub(super) fn config(paths: &[(&Path, f64)]) -> config::Data {
    let source = |(path, weight): &(&Path, f64)| config::Source { path: path.display().to_string(), weight: *weight };
    config::Data { sources: paths.iter().map(source).collect(), ..Default::default() }
}

pub(super) fn open(path: &Path) -> Dataset {
    Dataset::open(&config(&[(path, 1.0)]), Kind::Pairs(2)).unwrap()
}

pub(super) fn causes(counts: &BadCounts) -> serde_json::Value {
    let mut value = serde_json::to_value(counts).unwrap();
    for found in value.as_object_mut().unwrap().values_mut() {
        *found = found["count"].take();
    }
    value
}

/// The keys of the readable samples, and the causes of the others.
pub(super) fn read_all(dataset: &Dataset) -> (Vec<String>, serde_json::Value) {
    let mut bad = dataset.bad.clone();
    let mut keys = Vec::new();
    for record in dataset.records(1) {
        match record {
            Ok(record) => keys.push(record.key),
            Err(one) => bad.add(one),
        }
    }
    (keys, causes(&bad))
}

pub(super) fn read_tar(tar: Vec<u8>) -> (Vec<String>, serde_json::Value) {
    let dir = folder();
    // A good shard after the bad one must still be read.
    fs::write(dir.path().join("0.tar"), tar).unwrap();
    Tar::new().sample("last", 9).write(&dir.path().join("1.tar"));
    let (mut keys, bad) = read_all(&open(dir.path()));
    assert_eq!(keys.pop().as_deref(), Some("last"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "reading writes nothing");
    (keys, bad)
}

#[test]
fn a_good_shard_is_read() {
    let json = r#"{"caption":"一","captions":["二"," 三\n四 ",""],"style":"x"}"#;
    let tar = Tar::new().sample("a", 1).file("b.jpg", "").file("b.txt", "x").sample("dir/c.d", 3);
    let tar = tar.file("e.png", image(4)).file("e.json", json).file("README", "").file(".hidden", "");
    let dir = folder();
    tar.write(&dir.path().join("0.tar"));
    let dataset = open(dir.path());
    let records: Vec<_> = dataset.records(1).collect();
    let keys: Vec<_> = records.iter().flatten().map(|record| record.key.as_str()).collect();
    // `dir/c.d.png` has the key `dir/c` and the extension `d.png`, as in WebDataset: it is not an image.
    assert_eq!(keys, ["a", "e"]);
    let last = records.last().unwrap().as_ref().unwrap();
    assert_eq!(last.captions, ["二", "三 四"]);
    assert_eq!(last.meta["style"], "x");
    assert_eq!(last.image.as_ref().unwrap().as_raw(), &[4; 12]);
}

#[test]
fn unsafe_members_are_counted() {
    let tar = Tar::new().sample("a", 1).file("../evil.png", "x").file("/etc/evil.png", "x");
    let tar = tar.raw(b"l.png", EntryType::Symlink, 0, b"").raw(b"h.png", EntryType::Link, 0, b"");
    let tar = tar.raw(b"d.png", EntryType::Char, 0, b"").raw(b"f.png", EntryType::Fifo, 0, b"");
    let tar = tar.raw(b"bad\xff.png", EntryType::Regular, 0, b"").raw(b"esc\x1b.png", EntryType::Regular, 0, b"");
    let tar = tar.raw(b"dir/", EntryType::Directory, 0, b"").sample("b", 2);
    let (keys, bad) = read_tar(tar.bytes());
    assert_eq!(keys, ["a", "b"]);
    assert_eq!(bad, serde_json::json!({"unsafe-name": 4, "not-a-file": 4}));
}

#[test]
fn duplicates_are_counted() {
    let tar = Tar::new().sample("a", 1).sample("b", 2).sample("a", 3);
    let tar = tar.file("c.txt", "x").file("c.txt", "y").file("c.png", image(1));
    assert_eq!(read_tar(tar.bytes()), (vec!["a".into(), "b".into()], serde_json::json!({"duplicate": 2})));
}

#[test]
fn a_truncated_shard_keeps_its_complete_samples() {
    let whole = Tar::new().sample("a", 1).sample("b", 2).bytes();
    for cut in 0..whole.len() {
        let (keys, bad) = read_tar(whole[..cut].to_vec());
        assert!(keys.len() <= 2 && keys.iter().zip(["a", "b"]).all(|(key, expected)| key == expected));
        if keys.len() < 2 && cut % 512 != 0 {
            assert!(bad.as_object().is_some_and(|bad| !bad.is_empty()), "the cut at {cut} was not detected");
        }
    }
}

#[test]
fn damaged_shards_do_not_panic() {
    let whole = Tar::new().sample("a", 1).bytes();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        read_tar(damaged);
    }
}

#[test]
fn malicious_sizes_are_refused() {
    let huge = Tar::new().sample("a", 1).raw(b"big.png", EntryType::Regular, 8 << 30, b"").sample("b", 2);
    assert_eq!(read_tar(huge.bytes()), (vec!["a".into()], serde_json::json!({"broken-tar": 1})));
    let negative = Tar::new().sample("a", 1).raw(b"big.png", EntryType::Regular, u64::MAX - 100, b"");
    assert_eq!(read_tar(negative.bytes()), (vec!["a".into()], serde_json::json!({"broken-tar": 1})));
    let bomb = vec![b'1'; 1 << 20];
    let pax = Tar::new().sample("a", 1).raw(b"x", EntryType::XHeader, 1 << 20, &bomb).file("c.png", "x").sample("b", 2);
    assert_eq!(read_tar(pax.bytes()), (vec!["a".into(), "b".into()], serde_json::json!({"too-large": 1})));
    let pax = Tar::new().raw(b"x", EntryType::XHeader, 9, b"nonsense\n").file("c.png", "x").sample("b", 2);
    assert_eq!(read_tar(pax.bytes()), (vec!["b".into()], serde_json::json!({"broken-tar": 1})));
}

#[test]
fn long_names_are_read() {
    let long = format!("{}/中文", "x".repeat(150));
    let mut tar = Builder::new(Vec::new());
    for (extension, content) in [("png", image(1)), ("txt", b"x".to_vec())] {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, format!("{long}.{extension}"), content.as_slice()).unwrap();
    }
    let pax = format!("path={long}b.png\n");
    let pax = format!("{} {pax}", pax.len() + 4);
    let content = image(2);
    let tar = Tar(tar).raw(b"p", EntryType::XHeader, pax.len() as u64, pax.as_bytes());
    let tar = tar.raw(b"short.png", EntryType::Regular, content.len() as u64, &content);
    let (keys, bad) = read_tar(tar.bytes());
    // The second sample has no text, but its name comes from the extended header.
    assert_eq!((keys, bad), (vec![long], serde_json::json!({"no-caption": 1})));
}

#[test]
fn bad_text_and_json_are_counted_or_ignored() {
    let with = |text: &[u8]| Tar::new().file("a.png", image(1)).file("a.txt", text).bytes();
    let only = |cause: &str| (Vec::<String>::new(), serde_json::json!({cause: 1}));
    assert_eq!(read_tar(with(b"\xff\xfe")), only("not-utf8"));
    assert_eq!(read_tar(with(b" \n\0\t")), only("no-caption"));
    assert_eq!(read_tar(with(&vec![b'x'; 10 << 20])), only("too-large"));
    assert_eq!(read_tar(with(b"a\0b")).0, ["a"]);
    let deep = "[".repeat(100_000);
    let json = Tar::new().sample("a", 1).file("a.json", deep).bytes();
    // The JSON is ignored; the text is good.
    assert_eq!(read_tar(json), (vec!["a".into()], serde_json::json!({})));
    let json = Tar::new().file("a.png", image(1)).file("a.json", "[").bytes();
    assert_eq!(read_tar(json), only("bad-json"));
    let no_image = Tar::new().file("a.txt", "x").bytes();
    assert_eq!(read_tar(no_image), only("no-image"));
}

#[test]
fn a_folder_of_pairs_is_read() {
    let dir = folder();
    fs::write(dir.path().join("a.png"), image(1)).unwrap();
    fs::write(dir.path().join("a.txt"), "甲").unwrap();
    fs::write(dir.path().join("b.PNG"), image(2)).unwrap();
    fs::write(dir.path().join("b.json"), r#"{"caption":"乙"}"#).unwrap();
    fs::write(dir.path().join("c.png"), "").unwrap();
    fs::create_dir(dir.path().join(".hidden")).unwrap();
    fs::write(dir.path().join(".hidden/d.png"), image(3)).unwrap();
    let dataset = Dataset::open(&config(&[(dir.path(), 1.0)]), Kind::Images(4)).unwrap();
    let (keys, bad) = read_all(&dataset);
    assert_eq!((keys, bad), (vec!["a".into(), "b".into()], serde_json::json!({"bad-image": 1})));
    let captions: Vec<_> = dataset.records(1).flatten().map(|record| record.caption).collect();
    assert_eq!(captions, ["甲", "乙"]);
    let one = Dataset::open(&config(&[(&dir.path().join("a.*g"), 1.0)]), Kind::Pairs(4)).unwrap();
    assert_eq!(read_all(&one).0, ["a"]);
}

#[test]
fn sources_may_be_lists_and_globs() {
    let dir = folder();
    for i in 8..11 {
        Tar::new().sample(&format!("{i}"), i).write(&dir.path().join(format!("{i:03}.tar")));
    }
    let keys = |pattern: &str| read_all(&open(&dir.path().join(pattern))).0;
    assert_eq!(keys("{008..010}.tar"), ["8", "9", "10"]);
    assert_eq!(keys("{010,008}.tar"), ["10", "8"]);
    assert_eq!(keys("00*.tar"), ["8", "9"]);
    assert!(Dataset::open(&config(&[(&dir.path().join("{7..8}.tar"), 1.0)]), Kind::Captions).is_err());
    assert!(Dataset::open(&config(&[]), Kind::Captions).is_err());
}

#[test]
fn code_shards_are_read() {
    let dir = folder();
    let tar = Tar::new().file("a.npy", npy([1, 2], &[3, 4])).file("a.txt", "甲");
    let tar = tar.file("b.npy", npy([2, 1], &[3, 4])).file("b.txt", "乙").file("c.npy", "").file("c.txt", "丙");
    tar.write(&dir.path().join("0.tar"));
    let open = || Dataset::open(&config(&[(dir.path(), 1.0)]), Kind::Codes);
    assert!(crate::error::hint_of(&open().unwrap_err()).is_some_and(|hint| hint.contains("data encode")));
    let info = CodesInfo { tokenizer: "x".into(), grid: [1, 2], codebook_size: 5 };
    fs::write(dir.path().join(CODES_FILE), serde_json::to_vec(&info).unwrap()).unwrap();
    let dataset = open().unwrap();
    assert_eq!(dataset.codes(), Some(&info));
    assert_eq!(dataset.read(0, 0).unwrap().codes, Some(vec![3, 4]));
    assert_eq!(read_all(&dataset).1, serde_json::json!({"bad-codes": 2}));
}

/// Two shards with 20 samples, of which those below `bad` are bad.
fn numbered(dir: &Path, bad: u8) -> PathBuf {
    for shard in 0..2 {
        let mut tar = Tar::new();
        for i in shard * 10..shard * 10 + 10 {
            tar = if i < bad { tar.file(&format!("{i}.png"), "bad") } else { tar.sample(&format!("{i}"), i) };
        }
        tar.write(&dir.join(format!("{shard}.tar")));
    }
    dir.to_path_buf()
}

fn loader(dataset: &Arc<Dataset>, data: &config::Data, position: u64) -> Loader {
    part_loader(dataset, data, position, 0..3)
}

/// Loads only the samples `mine` of each batch of three.
fn part_loader(dataset: &Arc<Dataset>, data: &config::Data, position: u64, mine: std::ops::Range<usize>) -> Loader {
    Loader::new(dataset, data, Sampler::new(5, "test", &dataset.shares()), 3, vec![mine], position, 1).unwrap()
}

fn keys(loader: &mut Loader, batches: usize) -> Vec<String> {
    (0..batches).flat_map(|_| loader.next_batch().unwrap()).map(|record| record.key).collect()
}

#[test]
fn the_order_is_the_same_for_any_number_of_workers_and_any_start() {
    let dir = folder();
    let path = numbered(dir.path(), 3);
    let mut data = config(&[(&path, 1.0)]);
    data.max_bad_ratio = 0.5;
    let dataset = Arc::new(Dataset::open(&data, Kind::Pairs(2)).unwrap());
    let expected = keys(&mut loader(&dataset, &data, 0), 20);
    for (workers, prefetch) in [(2, 1), (3, 8), (7, 2)] {
        (data.workers, data.prefetch) = (workers, prefetch);
        let mut from_start = loader(&dataset, &data, 0);
        assert_eq!(keys(&mut from_start, 20), expected);
        assert!(from_start.bad().total() >= 9);
        assert_eq!(keys(&mut loader(&dataset, &data, 27), 11), expected[27..]);
    }
    let [first, second] = [0..2, 2..3].map(|mine| keys(&mut part_loader(&dataset, &data, 0, mine), 20));
    let together: Vec<String> = first.chunks(2).zip(&second).flat_map(|(a, b)| [&a[0], &a[1], b]).cloned().collect();
    assert_eq!(together, expected);
}

#[test]
fn too_many_bad_samples_end_the_run() {
    let dir = folder();
    for bad in [10, 20] {
        let data = config(&[(&numbered(dir.path(), bad), 1.0)]);
        let dataset = Arc::new(Dataset::open(&data, Kind::Pairs(2)).unwrap());
        let mut loader = loader(&dataset, &data, 0);
        let error = (0..100).find_map(|_| loader.next_batch().err()).expect("the bound holds").to_string();
        assert!(error.contains("bad-image") || error.contains("no-caption"), "{error}");
        assert!(error.contains(".tar: "), "{error}");
    }
}
