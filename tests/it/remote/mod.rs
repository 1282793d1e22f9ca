//! Remote shards against servers on the loopback device.

mod server;
mod stores;
mod train;

use serde_json::Value;
use server::{Reply, Server};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};
use vilg::{
    data::remote::{Cache, Fetch, Limits, RemoteShard, State, list},
    error::{Exit, exit_of, hint_of},
};

const SIZE: usize = 300_000;

fn content(seed: u8) -> Vec<u8> {
    (0..SIZE).map(|i| (i / 7 * 31 + i) as u8 ^ seed).collect()
}

fn quick() -> Limits {
    let wait = Duration::from_millis(5);
    Limits { attempts: 3, first_wait: wait, max_wait: 4 * wait, ..Limits::default() }
}

fn shard(url: &str) -> RemoteShard {
    list(url).unwrap().remove(0)
}

fn impatient() -> Limits {
    Limits { stall: Duration::from_secs(1), attempts: 10, ..quick() }
}

/// Reads `a.tar` of a server through a new cache.
fn get(server: &Server) -> vilg::error::Result<Vec<u8>> {
    get_with(server, quick())
}

fn get_with(server: &Server, limits: Limits) -> vilg::error::Result<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::with_limits(folder.path(), 1 << 20, limits)?;
    let cached = cache.get(&shard(&format!("{}/p/a.tar", server.url)))?;
    Ok(fs::read(cached.path())?)
}

fn message(error: &vilg::error::Error) -> String {
    format!("{error:#} hint: {}", hint_of(error).unwrap())
}

/// `vilg` without the credentials and proxies of this machine.
fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vilg"));
    for (name, _) in std::env::vars() {
        let upper = name.to_uppercase();
        if upper.ends_with("_PROXY") || ["AWS_", "OSS_", "HF_"].iter().any(|start| upper.starts_with(start)) {
            command.env_remove(name);
        }
    }
    command
}

fn fetch(urls: &[&str], output: &Path) -> Command {
    let mut command = bare();
    command.args(["data", "fetch", "--json", "-o"]).arg(output).args(urls);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
    error
}

/// All files below a folder, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(self::files(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

#[test]
fn a_cut_connection_is_resumed_where_the_server_has_ranges() {
    let server = Server::start(|request, number| {
        let reply = Reply::right(request, &content(1), "one");
        if number == 0 { reply.cut(100_000) } else { reply }
    });
    assert!(get(&server).unwrap() == content(1));
    let requests = server.requests();
    assert_eq!((requests.len(), requests[0].start()), (2, None));
    assert!(requests[1].start().is_some_and(|start| start > 0 && start <= 100_000), "{requests:?}");
    assert_eq!(requests[1].headers["if-range"], "\"one\"");
}

#[test]
fn a_cut_connection_starts_again_where_the_server_has_no_ranges() {
    for etag in [true, false] {
        let server = Server::start(move |_, number| {
            let mut reply = Reply::whole(&content(1), "one");
            reply.headers.retain(|_| etag);
            if number < 2 { reply.cut(100_000 * (number + 1)) } else { reply }
        });
        assert!(get(&server).unwrap() == content(1));
        assert_eq!(server.requests().len(), 3);
    }
}

#[test]
fn two_versions_are_never_mixed() {
    // The second server ignores `If-Range`, the third one tells no ETag of the rest.
    for kind in 0..3 {
        let server = Server::start(move |request, number| match number {
            0 => Reply::whole(&content(1), "one").cut(100_000),
            1 if kind > 0 => {
                let mut reply = Reply::rest(&content(2), "two", request.start().unwrap());
                reply.headers.retain(|(name, _)| kind == 1 || *name != "ETag");
                reply
            }
            _ => Reply::right(request, &content(2), "two"),
        });
        assert!(get(&server).unwrap() == content(2), "{kind}");
    }
}

#[test]
fn busy_servers_are_asked_again() {
    let server = Server::start(|request, number| match number {
        0 => Reply { headers: vec![("Retry-After", "0".to_owned())], ..Reply::status(429) },
        1 => Reply::status(503),
        _ => Reply::right(request, &content(1), "one"),
    });
    assert!(get(&server).unwrap() == content(1));
    assert_eq!(server.requests().len(), 3);
    let server = Server::start(|_, _| Reply::status(503));
    let error = message(&get(&server).unwrap_err());
    assert!(
        error.contains("/p/a.tar: the server answered 503") && error.contains("gave up after 3 attempts"),
        "{error}"
    );
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn a_server_that_stalls_is_asked_again() {
    let server = Server::start(|request, number| {
        let reply = Reply::right(request, &content(1), "one");
        Reply { stall: (number == 0).then_some(100_000), ..reply }
    });
    let start = Instant::now();
    assert!(get_with(&server, impatient()).unwrap() == content(1));
    assert!(start.elapsed() < Duration::from_secs(15));
    assert!(server.requests()[1].start().is_some());
}

#[test]
fn a_wrong_content_length_is_an_error() {
    let server = Server::start(|request, _| {
        let reply = Reply::right(request, &content(1), "one");
        Reply { length: Some(reply.body.len() + 10), ..reply }
    });
    let error = message(&get(&server).unwrap_err());
    assert!(error.contains("a.tar: ") && error.contains("gave up"), "{error}");
}

#[test]
fn refusals_are_not_repeated_and_name_no_secret() {
    for (status, hint) in [(404, "check the spelling"), (403, "fresh signature"), (401, "PASSWORD")] {
        let server = Server::start(move |_, _| Reply::status(status));
        let folder = tempfile::tempdir().unwrap();
        let url = server.url.replace("http://", "http://user:geheim@");
        let cache = Cache::with_limits(folder.path(), 1 << 20, quick()).unwrap();
        let error = message(&cache.get(&shard(&format!("{url}/a.tar?sig=geheim"))).unwrap_err());
        assert!(error.contains(&status.to_string()) && error.contains(hint), "{error}");
        assert!(!error.contains("geheim") && !error.contains("user"), "{error}");
        let requests = server.requests();
        assert_eq!((requests.len(), requests[0].path.as_str()), (1, "/a.tar?sig=geheim"));
        assert!(requests[0].headers["authorization"].starts_with("Basic "));
        assert!(files(folder.path()).iter().all(|file| !file.to_str().unwrap().contains("part")));
    }
    // Nobody listens there, and the address is not a valid one.
    for url in ["http://127.0.0.1:9/a.tar?sig=geheim", "http://127.0.0.1:99999/a.tar?sig=geheim"] {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::with_limits(folder.path(), 1 << 20, quick()).unwrap();
        let error = message(&cache.get(&shard(url)).unwrap_err());
        assert!(error.contains("/a.tar: ") && !error.contains("geheim"), "{error}");
    }
}

#[test]
fn records_name_no_secret() {
    let server = Server::start(|request, _| Reply::right(request, &content(1), "one"));
    let folder = tempfile::tempdir().unwrap();
    let url = server.url.replace("http://", "http://user:geheim@");
    let fetch = Fetch {
        shards: list(&format!("{url}/a.tar?sig=geheim")).unwrap(),
        output: folder.path().into(),
        limits: quick(),
        threads: 1,
    };
    assert_eq!(fetch.run(&|_| ()).unwrap()[0].state, State::Downloaded);
    for file in files(folder.path()).iter().filter(|file| !file.ends_with("a.tar")) {
        assert!(!fs::read_to_string(file).unwrap().contains("geheim"), "{}", file.display());
    }
}

#[test]
fn damaged_files_of_a_cache_are_downloaded_again() {
    let server = Server::start(|request, _| Reply::right(request, &content(1), "one"));
    let folder = tempfile::tempdir().unwrap();
    let shard = shard(&format!("{}/a.tar", server.url));
    let open = || Cache::with_limits(folder.path(), 1 << 20, quick()).unwrap();
    let path = open().get(&shard).unwrap().path().to_owned();
    let record = path.with_extension("json");
    let mut torn = content(1);
    torn[1000] ^= 1;
    let damages: [&dyn Fn(); 4] = [
        &|| fs::write(&path, &torn).unwrap(),
        &|| fs::write(&path, &torn[..1000]).unwrap(),
        &|| fs::write(&record, "{}").unwrap(),
        &|| fs::remove_file(&record).unwrap(),
    ];
    for (number, damage) in damages.iter().enumerate() {
        damage();
        assert!(fs::read(open().get(&shard).unwrap().path()).unwrap() == content(1));
        assert_eq!(server.requests().len(), number + 2);
        drop(open().get(&shard).unwrap());
        assert_eq!(server.requests().len(), number + 2, "it is in the cache");
    }
}

#[test]
fn the_shard_used_longest_ago_leaves_a_full_cache() {
    let server = Server::start(|request, _| Reply::right(request, &content(1), "one"));
    let folder = tempfile::tempdir().unwrap();
    let foreign = folder.path().join("0123456789abcdef0123456789abcdef.tar");
    fs::write(&foreign, content(3)).unwrap();
    let cache = Cache::with_limits(folder.path(), 2 * SIZE as u64 + 1000, quick()).unwrap();
    // A second handle is like another process: it sees only the folder.
    let other = Cache::with_limits(folder.path(), 2 * SIZE as u64 + 1000, quick()).unwrap();
    let shards = list(&format!("{}/{{0..4}}.tar", server.url)).unwrap();
    let first = cache.get(&shards[0]).unwrap();
    let second = cache.get(&shards[1]).unwrap().path().to_owned();
    let third = other.get(&shards[2]).unwrap();
    assert!(first.path().exists() && third.path().exists() && !second.exists());
    let error = cache.get(&shards[3]).unwrap_err();
    assert!(message(&error).contains("is full") && exit_of(&error) == Exit::Failed, "{}", message(&error));
    drop(first);
    cache.get(&shards[3]).unwrap();
    let small = Cache::with_limits(folder.path(), 1000, quick()).unwrap();
    let error = small.get(&shards[4]).unwrap_err();
    assert!(message(&error).contains("larger than the cache") && exit_of(&error) == Exit::Usage, "{}", message(&error));
    assert!(fs::read(foreign).unwrap() == content(3) && third.path().exists());
}

#[test]
fn shards_are_read_ahead_once() {
    let server = Server::start(|request, _| Reply {
        pause: Duration::from_millis(5),
        ..Reply::right(request, &content(1), "one")
    });
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::with_limits(folder.path(), 1 << 22, quick()).unwrap();
    let shards = list(&format!("{}/{{0..3}}.tar", server.url)).unwrap();
    cache.prefetch(shards.clone());
    for shard in &shards {
        assert!(fs::read(cache.get(shard).unwrap().path()).unwrap() == content(1));
    }
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn handles_that_want_the_same_shards_download_each_once() {
    let server = Server::start(|request, _| Reply::right(request, &content(1)[..1000], "one"));
    let folder = tempfile::tempdir().unwrap();
    let shards = list(&format!("{}/{{0..11}}.tar", server.url)).unwrap();
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                // Like processes, handles know of each other only through the folder.
                let cache = Cache::with_limits(folder.path(), 1 << 20, quick()).unwrap();
                for shard in &shards {
                    assert!(fs::read(cache.get(shard).unwrap().path()).unwrap() == content(1)[..1000]);
                }
            });
        }
    });
    assert_eq!(server.requests().len(), shards.len());
}

#[test]
fn processes_that_want_the_same_shard_download_it_once() {
    let server = Server::start(|request, _| Reply {
        pause: Duration::from_millis(20),
        ..Reply::right(request, &content(1), "one")
    });
    let folder = tempfile::tempdir().unwrap();
    let url = format!("{}/{{a,b}}.tar", server.url);
    let children: Vec<_> = (0..2).map(|_| fetch(&[&url], folder.path()).spawn().unwrap()).collect();
    for child in children {
        assert_eq!(report(&child.wait_with_output().unwrap())["shards"].as_array().unwrap().len(), 2);
    }
    let whole = server.requests().iter().filter(|request| !request.headers.contains_key("if-none-match")).count();
    assert_eq!(whole, 2);
    assert!(fs::read(folder.path().join("a.tar")).unwrap() == content(1));
}

#[test]
fn a_killed_process_is_resumed() {
    let server = Server::start(|request, number| {
        let reply = Reply::right(request, &content(1), "one");
        Reply { pause: Duration::from_millis(if number == 0 { 200 } else { 0 }), ..reply }
    });
    let folder = tempfile::tempdir().unwrap();
    let url = format!("{}/a.tar", server.url);
    let mut child = fetch(&[&url], folder.path()).spawn().unwrap();
    let (start, partial) = (Instant::now(), folder.path().join(".fetch/a.tar.part.json"));
    while !partial.exists() && start.elapsed() < Duration::from_secs(30) {
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(partial.exists() && !folder.path().join("a.tar").exists());
    assert_eq!(report(&fetch(&[&url], folder.path()).output().unwrap())["downloaded"], 1);
    assert!(server.requests()[1].start().is_some_and(|start| start > 0));
    assert!(fs::read(folder.path().join("a.tar")).unwrap() == content(1));
    let left: Vec<PathBuf> = files(folder.path());
    assert_eq!(left, [folder.path().join(".fetch/a.tar.json"), folder.path().join("a.tar")]);
}

#[test]
fn files_of_others_are_not_replaced() {
    let server = Server::start(|request, _| Reply::right(request, &content(1), "one"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.tar");
    fs::write(&file, "mine").unwrap();
    let url = format!("{}/a.tar", server.url);
    let output = fetch(&[&url], folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is not a copy of") && fs::read(&file).unwrap() == b"mine");
    // A copy that was damaged is one of ours.
    fs::remove_file(&file).unwrap();
    report(&fetch(&[&url], folder.path()).output().unwrap());
    fs::write(&file, vec![0; SIZE]).unwrap();
    assert_eq!(report(&fetch(&[&url], folder.path()).output().unwrap())["downloaded"], 1);
    assert!(fs::read(&file).unwrap() == content(1));
    assert_eq!(report(&fetch(&[&url], folder.path()).output().unwrap())["finished_before"], 1);
}

#[test]
fn wrong_sources_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (url, what) in [
        ("data/a.tar", "is not a remote URL"),
        ("https://h/p/*.tar", "cannot be listed"),
        ("https://h/p/%2e%2e%2Fa.tar", "cannot be the name of a local file"),
        ("s3://b/p/{..,q}/a.tar", "cannot be the name of a local file"),
        ("pipe:", "has no command"),
    ] {
        let output = fetch(&[url], folder.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{url}");
        assert!(stderr(&output).contains(what) && stderr(&output).contains("hint: "), "{url}: {}", stderr(&output));
    }
    assert!(files(folder.path()).is_empty());
}

#[test]
fn commands_are_read_to_their_end() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("in.tar");
    fs::write(&source, content(1)).unwrap();
    let pipe = |command: &str, limits: Limits| {
        let cache = Cache::with_limits(&folder.path().join("cache"), 1 << 20, limits).unwrap();
        cache.get(&shard(&format!("pipe:{}", command.replace("FILE", source.to_str().unwrap()))))
    };
    assert!(fs::read(pipe("cat FILE", quick()).unwrap().path()).unwrap() == content(1));
    for (command, limits, what) in [
        ("head -c 1000 FILE; exit 3", quick(), "exit status: 3"),
        ("cat FILE; kill -9 $$", quick(), "signal: 9"),
        ("cat FILE; sleep 25", impatient(), "wrote nothing for 1 s"),
    ] {
        let start = Instant::now();
        let error = message(&pipe(command, limits).unwrap_err());
        assert!(
            error.contains(what) && !error.contains("in.tar") && start.elapsed() < Duration::from_secs(20),
            "{error}"
        );
    }
    assert_eq!(
        files(&folder.path().join("cache")).iter().filter(|file| file.extension().is_some_and(|e| e == "tar")).count(),
        1
    );
}
