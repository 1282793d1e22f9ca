//! Training and the other commands on remote shards, read through the cache.

use super::{
    server::{Reply, Request, S3, Server},
    stderr,
};
use crate::ranks;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const SHARDS: usize = 24;

/// A folder for training, with 48 samples in 24 shards of codes.
fn prepare() -> TempDir {
    let folder = ranks::folder();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("more")).unwrap();
    for i in 0..2 * SHARDS {
        let pixel = |x: u32, y: u32| image::Rgb([x as u8 * 16, y as u8 * 16, i as u8 * 5]);
        image::RgbImage::from_fn(16, 16, pixel).save(at(&format!("more/{i:02}.png"))).unwrap();
        fs::write(at(&format!("more/{i:02}.txt")), ["一弯月", "红苹果", "小狗的脸"][i % 3]).unwrap();
    }
    fs::remove_dir_all(at("codes")).unwrap();
    for args in [
        &["data", "build", "more", "--samples-per-shard", "2", "-o", "pairs"][..],
        &["data", "encode", "pairs", "--model", "tokenizer", "-o", "codes"],
    ] {
        let output = vilg(folder.path(), args).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    folder
}

/// `vilg` without the credentials and proxies of this machine.
fn vilg(folder: &Path, args: &[&str]) -> Command {
    let mut command = super::bare();
    command.args(args).current_dir(folder).env("XDG_CACHE_HOME", folder.join("caches"));
    command
}

/// Size of a shard of codes in bytes.
fn shard_bytes(folder: &Path) -> u64 {
    fs::metadata(folder.join("codes/00000.tar")).unwrap().len()
}

fn train(folder: &Path, name: &str, source: &str, sets: &[&str]) -> Command {
    let mut command = vilg(folder, &["train", "--config", "tiny.toml", "--nproc", "2"]);
    let (name, sources) = (format!("name={name}"), format!("data.sources=[{{ path = \"{source}\" }}]"));
    for set in [name.as_str(), &sources, "train.steps=20", "train.batch_size=2", "train.caption_batch_size=2"]
        .into_iter()
        .chain(sets.iter().copied())
    {
        command.args(["--set", set]);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finish(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

/// Kills a run after some steps, and resumes it.
fn interrupted(folder: &Path, name: &str, run: impl Fn() -> Command) {
    let mut child = run().stderr(Stdio::null()).spawn().unwrap();
    let metrics = folder.join("runs").join(name).join("metrics.jsonl");
    let (steps, begun) = (|| fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()), Instant::now());
    while steps() < 7 && begun.elapsed() < Duration::from_secs(120) {
        thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!((7..20).contains(&steps()), "{} steps", steps());
    finish(run());
}

fn weights(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join("runs").join(name).join("model/model.safetensors")).unwrap()
}

fn cached(folder: &Path) -> u64 {
    let tars = super::files(folder).into_iter().filter(|path| path.extension().is_some_and(|e| e == "tar"));
    tars.map(|path| fs::metadata(path).unwrap().len()).sum()
}

/// Serves the files of a folder; each of the given requests fails.
fn serve(folder: PathBuf, fault: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> Server {
    Server::start(move |request, number| {
        let reply = match fs::read(folder.join(request.path.trim_start_matches('/'))) {
            Ok(content) => Reply::right(request, &content, &blake3::hash(&content).to_hex()[..8]),
            Err(_) => Reply::status(404),
        };
        fault(request, number).unwrap_or(reply)
    })
}

#[test]
fn training_from_s3_gives_the_bits_of_training_from_files() {
    let folder = prepare();
    let at = folder.path();
    let s3 = S3::start();
    s3.put("/pairs", b"");
    for name in fs::read_dir(at.join("codes")).unwrap().map(|entry| entry.unwrap().file_name()) {
        let name = name.to_str().unwrap();
        if !name.starts_with('.') {
            s3.put(&format!("/pairs/codes/{name}"), &fs::read(at.join("codes").join(name)).unwrap());
        }
    }
    // Sequentially, the cache holds 14 of the 24 shards.
    let small = format!("data.cache_gb={}", 14.5 * shard_bytes(at) as f64 / 1e9);
    for (order, sets) in [("random", vec!["data.workers=2"]), ("sequential", vec!["data.shuffle_buffer=2", &small])] {
        let local: Vec<&str> = sets.iter().copied().filter(|set| !set.contains("cache")).collect();
        let local_name = format!("local-{order}");
        finish(train(at, &local_name, "codes", &local));
        let name = format!("s3-{order}");
        let cache = format!("data.cache_dir=\"cache-{order}\"");
        let run = || {
            let sets: Vec<&str> = sets.iter().copied().chain([cache.as_str()]).collect();
            let mut command = train(at, &name, "s3://pairs/codes", &sets);
            command.envs([("AWS_ENDPOINT_URL", s3.url()), ("AWS_REGION", "us-east-1".to_owned())]);
            command.envs([("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]);
            command
        };
        interrupted(at, &name, run);
        assert!(weights(at, &local_name) == weights(at, &name), "{order}");
        let held = cached(&at.join(format!("cache-{order}"))) / shard_bytes(at);
        assert_eq!(held > 14, order == "random", "{order}: {held} shards in the cache");
    }
}

/// The shards of codes on a server.
fn shards_at(url: &str) -> String {
    format!("{url}/codes/{{00000..{:05}}}.tar", SHARDS - 1)
}

#[test]
fn faults_of_a_server_change_no_sample() {
    let folder = prepare();
    let at = folder.path();
    finish(train(at, "local", "codes", &["data.shuffle_buffer=2"]));
    let server = serve(at.into(), |request, number| match number % 6 {
        1 => Some(Reply::status(503)),
        // The transfer ends early.
        3 if request.path.ends_with(".tar") => Some(Reply::whole(&[0; 10_000], "cut").cut(100)),
        _ => None,
    });
    let url = shards_at(&server.url);
    finish(train(at, "http", &url, &["data.shuffle_buffer=2"]));
    assert!(weights(at, "local") == weights(at, "http"));
    // Another run needs nothing but codes.json and the listing of none.
    let before = server.requests().len();
    finish(train(at, "again", &url, &[]));
    let tars = |requests: &[Request]| requests.iter().filter(|request| request.path.ends_with(".tar")).count();
    assert_eq!(tars(&server.requests()[before..]), 0);
    // A command that writes the shards.
    let pipe = format!("pipe:cat codes/{{00000..{:05}}}.tar", SHARDS - 1);
    finish(train(at, "pipe", &pipe, &["data.shuffle_buffer=2"]));
    assert!(weights(at, "local") == weights(at, "pipe"));
}

#[test]
fn a_stored_index_beside_remote_shards_saves_their_download() {
    let folder = prepare();
    let at = folder.path();
    let server = serve(at.into(), |_, _| None);
    let url = shards_at(&server.url);
    let output = finish(train(at, "few", &url, &["train.steps=1", "data.shuffle_buffer=2", "train.warmup_steps=0"]));
    assert!(stderr(&output).contains("indexing 24 remote shards, once; 0 are downloaded"), "{}", stderr(&output));
    assert!(server.requests().iter().any(|request| request.path == "/codes/.shards.index"));
    // Each shard at most once, by one of the two ranks.
    let tars: Vec<String> = server.requests().into_iter().map(|request| request.path).collect();
    let tars: Vec<&String> = tars.iter().filter(|path| path.ends_with(".tar")).collect();
    assert_eq!(tars.len(), tars.iter().collect::<BTreeSet<_>>().len());
}

/// Exit code and stderr of a run that must fail.
fn refused(command: Command) -> (Option<i32>, String) {
    let mut command = command;
    let output = command.output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("hint: "), "{}", stderr(&output));
    (output.status.code(), stderr(&output))
}

#[test]
fn what_the_cache_cannot_do_is_refused() {
    let folder = prepare();
    let at = folder.path();
    let server = serve(at.into(), |_, _| None);
    let url = shards_at(&server.url);
    let gb = |shards: f64| format!("data.cache_gb={}", shards * shard_bytes(at) as f64 / 1e9);
    let cases = [
        (gb(12.5), vec![], "read at random from"),
        (gb(8.5), vec!["data.shuffle_buffer=2"], "streams read shards of up to"),
        (gb(0.5), vec!["data.shuffle_buffer=2", "data.cache_dir=\"fresh\""], "larger than the cache"),
        ("data.cache_gb=0".to_owned(), vec![], "cache_gb"),
    ];
    for (cache, sets, what) in cases {
        // Without the stored index the shards must be downloaded.
        let _ = fs::remove_file(at.join("codes/.shards.index"));
        let sets: Vec<&str> = sets.into_iter().chain([cache.as_str()]).collect();
        let (code, text) = refused(train(at, "refused", &url, &sets));
        assert!(code == Some(2) && text.contains(what), "{what}: {text}");
    }
    // A limit on the size of files, in KiB: further writes fail, as on a full disk.
    let mut full = Command::new("bash");
    full.args([
        "-c",
        "trap '' XFSZ; ulimit -f 4; exec \"$@\"",
        "_",
        env!("CARGO_BIN_EXE_vilg"),
        "data",
        "inspect",
        &url,
    ]);
    full.arg("--cache-dir").arg(at.join("full"));
    let (code, text) = refused(full);
    assert!(code == Some(1) && text.contains("cannot write") && text.contains("free some space"), "{text}");
    let (code, text) = refused(train(at, "refused", &url, &["data.cache_dir=\"/proc/none\""]));
    assert!(code == Some(1) && text.contains("cannot create /proc/none") && text.contains("data.cache_dir"), "{text}");
}

#[test]
fn refusals_of_a_server_end_a_run() {
    let folder = prepare();
    let at = folder.path();
    for (status, hint) in [(403, "fresh signature"), (404, "check the spelling")] {
        let server =
            serve(at.into(), move |request, _| request.path.starts_with("/codes/00007").then(|| Reply::status(status)));
        let url = shards_at(&server.url);
        for (order, sets) in [("sequential", &["data.shuffle_buffer=2"][..]), ("random", &[])] {
            let (code, text) = refused(train(at, &format!("{order}-{status}"), &url, sets));
            let expected = format!("/codes/00007.tar: the server answered {status}");
            assert!(code == Some(1) && text.contains(&expected) && text.contains(hint), "{text}");
        }
    }
    let (code, text) = refused(train(at, "refused", "http://127.0.0.1:9/codes/0.tar", &["data.shuffle_buffer=2"]));
    assert!(code == Some(1) && text.contains("cannot connect") && text.contains("gave up"), "{text}");
}

#[test]
fn a_shard_that_changes_while_it_is_not_in_the_cache_ends_the_run() {
    let folder = prepare();
    let at = folder.path();
    fs::remove_file(at.join("codes/.shards.index")).unwrap();
    let changed = Arc::new(AtomicBool::new(false));
    let (now, all) = (changed.clone(), fs::read(at.join("codes/00001.tar")).unwrap());
    let server = serve(at.into(), move |request, _| {
        let wanted = now.load(Ordering::Relaxed) && request.path.ends_with("0.tar");
        wanted.then(|| Reply::whole(&all, "new"))
    });
    let url = shards_at(&server.url);
    let cache = format!("data.cache_gb={}", 14.5 * shard_bytes(at) as f64 / 1e9);
    let run = |steps: &str| train(at, "changed", &url, &["data.shuffle_buffer=2", &cache, steps]);
    finish(run("train.steps=5"));
    changed.store(true, Ordering::Relaxed);
    let (code, text) = refused(run("train.steps=60"));
    assert!(code == Some(1) && text.contains("0.tar has changed since its samples were indexed"), "{text}");
}

#[test]
fn other_commands_read_remote_shards_too() {
    let folder = prepare();
    let at = folder.path();
    let server = serve(at.into(), |_, _| None);
    let url = format!("{}/pairs/{{00000..{:05}}}.tar", server.url, SHARDS - 1);
    let run = |args: &[&str]| finish(vilg(at, args)).stdout;
    let inspected: serde_json::Value = serde_json::from_slice(&run(&["--json", "data", "inspect", &url])).unwrap();
    assert_eq!((&inspected["samples"], &inspected["images"]), (&48.into(), &48.into()), "{inspected}");
    for (out, source) in [("encoded", url.as_str()), ("encoded-local", "pairs")] {
        run(&["data", "encode", source, "--model", "tokenizer", "-o", out]);
        run(&[
            "data",
            "filter",
            source,
            "--image-distance",
            "0",
            "--min-side",
            "0",
            "--keep-without-noun",
            "--max-caption-repeats",
            "0",
            "-o",
            &format!("{out}-kept"),
        ]);
        run(&["data", "vocab", source, "-o", &format!("{out}.txt")]);
        run(&["data", "build", source, "-o", &format!("{out}-built")]);
    }
    for (one, other) in
        [("encoded", "encoded-local"), ("encoded-kept", "encoded-local-kept"), ("encoded-built", "encoded-local-built")]
    {
        let samples = |folder: &str| -> Vec<Vec<u8>> {
            let source = vilg::data::Source::open(at.join(folder).to_str().unwrap(), 1.0).unwrap();
            assert!(!source.is_empty());
            let shards = source.shards.iter();
            shards
                .flat_map(|shard| {
                    (0..shard.len() as usize).map(move |index| {
                        let mut bytes = Vec::new();
                        assert!(shard.copy(index, &mut bytes).unwrap());
                        bytes
                    })
                })
                .collect()
        };
        assert!(samples(one) == samples(other), "{one}");
    }
    assert_eq!(fs::read(at.join("encoded.txt")).unwrap(), fs::read(at.join("encoded-local.txt")).unwrap());
    // Finished before, and nothing is downloaded for it.
    let before = server.requests().len();
    let again: serde_json::Value =
        serde_json::from_slice(&run(&["--json", "data", "encode", &url, "--model", "tokenizer", "-o", "encoded"]))
            .unwrap();
    assert_eq!(again["skipped_shards"], SHARDS);
    assert_eq!(server.requests().len(), before);
    let output =
        vilg(at, &["config", "check", "--set", &format!("data.sources=[{{ path = \"{url}\" }}]")]).output().unwrap();
    assert!(!stderr(&output).contains("data.sources"), "{}", stderr(&output));
}
