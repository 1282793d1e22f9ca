//! Listings and downloads of S3, OSS and Hugging Face.

use super::{
    SIZE, content, fetch, report,
    server::{Reply, Request, S3, Server},
    stderr,
};
use serde_json::Value;
use std::fs;

#[test]
fn tokens_of_hugging_face_are_not_sent_to_other_hosts() {
    let storage = Server::start(|request, _| Reply::right(request, &content(1), "one"));
    let target = format!("{}/stored?sig=x", storage.url);
    let hub = Server::start(move |request, _| {
        let listing = |names: &[&str]| {
            let entry = |name: &&str| format!(r#"{{"type":"file","path":"{name}","size":{SIZE},"oid":"o"}}"#);
            names.iter().map(entry).collect::<Vec<_>>().join(",").into_bytes()
        };
        let page = |body: Vec<u8>| Reply { body: [b"[", &body[..], b"]"].concat(), ..Reply::status(200) };
        if request.path.starts_with("/datasets/") {
            Reply { headers: vec![("Location", target.clone())], ..Reply::status(302) }
        } else if request.path.contains("cursor") {
            page(listing(&["x/b/1.tar", "x/c.txt"]))
        } else {
            let next =
                format!("<http://{}/api/datasets/o/n/tree/main/x?cursor=1>; rel=\"next\"", request.headers["host"]);
            Reply { headers: vec![("Link", next)], ..page(listing(&["x/0.tar", "x/.hidden/2.tar"])) }
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let run = |urls: &[&str]| {
        fetch(urls, folder.path()).env("HF_ENDPOINT", &hub.url).env("HF_TOKEN", "geheim").output().unwrap()
    };
    assert_eq!(report(&run(&["hf://datasets/o/n/x"]))["downloaded"], 2);
    assert!(fs::read(folder.path().join("0.tar")).unwrap() == content(1));
    assert!(fs::read(folder.path().join("b/1.tar")).unwrap() == content(1));
    let paths: Vec<String> = hub.requests().iter().map(|request| request.path.clone()).collect();
    assert!(paths.contains(&"/datasets/o/n/resolve/main/x/b/1.tar".to_owned()), "{paths:?}");
    let token = |request: &Request| request.headers.get("authorization").cloned();
    assert!(hub.requests().iter().all(|request| token(request).as_deref() == Some("Bearer geheim")));
    assert!(storage.requests().len() == 2 && storage.requests().iter().all(|request| token(request).is_none()));
    assert_eq!(report(&run(&["hf://datasets/o/n/x"]))["finished_before"], 2);
}

#[test]
fn shards_in_s3_are_listed_and_fetched() {
    let s3 = S3::start();
    s3.put("/pairs", b"");
    for (name, seed) in [("train/0.tar", 0), ("train/1.tar", 1), ("train/more/2.tar", 2), ("train/readme.txt", 3)] {
        s3.put(&format!("/pairs/{name}"), &content(seed));
    }
    let at = tempfile::tempdir().unwrap();
    let aws = [
        ("AWS_ENDPOINT_URL", s3.url()),
        ("AWS_ACCESS_KEY_ID", "a".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "geheim".to_owned()),
    ];
    let run = |url: &str, folder: &str| {
        fetch(&[url], &at.path().join(folder)).envs(aws.clone()).env("AWS_REGION", "us-east-1").output().unwrap()
    };
    let names = |report: &Value| -> Vec<String> {
        report["shards"].as_array().unwrap().iter().map(|shard| shard["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&report(&run("s3://pairs/train/{0..1}.tar", "braces"))), ["0.tar", "1.tar"]);
    assert_eq!(names(&report(&run("s3://pairs/*/*.tar", "pattern"))), ["train/0.tar", "train/1.tar"]);
    let whole = report(&run("s3://pairs/train", "folder"));
    assert_eq!(names(&whole), ["0.tar", "1.tar", "more/2.tar"]);
    assert_eq!(whole["bytes_downloaded"], 3 * SIZE);
    assert!(fs::read(at.path().join("folder/more/2.tar")).unwrap() == content(2));
    // One object changes: only that one is downloaded again.
    s3.put("/pairs/train/1.tar", &content(7));
    for folder in ["folder", "braces"] {
        let url = if folder == "folder" { "s3://pairs/train/" } else { "s3://pairs/train/{0..1}.tar" };
        assert_eq!(report(&run(url, folder))["downloaded"], 1, "{folder}");
        assert!(fs::read(at.path().join(folder).join("1.tar")).unwrap() == content(7));
    }
    for (url, what) in [
        ("s3://pairs/train/9.tar", "404"),
        ("s3://nothing/train", "404"),
        ("s3://pairs/test", "no shards at `s3://pairs/test`"),
    ] {
        let output = run(url, "none");
        assert!(!output.status.success() && stderr(&output).contains(what), "{url}: {}", stderr(&output));
        assert!(stderr(&output).contains("hint: ") && !stderr(&output).contains("geheim"), "{}", stderr(&output));
    }
    let oss =
        [("OSS_ENDPOINT", s3.url()), ("OSS_ACCESS_KEY_ID", "a".to_owned()), ("OSS_ACCESS_KEY_SECRET", "b".to_owned())];
    let output = fetch(&["oss://pairs/train"], &at.path().join("oss")).envs(oss).output().unwrap();
    assert_eq!(report(&output)["downloaded"], 3);
    let public = [("AWS_ENDPOINT_URL", s3.url()), ("AWS_SKIP_SIGNATURE", "true".to_owned())];
    let output = fetch(&["s3://pairs/train/0.tar"], &at.path().join("public")).envs(public).output().unwrap();
    assert_eq!(report(&output)["downloaded"], 1);
}

#[test]
fn an_object_that_changes_after_it_was_listed_is_an_error() {
    let listing = format!(
        "<ListBucketResult><Contents><Key>p/a.tar</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
         <ETag>\"one\"</ETag><Size>{SIZE}</Size></Contents><IsTruncated>false</IsTruncated></ListBucketResult>"
    );
    for (etag, length, what) in [("two", SIZE, "another ETag"), ("one", SIZE - 1, "by the listing")] {
        let listing = listing.clone();
        let server = Server::start(move |request, _| match request.path.contains("list-type") {
            true => Reply { body: listing.clone().into_bytes(), ..Reply::status(200) },
            false => Reply::right(request, &content(1)[..length], etag),
        });
        let folder = tempfile::tempdir().unwrap();
        let aws =
            [("AWS_ENDPOINT_URL", server.url.as_str()), ("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        let output = fetch(&["s3://b/p"], folder.path()).envs(aws).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
    }
}
