//! Stored indexes and sequential reading, against reading headers and reading at random.

use super::{
    index::{self, INDEX_FILE, Index},
    tests::{Tar, config as of_paths, open, read_all},
    *,
};
use crate::config;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

/// Shards of samples of different sizes, the second one cut within its last sample, the third one without a sample.
fn shards(folder: &Path) -> Vec<PathBuf> {
    let long = "长".repeat(300);
    Tar::new().sample("a", 1).sample("b", 2).file("c.png", "x").file("c.txt", &long).write(&folder.join("0.tar"));
    let mut cut = Tar::new().sample("a", 4).sample("b", 5).bytes();
    cut.truncate(cut.len() - 1024 - 500);
    fs::write(folder.join("1.tar"), cut).unwrap();
    fs::write(folder.join("2.tar"), "no tar").unwrap();
    ["0.tar", "1.tar", "2.tar"].map(|name| folder.join(name)).into()
}

#[test]
fn a_stored_index_says_what_the_headers_say() {
    let dir = tempfile::tempdir().unwrap();
    let paths = shards(dir.path());
    let before = read_all(&open(dir.path()));
    let digests = |dataset: &Dataset| -> Vec<_> {
        dataset.sources[0].shards.iter().map(|shard| (shard.len(), shard.digest(true).unwrap())).collect()
    };
    let digests_before = digests(&open(dir.path()));
    assert_eq!(index::update(dir.path(), &paths).unwrap(), 3);
    assert_eq!(index::update(dir.path(), &paths).unwrap(), 0);
    let after = open(dir.path());
    assert_eq!((read_all(&after), digests(&after)), (before.clone(), digests_before));
    // The index is really used: with places of its own, other samples are read.
    let mut bytes = fs::read(dir.path().join(INDEX_FILE)).unwrap();
    bytes.copy_within(16..24, 8);
    fs::write(dir.path().join(INDEX_FILE), &bytes).unwrap();
    let (keys, _) = read_all(&open(dir.path()));
    assert_eq!(keys[..2], ["b", "b"]);
    for damaged in [&bytes[..bytes.len() - 1], b"vilgidx1", b""] {
        fs::write(dir.path().join(INDEX_FILE), damaged).unwrap();
        assert_eq!(read_all(&open(dir.path())), before);
    }
}

#[test]
fn an_index_follows_its_shards() {
    let dir = tempfile::tempdir().unwrap();
    let paths = shards(dir.path());
    index::update(dir.path(), &paths).unwrap();
    Tar::new().sample("new", 7).write(&paths[2]);
    let changed = read_all(&open(dir.path()));
    assert!(changed.0.contains(&"new".to_owned()), "a changed shard is read again");
    assert_eq!(index::update(dir.path(), &paths).unwrap(), 1);
    assert_eq!(read_all(&open(dir.path())), changed);
    fs::remove_file(&paths[0]).unwrap();
    Tar::new().sample("more", 8).write(&dir.path().join("3.tar"));
    assert_eq!(index::update(dir.path(), &[dir.path().join("3.tar")]).unwrap(), 1);
    let names = |folder: &Path| {
        let bytes = fs::read(folder.join(INDEX_FILE)).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        ["0.tar", "1.tar", "2.tar", "3.tar"].map(|name| text.contains(name))
    };
    assert_eq!(names(dir.path()), [false, true, true, true]);
    fs::write(dir.path().join(INDEX_FILE), "notes of a user").unwrap();
    assert!(index::update(dir.path(), &paths).is_err());
    assert_eq!(fs::read_to_string(dir.path().join(INDEX_FILE)).unwrap(), "notes of a user");
}

#[test]
fn many_shards_are_indexed_once() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("in");
    fs::create_dir(&source).unwrap();
    for shard in 0..120_u8 {
        Tar::new().sample("a", shard).write(&source.join(format!("{shard:03}.tar")));
    }
    let keys = thread::scope(|scope| {
        let ranks: Vec<_> = (0..4).map(|_| scope.spawn(|| read_all(&open(&source)))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(keys.iter().all(|(keys, bad)| keys.len() == 120 && bad == &serde_json::json!({})));
    assert!(Index::open(&source).is_some());
    let left: Vec<_> = fs::read_dir(&source).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 121, "{left:?}");
}

/// The keys and captions of one epoch, read by `ranks` ranks with `workers` threads each, in the order of positions.
fn epoch(
    data: &config::Data,
    dataset: &Arc<Dataset>,
    batch: usize,
    ranks: usize,
    workers: usize,
) -> Vec<(String, String)> {
    let data = config::Data { workers, ..data.clone() };
    let sampler = Sampler::new(3, "train", &dataset.shares());
    let buffer = data.shuffle_buffer as u64;
    let sampler = if buffer > 0 { sampler.streamed(batch as u64, buffer, dataset.shard_lengths()) } else { sampler };
    let steps = sampler.epoch_length() as usize / batch;
    let mut loaders: Vec<Loader> = (0..ranks)
        .map(|rank| {
            let part = crate::dist::part(batch, rank, ranks);
            Loader::new(dataset, &data, sampler.clone(), batch, std::iter::once(part.start..part.end).collect(), 0, 1)
                .unwrap()
        })
        .collect();
    let mut read = Vec::new();
    for _ in 0..steps {
        for loader in &mut loaders {
            read.extend(loader.next_batch().unwrap().into_iter().map(|record| (record.key, record.caption)));
        }
    }
    read
}

#[test]
fn streams_read_each_sample_once_for_any_ranks_and_workers() {
    let dir = tempfile::tempdir().unwrap();
    for shard in 0..7_u8 {
        let tar = (0..16 + shard % 3).fold(Tar::new(), |tar, n| tar.sample(&format!("{shard}-{n}"), 16 * shard + n));
        tar.write(&dir.path().join(format!("{shard}.tar")));
    }
    let dataset = Arc::new(open(dir.path()));
    let total = dataset.shares()[0].0 as usize;
    let data = config::Data { shuffle_buffer: 5, ..of_paths(&[(dir.path(), 1.0)]) };
    let whole = epoch(&data, &dataset, 6, 1, 1);
    assert_eq!(whole.len(), total / 6 * 6);
    assert_eq!(whole.iter().collect::<BTreeSet<_>>().len(), whole.len(), "a sample is read twice");
    for (ranks, workers) in [(1, 3), (2, 1), (3, 2), (6, 1)] {
        assert_eq!(epoch(&data, &dataset, 6, ranks, workers), whole, "{ranks} ranks, {workers} workers");
    }
    let paths: Vec<PathBuf> = (0..7).map(|shard| dir.path().join(format!("{shard}.tar"))).collect();
    index::update(dir.path(), &paths).unwrap();
    assert_eq!(epoch(&data, &Arc::new(open(dir.path())), 6, 2, 2), whole, "with a stored index");
}

#[test]
fn captions_come_from_the_fields_that_the_configuration_names() {
    let dir = tempfile::tempdir().unwrap();
    let json = r#"{"caption":"一","recaption":"二","alt":["三"," ","四"],"n":5}"#;
    let tar = Tar::new().sample("a", 1).file("a.json", json).sample("b", 2);
    tar.write(&dir.path().join("0.tar"));
    let captions = |keys: &[&str]| {
        let caption_keys = keys.iter().map(|key| (*key).to_owned()).collect();
        let data = config::Data { caption_keys, ..of_paths(&[(dir.path(), 1.0)]) };
        let dataset = Dataset::open(&data, Kind::Captions).unwrap();
        let read = dataset.records(1).map(|record| record.map(|record| record.captions).unwrap_or_default());
        read.map(|captions| captions.join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(captions(&[]), ["一", "第2张"]);
    assert_eq!(captions(&["recaption", "alt"]), ["二 三 四", ""]);
    assert_eq!(captions(&["alt", "txt", "n"]), ["三 四 第1张", "第2张"]);
}
