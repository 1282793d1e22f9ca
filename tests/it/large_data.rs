//! A data set of many shards opens in little memory. Memory is of the whole process, so the test runs itself again in a
//! separate process.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::{Instant, UNIX_EPOCH},
};
use vilg::{
    data::{Sampler, Shard, Source, index::INDEX_FILE},
    runtime::resident_bytes,
};

/// A tenth of the paper's data, of 1,000 samples each.
const SHARDS: u64 = 14_500;
/// Names the folder to the separate process.
const FOLDER: &str = "VILG_TEST_LARGE_DATA";

/// Shards and their index. The shards and the places of the samples are holes in sparse files.
fn sparse(folder: &Path) {
    let shard = |number: u64| folder.join(format!("{number:06}.tar"));
    let entry = |number: u64| {
        File::create(shard(number)).unwrap().set_len(512 << 10).unwrap();
        let modified = fs::metadata(shard(number)).unwrap().modified().unwrap();
        let modified = modified.duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let (name, first) = (format!("{number:06}.tar"), number * 1000);
        serde_json::json!({"name": name, "size": 512 << 10, "modified": modified, "samples": 1000, "first": first})
    };
    let json = serde_json::to_vec(&(0..SHARDS).map(entry).collect::<Vec<_>>()).unwrap();
    let (places, length) = (8000 * SHARDS, json.len() as u64);
    let file = File::create(folder.join(INDEX_FILE)).unwrap();
    for (bytes, at) in [(&b"vilgidx1"[..], 0), (&json, 8 + places), (&length.to_le_bytes(), 8 + places + length)] {
        file.write_all_at(bytes, at).unwrap();
    }
    file.write_all_at(b"vilgidx1", 16 + places + length).unwrap();
}

#[test]
fn a_stored_index_of_14_million_samples_opens_within_50_mb() {
    if let Ok(folder) = std::env::var(FOLDER) {
        let (before, start) = (resident_bytes(), Instant::now());
        let source = Source::open(&folder, 1.0).unwrap();
        let opened = start.elapsed();
        let lengths = source.shards.iter().map(Shard::len).collect();
        let sampler = Sampler::new(1, "train", &[(source.len(), 1.0)]).streamed(8192, 1000, vec![lengths]);
        let draws = (0..1000).filter_map(|step| sampler.at(SHARDS * step)).count();
        let used = resident_bytes().saturating_sub(before);
        println!("opened in {opened:.2?}, the order known after {:.2?}, {} MB", start.elapsed(), used >> 20);
        assert_eq!((source.len(), source.damage().total(), draws), (1000 * SHARDS, 0, 1000));
        assert!(used < 50 << 20, "{used} bytes");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    sparse(folder.path());
    let name = "large_data::a_stored_index_of_14_million_samples_opens_within_50_mb";
    let mut itself = Command::new(std::env::current_exe().unwrap());
    let output = itself.args(["--exact", name, "--nocapture"]).env(FOLDER, folder.path()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{printed}");
    assert!(output.status.success() && printed.contains("opened in"), "{printed}");
}
