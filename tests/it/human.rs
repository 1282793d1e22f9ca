//! `vilg eval human`: the commands and the server, over plain HTTP.

use crate::{commands::vilg, server::Running};
use image::{Rgb, RgbImage};
use serde_json::Value;
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// A folder with the images of two systems for `count` prompts, and a study of them with three raters.
fn study(folder: &Path, count: u8) -> PathBuf {
    let prompts: String = (1..=count).map(|number| format!("第{number}句\n")).collect();
    fs::write(folder.join("prompts.txt"), prompts).unwrap();
    for (system, red) in [("ours", 1), ("other", 2)] {
        fs::create_dir(folder.join(system)).unwrap();
        for number in 1..=count {
            let image = RgbImage::from_pixel(2, 2, Rgb([red, number, 0]));
            image.save(folder.join(system).join(format!("a-{number}.png"))).unwrap();
        }
    }
    let path = folder.join("study.db");
    let output = new(folder, &["--images", "ours", "--images", "other", "--prompts", "prompts.txt"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("next: vilg eval human serve study.db\nthen: vilg eval human report study.db"), "{said}");
    path
}

fn new(folder: &Path, args: &[&str]) -> std::process::Command {
    let mut command = vilg(&["eval", "human", "new", "study.db"]);
    command.args(args).current_dir(folder);
    command
}

/// The raters' pages.
struct Server {
    program: Running,
    address: String,
    /// The path of each rater's link.
    paths: Vec<String>,
}

impl Server {
    fn start(study: &Path, address: &str) -> Self {
        let mut command = vilg(&["eval", "human", "serve", "--address", address, "--json"]);
        let (program, line) = Running::start(command.arg(study));
        let started: Value = serde_json::from_str(&line).unwrap();
        let address = started["address"].as_str().unwrap().to_owned();
        let path = |rater: &Value| {
            rater["url"].as_str().unwrap().strip_prefix(&format!("http://{address}")).unwrap().to_owned()
        };
        let paths = started["raters"].as_array().unwrap().iter().map(path).collect();
        Self { program, address, paths }
    }

    /// Status and the whole response.
    fn send(&self, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).unwrap();
        let response = String::from_utf8_lossy(&response).into_owned();
        (response.split(' ').nth(1).unwrap_or("0").parse().unwrap(), response)
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }

    fn post(&self, path: &str, form: &str) -> (u16, String) {
        let length = form.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{form}"
        ))
    }

    /// Sends a signal and returns the exit code and what was said.
    fn stop(self, signal: &str) -> (Option<i32>, String) {
        self.program.signal(signal);
        self.program.end()
    }
}

const QUESTIONS: [&str; 3] = ["clarity", "texture", "relevance"];

/// A form that gives both images the same answer to all questions.
fn form(value: u32) -> String {
    let fields = (0..2).flat_map(|place| QUESTIONS.map(|question| format!("{place}.{question}={value}")));
    fields.collect::<Vec<_>>().join("&")
}

fn report(study: &Path) -> Value {
    let output = vilg(&["eval", "human", "report", "--json"]).arg(study).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn raters_at_the_same_time_are_all_counted_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), 5);
    let server = Server::start(&path, "127.0.0.1:0");
    let rate = |rater: usize| {
        for page in 1..=5 {
            // Twice at the same time, and once more with another answer.
            thread::scope(|scope| {
                let send = |value| server.post(&format!("{}/{page}", server.paths[rater]), &form(value)).0;
                let both = [1, 2].map(|value| scope.spawn(move || send(value)));
                assert!(both.into_iter().all(|one| one.join().unwrap() == 303));
                assert_eq!(send(rater as u32 + 1), 303);
            });
        }
    };
    // Reports may be made meanwhile.
    thread::scope(|scope| {
        (0..3).for_each(|rater| drop(scope.spawn(move || rate(rater))));
        assert_eq!(report(&path)["items"], 5);
    });
    assert!(server.get(&server.paths[1]).1.contains("5 / 5"));
    let found = report(&path);
    assert_eq!(found["ratings"], 3 * 5 * 2 * 3);
    for question in found["questions"].as_array().unwrap() {
        assert_eq!(
            (question["systems"][0]["mean"].as_f64(), question["systems"][1]["mean"].as_f64()),
            (Some(2.0), Some(2.0))
        );
    }
}

#[test]
fn pages_and_images_belong_to_their_rater_and_tell_no_system() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), 8);
    let server = Server::start(&path, "127.0.0.1:0");
    // Nothing but the study file is read while raters rate.
    fs::remove_dir_all(folder.path().join("ours")).unwrap();
    fs::remove_dir_all(folder.path().join("other")).unwrap();
    let mut lefts = Vec::new();
    for rater in &server.paths {
        for page in 1..=8 {
            let (status, html) = server.get(&format!("{rater}/{page}"));
            assert_eq!(status, 200);
            assert!(!html.contains("ours") && !html.contains("other") && !html.contains(".png"), "{html}");
            let (status, image) = server.get(&format!("{rater}/{page}/0"));
            assert!(status == 200 && image.contains("content-type: image/png"), "{image}");
            lefts.push(image);
        }
    }
    // 24 images of 8 prompts and two systems: both stand on the left.
    lefts.iter_mut().for_each(|image| drop(image.drain(..image.find("PNG").unwrap())));
    lefts.sort();
    lefts.dedup();
    assert!((9..=16).contains(&lefts.len()), "{} different images on the left", lefts.len());
}

#[test]
fn wrong_requests_get_a_clear_page_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), 2);
    let server = Server::start(&path, "127.0.0.1:0");
    let rater = &server.paths[0];
    let token = rater.strip_prefix("/r/").unwrap();
    for (wrong, status, text) in [
        (format!("/r/{}", "0".repeat(32)), 403, "This link is not valid"),
        (format!("/r/{}", &token[1..]), 403, "This link is not valid"),
        (
            format!("/r/{}", token.to_uppercase().replace(|c: char| c.is_ascii_digit(), "A")),
            403,
            "This link is not valid",
        ),
        (format!("/r/{token}00/1"), 403, "This link is not valid"),
        ("/r/x/1/0".to_owned(), 403, "This link is not valid"),
        (format!("{rater}/3"), 404, "There is no such page"),
        (format!("{rater}/0"), 404, "There is no such page"),
        (format!("{rater}/18446744073709551616"), 404, "There is no such page"),
        (format!("{rater}/1/2"), 404, "There is no such page"),
        (format!("{rater}/1/image"), 404, "There is no such page"),
        (format!("{rater}/1/..%2f..%2f..%2fetc%2fpasswd"), 404, "There is no such page"),
        ("/../../etc/passwd".to_owned(), 404, "There is no such page"),
        ("/study.db".to_owned(), 404, "There is no such page"),
    ] {
        let (found, html) = server.get(&wrong);
        assert!(found == status && html.contains(text), "{wrong}: {found} {html}");
        for header in ["content-security-policy: default-src 'none'", "referrer-policy: no-referrer", "nosniff"] {
            assert!(html.contains(header), "{header}: {html}");
        }
    }
    let page = format!("{rater}/1");
    let complete = form(4);
    for (wrong, status) in [
        (complete.replace("1.texture=4", "1.texture=6"), 400),
        (format!("{complete}&2.clarity=1"), 400),
        (format!("{complete}&0.clarity=1"), 400),
        (format!("{complete}&rater=2"), 400),
        (complete.replace("&1.relevance=4", ""), 422),
        (String::new(), 422),
        ("x".repeat(20 << 10), 413),
    ] {
        assert_eq!(server.post(&page, &wrong).0, status, "{wrong:.60}");
    }
    assert_eq!(server.post(&format!("/r/{}/1", "f".repeat(32)), &complete).0, 403);
    assert_eq!(server.post(rater, &complete).0, 405);
    // The answers of an incomplete page are not lost.
    let (_, html) = server.post(&page, "0.clarity=3");
    assert!(html.contains("value=\"3\" required checked") && html.contains("id=\"missing\""), "{html}");
    assert!(server.send("nonsense\r\n\r\n").0 == 400 && server.get("/").0 == 200);
    assert_eq!(report(&path)["ratings"], 0);
}

#[test]
fn a_stopped_server_goes_on_with_the_same_links() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), 2);
    let server = Server::start(&path, "127.0.0.1:0");
    let (address, paths) = (server.address.clone(), server.paths.clone());
    assert_eq!(server.post(&format!("{}/2", paths[0]), &form(5)).0, 303);
    // An open connection does not keep the server.
    let open = TcpStream::connect(&address).unwrap();
    let (code, said) = server.stop("-TERM");
    assert_eq!(code, Some(75), "{said}");
    assert!(said.contains("stopped by SIGTERM; all ratings are saved") && said.contains("hint: "), "{said}");
    drop(open);
    let names = || folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    assert!(names().iter().all(|name| !name.to_string_lossy().contains("study.db-")), "{:?}", names());
    let server = Server::start(&path, "127.0.0.1:0");
    assert_eq!(server.paths, paths);
    assert!(server.get(&paths[0]).1.contains("1 / 2") && server.get(&paths[1]).1.contains("0 / 2"));
    // A killed one leaves its log, which the next one reads.
    assert_eq!(server.post(&format!("{}/1", paths[0]), &form(5)).0, 303);
    server.stop("-KILL");
    let server = Server::start(&path, "127.0.0.1:0");
    assert!(server.get(&paths[0]).1.contains("2 / 2"));
    assert_eq!(server.stop("-INT").0, Some(130));
}

#[test]
fn other_addresses_get_a_loud_warning_and_busy_ones_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), 1);
    let server = Server::start(&path, "0.0.0.0:0");
    let busy = vilg(&["eval", "human", "serve", "--address", &server.address]).arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&busy.stderr);
    assert!(
        busy.status.code() == Some(1) && said.contains("cannot listen on") && said.contains("hint: choose another"),
        "{said}"
    );
    assert!(server.stop("-INT").1.contains("IS OPEN TO OTHER MACHINES"));
    let server = Server::start(&path, "127.0.0.1:0");
    assert!(!server.stop("-INT").1.contains("warning"));
}

#[test]
fn reports_are_markdown_and_csv() {
    let folder = tempfile::tempdir().unwrap();
    let path = study(folder.path(), 2);
    let server = Server::start(&path, "127.0.0.1:0");
    server.post(&format!("{}/1", server.paths[2]), &form(4));
    drop(server);
    let csv = folder.path().join("ratings.csv");
    let run = || {
        let output = vilg(&["eval", "human", "report", "--csv"]).args([&csv, &path]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text, said) = run();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the study is not finished"), "{said}");
    let cells: String = text.split(' ').filter(|part| !part.is_empty()).map(|part| format!("{part} ")).collect();
    for line in
        ["| 3 | 1 of 2 |", "| clarity (1 to 5) | other | 4.000 | - | 1 | - |", "| ours - other | relevance | +0.000 |"]
    {
        assert!(cells.contains(line), "{line}\n{text}");
    }
    let rows = fs::read_to_string(&csv).unwrap();
    assert_eq!(rows.lines().count(), 7, "{rows}");
    assert!(rows.starts_with("rater,item,aspect,prompt,system,question,value,time\n3,"), "{rows}");
    assert_eq!(run().0, Some(0), "an earlier report is replaced");
    fs::write(&csv, "my notes").unwrap();
    let (code, _, said) = run();
    assert!(code == Some(1) && said.contains("is not a report of this command"), "{said}");
    assert_eq!(fs::read_to_string(&csv).unwrap(), "my notes");
}

#[test]
fn studies_are_not_made_of_inputs_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    study(folder.path(), 2);
    let error = |args: &[&str]| {
        let output = new(folder.path(), args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("\nhint: "), "{args:?}: {said}");
        (output.status.code(), said)
    };
    let images = ["--images", "ours", "--prompts", "prompts.txt"];
    let (code, said) = error(&images);
    assert!(code == Some(1) && said.contains("study.db exists, and a study is never replaced"), "{said}");
    fs::remove_file(folder.path().join("study.db")).unwrap();
    fs::remove_file(folder.path().join("other/a-2.png")).unwrap();
    for (args, exit, what) in [
        (&["--images", "ours"][..], 2, "--prompts"),
        (&["--captions", "a.json", "--images", "ours", "--prompts", "prompts.txt"], 2, "cannot be used with"),
        (&["--answers", "a.jsonl"], 2, "--human"),
        (&[], 2, "--images"),
        (&["--images", "nowhere", "--prompts", "prompts.txt"], 1, "cannot read nowhere"),
        (&["--images", "other", "--prompts", "prompts.txt"], 1, "1 images in other for 2 prompts"),
        (&["--images", "ours", "--images", "ours", "--prompts", "prompts.txt"], 2, "two systems are named `ours`"),
        (&["--images", "=ours", "--prompts", "prompts.txt"], 2, "names no system"),
        (&["--captions", "prompts.txt"], 1, "bad prompts.txt"),
    ] {
        let (code, said) = error(args);
        assert!(code == Some(exit) && said.contains(what), "{args:?}: {code:?} {said}");
        assert!(!folder.path().join("study.db").exists(), "{args:?}");
    }
}

#[test]
fn captions_come_one_on_a_page_beside_their_image() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("1.png");
    RgbImage::from_pixel(3, 3, Rgb([7, 7, 7])).save(&image).unwrap();
    fs::write(folder.path().join("ours.jsonl"), "{\"image\": \"1.png\", \"caption\": \"\", \"score\": -1}\n").unwrap();
    fs::write(folder.path().join("people.json"), r#"[{"image_id": "1.png", "caption": "<b>方块</b>"}]"#).unwrap();
    let args = [
        "--captions",
        "ours=ours.jsonl",
        "--human",
        "people.json",
        "--raters",
        "1",
        "--title",
        "看图 & 说话",
        "--json",
    ];
    let output = new(folder.path(), &args).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("1 texts are empty") && said.contains("fewer than three raters"), "{said}");
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((made["pages"].as_u64(), made["systems"][1].as_str()), (Some(2), Some("human")), "{made}");
    fs::remove_file(&image).unwrap();
    let server = Server::start(&folder.path().join("study.db"), "127.0.0.1:0");
    let rater = &server.paths[0];
    assert!(server.get(rater).1.contains("看图 &amp; 说话"));
    let pages = [1, 2].map(|page| server.get(&format!("{rater}/{page}")).1);
    assert!(pages.iter().any(|page| page.contains("&lt;b&gt;方块&lt;/b&gt;")), "{pages:?}");
    assert!(pages.iter().any(|page| page.contains("（空）")) && !pages.concat().contains("human"), "{pages:?}");
    assert!(server.get(&format!("{rater}/2/image")).1.contains("content-type: image/png"));
    assert_eq!(server.get(&format!("{rater}/2/0")).0, 404, "a text is no image");
    let answers = "0.fluency=2&0.relevance=1&0.richness=0";
    assert!(server.post(&format!("{rater}/1"), answers).1.contains(&format!("location: {rater}/2\r\n")));
    assert!(server.post(&format!("{rater}/2"), answers).1.contains(&format!("location: {rater}\r\n")));
}
