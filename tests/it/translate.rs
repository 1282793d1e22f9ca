//! `vilg data translate` with a program and with a service, both with faults.

use crate::commands::{as_rank_of_two, vilg};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The program, with a fault and a file that it appends the texts to.
fn program(fault: &str, log: &Path) -> String {
    format!("python3 '{}/tests/translate.py' '{fault}' '{}'", env!("CARGO_MANIFEST_DIR"), log.display())
}

fn translate(input: &Path, output: &Path, by: [&str; 2], more: &[&str]) -> Command {
    let mut command = vilg(&["data", "translate", "--json", "-o"]);
    command.arg(output).arg(input).args(by).args(more);
    command
}

/// The report and the messages of a run that succeeded.
fn report(output: Output) -> (Value, String) {
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (serde_json::from_slice(&output.stdout).unwrap(), said)
}

fn rows(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write_rows(path: &Path, captions: &[&str]) {
    let line = |(id, caption): (usize, &&str)| json!({"id": id, "caption": caption}).to_string() + "\n";
    fs::write(path, captions.iter().enumerate().map(line).collect::<String>()).unwrap();
}

/// Captions of rows.
fn captions(path: &Path) -> Vec<String> {
    rows(path).iter().map(|row| row["caption"].as_str().unwrap().to_owned()).collect()
}

const ODD: &str = "a \"red\"\tcar, 🐱\non the \\grass";

#[test]
fn captions_are_replaced_and_kept_in_a_new_column() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_rows(&at("a.jsonl"), &["a cat", ODD, "a cat", "refuse", "blank", " "]);
    let log = at("log");
    let command = program("", &log);
    let by = ["--command", command.as_str()];
    let (counts, _) = report(translate(&at("a.jsonl"), &at("b.jsonl"), by, &[]).output().unwrap());
    let expected = [
        json!({"id": 0, "caption": "一只猫", "caption_original": "a cat"}),
        json!({"id": 1, "caption": "一只\"red\"car,🐱在\\grass", "caption_original": ODD}),
        json!({"id": 2, "caption": "一只猫", "caption_original": "a cat"}),
    ];
    assert_eq!(rows(&at("b.jsonl")), expected);
    assert_eq!((&counts["rows"], &counts["translated"], &counts["written"]), (&json!(6), &json!(3), &json!(3)));
    assert_eq!(counts["failed"]["refused"], json!({"count": 1, "examples": ["too hard"]}));
    assert_eq!((&counts["failed"]["empty"]["count"], &counts["bad"]["no-caption"]["count"]), (&json!(1), &json!(1)));
    assert_eq!(fs::read_to_string(&log).unwrap().lines().count(), 2, "equal captions are translated once");
    assert!(at("b.translate.json").exists());

    // Rows that cannot be translated are kept on demand; the translations of the first run are known.
    let more = ["--keep-untranslated", "--original-column", "en", "--cache"];
    let mut again = translate(&at("a.jsonl"), &at("out"), by, &more);
    let (counts, _) = report(again.arg(at(".b.jsonl.translate/cache.jsonl")).output().unwrap());
    assert_eq!(captions(&at("out/a.jsonl"))[2..], ["一只猫", "refuse", "blank"]);
    assert_eq!((&counts["known"], &counts["asked"], &counts["written"]), (&json!(2), &json!(0), &json!(5)));
    assert_eq!(fs::read_to_string(&log).unwrap().lines().count(), 2);

    // Tables with columns.
    fs::write(at("c.csv"), "caption,id\n\"a \"\"cat\"\", 🐱\",1\nred car,2\nrefuse,3\n").unwrap();
    fs::write(at("d.tsv"), "id\ten\n1\ta dog\n").unwrap();
    report(translate(&at("c.csv"), &at("out"), by, &[]).output().unwrap());
    report(translate(&at("d.tsv"), &at("out"), by, &["--caption-column", "en"]).output().unwrap());
    let text = fs::read_to_string(at("out/c.csv")).unwrap();
    assert_eq!(
        text,
        "caption,id,caption_original\n\"一只\"\"cat\"\",🐱\",1,\"a \"\"cat\"\", 🐱\"\n红色的汽车,2,red car\n"
    );
    assert_eq!(fs::read_to_string(at("out/d.tsv")).unwrap(), "id\ten\tcaption_original\n1\t一只狗\ta dog\n");
}

#[test]
fn samples_of_folders_become_shards_that_train() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    for (name, text) in [("0", "a cat\nrefuse\na dog"), ("1", "refuse"), ("2", "red car")] {
        fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/src/demo/sample.png"), at(&format!("in/{name}.png"))).unwrap();
        fs::write(at(&format!("in/{name}.txt")), text).unwrap();
    }
    fs::write(at("in/2.json"), json!({"caption": "a red car", "width": 64}).to_string()).unwrap();
    let command = program("", &at("log"));
    let by = ["--command", command.as_str()];
    for (input, output) in [("in", "out"), ("out", "again")] {
        let original = if input == "in" { "caption_original" } else { "first" };
        let (counts, _) =
            report(translate(&at(input), &at(output), by, &["--original-column", original]).output().unwrap());
        assert_eq!(counts["written"], json!(2), "{counts}");
    }
    let mut archive = tar::Archive::new(fs::File::open(at("out/00000.tar")).unwrap());
    let mut members = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let (name, mut content) = (entry.path().unwrap().display().to_string(), Vec::new());
        entry.read_to_end(&mut content).unwrap();
        if !name.ends_with("png") {
            members.push((name, String::from_utf8(content).unwrap()));
        }
    }
    let member = |name: &str| members.iter().find(|(other, _)| other == name).unwrap().1.as_str();
    let object = |name| serde_json::from_str::<Value>(member(name)).unwrap();
    assert_eq!((member("0.txt"), member("2.txt")), ("一只猫\n一只狗", "一只红色的汽车"));
    let original = json!(["a cat", "refuse", "a dog"]);
    let several = json!({"caption": "一只猫", "captions": ["一只猫", "一只狗"], "caption_original": original});
    assert_eq!(object("0.json"), several);
    assert_eq!(object("2.json"), json!({"caption": "一只红色的汽车", "caption_original": "a red car", "width": 64}));
    assert_eq!(members.len(), 4, "sample 1 is left out");
}

#[test]
fn a_killed_run_resumes_to_the_same_tables_and_asks_for_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    let words = ["a", "cat", "dog", "red", "car", "on", "the", "grass"];
    for table in 0..3 {
        let captions: Vec<String> =
            (0..512).map(|i| format!("{} {} {}", words[i % 8], words[i / 8 % 8], i / 64 + table)).collect();
        write_rows(&at(&format!("in/{table}.jsonl")), &captions.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let whole_command = program("", &at("whole.log"));
    report(translate(&at("in"), &at("whole"), ["--command", &whole_command], &[]).output().unwrap());
    let command = program("slow", &at("killed.log"));
    let run = || translate(&at("in"), &at("killed"), ["--command", &command], &["--batch", "16", "--workers", "2"]);
    let cache = at("killed/.translate/cache.jsonl");
    // Killed in the first table, and once the second one is written.
    for sign in [cache.clone(), at("killed/1.jsonl")] {
        let mut child = run().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        let there = || fs::metadata(&sign).is_ok_and(|meta| meta.len() > 0);
        while !there() && start.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(there());
    }
    // As if the machine had stopped within a line.
    fs::OpenOptions::new().append(true).open(&cache).unwrap().write_all(b"{\"text\":\"a c").unwrap();
    let (counts, _) = report(run().output().unwrap());
    assert_eq!((&counts["rows"], &counts["translated"]), (&json!(1536), &json!(1536)));
    assert!(counts["finished_before"].as_u64().unwrap() >= 1, "{counts}");
    for table in 0..3 {
        let name = format!("{table}.jsonl");
        assert_eq!(fs::read(at("killed").join(&name)).unwrap(), fs::read(at("whole").join(&name)).unwrap());
    }
    let left =
        fs::read_dir(at("killed")).unwrap().any(|entry| entry.unwrap().path().extension().is_some_and(|e| e == "tmp"));
    assert!(!left, "temporary files are left");
    let asked = |log: &str| fs::read_to_string(at(log)).unwrap().lines().count();
    // What was in flight when the process was killed is asked again: at most two batches each time.
    assert!(asked("killed.log") <= asked("whole.log") + 2 * 2 * 16, "{} {}", asked("killed.log"), asked("whole.log"));
    assert_eq!(report(run().output().unwrap()).0["finished_before"], json!(3));
}

#[test]
fn processes_of_a_launcher_translate_what_one_process_does() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    for (table, captions) in
        [["a cat", "refuse", "red car"], ["a dog", "a cat", "on the grass"], ["red dog", " ", "a car"]]
            .iter()
            .enumerate()
    {
        write_rows(&at(&format!("in/{table}.jsonl")), captions);
    }
    let command = program("", &at("alone.log"));
    let (alone, _) = report(translate(&at("in"), &at("alone"), ["--command", &command], &[]).output().unwrap());
    let ranks = ["0", "1"].map(|rank| {
        let command = program("", &at(&format!("rank{rank}.log")));
        let command = translate(&at("in"), &at("shared"), ["--command", &command], &[]);
        as_rank_of_two(command, rank).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    });
    let counts = ranks.map(|rank| report(rank.wait_with_output().unwrap()).0);
    for table in 0..3 {
        let name = format!("{table}.jsonl");
        assert_eq!(fs::read(at("shared").join(&name)).unwrap(), fs::read(at("alone").join(&name)).unwrap(), "{name}");
    }
    assert_eq!(counts.each_ref().map(|counts| counts["inputs"].as_u64().unwrap()), [2, 1]);
    for name in ["rows", "translated", "written"] {
        let sum: u64 = counts.iter().map(|counts| counts[name].as_u64().unwrap()).sum();
        assert!(sum > 0 && Some(sum) == alone[name].as_u64(), "{name}: {sum}");
    }
    // Each rank has a report, a cache and a lock of its own.
    for name in ["translate.json", "translate.rank1.json", ".translate/cache.jsonl", ".translate/cache.jsonl.rank1"] {
        assert!(at("shared").join(name).exists(), "{name}");
    }
    let asked = |log: &str| fs::read_to_string(at(log)).unwrap().lines().count();
    assert_eq!((asked("rank0.log"), asked("rank1.log")), (4, 3));
}

#[test]
fn a_program_with_faults_costs_only_the_captions_that_it_cannot_translate() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let texts = ["a cat", "a dog", "red car", "the bomb", "red cat", "stuck", "red dog"];
    let expected = ["一只猫", "一只狗", "红色的汽车", "红色的猫", "红色的狗"];
    write_rows(&at("a.jsonl"), &texts);
    let run = |fault: &str| {
        let command = program(fault, &at(&format!("{fault}.log")));
        let more = ["--timeout", "1", "--retries", "1"];
        translate(&at("a.jsonl"), &at(fault), ["--command", &command], &more).output().unwrap()
    };
    for fault in ["dies-once", "twice"] {
        let (counts, _) = report(run(fault));
        assert_eq!(captions(&at(fault).join("a.jsonl")), expected, "{fault}");
        assert_eq!(
            (&counts["failed"]["exited"]["count"], &counts["failed"]["timeout"]["count"]),
            (&json!(1), &json!(1))
        );
        let example = counts["failed"]["exited"]["examples"][0].as_str().unwrap();
        assert!(example.contains("exit status: 3") && example.contains("cannot go on with this text"), "{example}");
    }
    let output = run("garbage");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("printed `loading the model`") && said.contains("\nhint: "), "{said}");
    assert!(!at("garbage/a.jsonl").exists());
}

#[test]
fn unusable_translators_outputs_and_columns_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_rows(&at("a.jsonl"), &["a cat", "a dog"]);
    write_rows(&at("refused.jsonl"), &["refuse"]);
    fs::write(at("b.csv"), "caption,caption_original\na cat,b\n").unwrap();
    let good = program("", &at("log"));
    let check = |input: &str, output: &str, by: [&str; 2], more: &[&str], code: i32, message: &str| {
        let output = translate(&at(input), &at(output), by, more).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(message) && said.contains("\nhint: "), "{said}");
    };
    let by = ["--command", good.as_str()];
    check("a.jsonl", "out1", ["--command", "no-such-program -x"], &[], 1, "cannot start `no-such-program`");
    check("a.jsonl", "out2", ["--command", "'"], &[], 2, "is not a command");
    check("a.jsonl", "out3", ["--url", "https://127.0.0.1/"], &[], 2, "is not an address");
    check("a.jsonl", "out4", ["--command", "false"], &["--retries", "0"], 1, "exit status: 1");
    check("a.jsonl", "out5", by, &["--caption-column", "text"], 1, "no caption was translated");
    check("refused.jsonl", "out6", by, &[], 1, "no caption was translated");
    check("b.csv", "out7", by, &[], 2, "already has a column `caption_original`");
    check("b.csv", "out8", by, &["--caption-column", "text"], 2, "has no column `text`");
    check("a.jsonl", "b.csv", by, &[], 2, "cannot become");
    // A file that the command did not make, and a cache that is none.
    fs::create_dir(at("mine")).unwrap();
    fs::write(at("mine/a.jsonl"), "dear").unwrap();
    check("a.jsonl", "mine", by, &[], 1, "was not made from");
    let letter = at("mine/a.jsonl").display().to_string();
    check("a.jsonl", "out9", by, &["--cache", &letter], 1, "is not a cache");
    assert_eq!(fs::read_to_string(at("mine/a.jsonl")).unwrap(), "dear");
}

/// What the service does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Status(&'static str),
    /// The connection is closed in the middle of the answer.
    Cut,
    /// The first answer is missing.
    Missing,
    Garbage,
    Slow,
}

/// Serves one request after the other, each with the next fault, then without; gives the address.
fn serve(faults: &[Fault]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/translate", listener.local_addr().unwrap());
    let faults = faults.to_vec();
    thread::spawn(move || {
        let faults = faults.into_iter().chain(std::iter::repeat(Fault::None));
        for (stream, fault) in listener.incoming().zip(faults) {
            // A client that gave up is no error of the service.
            thread::spawn(move || drop(answer(stream.unwrap(), fault)));
        }
    });
    address
}

fn answer(mut stream: TcpStream, fault: Fault) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let questions = serde_json::Deserializer::from_slice(&body).into_iter::<Value>().map(Result::unwrap);
    let mut lines: Vec<String> = questions
        .map(|question| {
            json!({"id": question["id"], "text": format!("译{}", question["text"].as_str().unwrap())}).to_string()
        })
        .collect();
    let mut status = "200 OK";
    match fault {
        Fault::Status(other) => (status, lines) = (other, vec!["busy".into()]),
        Fault::Missing => drop(lines.remove(0)),
        Fault::Garbage => lines[0] = "<html>".into(),
        Fault::Slow => thread::sleep(Duration::from_secs(3)),
        Fault::None | Fault::Cut => {}
    }
    let body = lines.join("\n");
    let cut = if fault == Fault::Cut { body.len() / 2 } else { body.len() };
    write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len())?;
    stream.write_all(&body.as_bytes()[..cut])
}

#[test]
fn a_service_with_faults_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_rows(&at("a.jsonl"), &["a cat", ODD, "a dog"]);
    let busy = Fault::Status("503 Service Unavailable");
    let faults = [busy, Fault::Cut, Fault::Missing, Fault::Garbage, Fault::Slow, busy];
    let url = serve(&faults);
    let more = ["--timeout", "1", "--retries", "6"];
    let (counts, _) = report(translate(&at("a.jsonl"), &at("out"), ["--url", &url], &more).output().unwrap());
    assert_eq!(captions(&at("out/a.jsonl")), ["译a cat", "译a \"red\" car, 🐱 on the \\grass", "译a dog"]);
    assert_eq!((&counts["asked"], &counts["failed"]), (&json!(3), &json!({})));

    for (fault, cause) in [(busy, "http-status"), (Fault::Cut, "connection"), (Fault::Slow, "timeout")] {
        // One batch of three texts: two attempts, then halves.
        let url = serve(&[fault; 2]);
        let more = ["--timeout", "1", "--retries", "0", "--batch", "3"];
        let output = at(cause);
        let (counts, _) = report(translate(&at("a.jsonl"), &output, ["--url", &url], &more).output().unwrap());
        assert_eq!(counts["failed"][cause]["count"], json!(1), "{counts}");
        assert_eq!(captions(&output.join("a.jsonl")).len(), 2, "{cause}");
    }

    let url = serve(&[Fault::Status("404 Not Found")]);
    let said = translate(&at("a.jsonl"), &at("none"), ["--url", &url], &[]).output().unwrap();
    assert_eq!(said.status.code(), Some(1));
    assert!(String::from_utf8(said.stderr).unwrap().contains("404 Not Found: `busy`"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let said = translate(&at("a.jsonl"), &at("none"), ["--url", &closed], &["--retries", "0"]).output().unwrap();
    let message = String::from_utf8(said.stderr).unwrap();
    assert_eq!(said.status.code(), Some(1));
    assert!(message.contains("the translator does not answer"), "{message}");
}
