//! `vilg serve`: the program itself, over plain HTTP, with a small untrained model.

use crate::{commands::vilg, generate::folder, server::Running};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::TcpStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// The API of a model.
struct Server {
    program: Running,
    address: String,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn of(response: &[u8]) -> Self {
        let text = String::from_utf8_lossy(response).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Self { status, head: head.to_lowercase(), body: body.to_owned() }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{} {}", self.head, self.body))
    }

    fn message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap().to_owned()
    }

    fn images(&self) -> Vec<Vec<u8>> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data = self.json()["data"].as_array().unwrap().clone();
        data.iter().map(|image| BASE64_STANDARD.decode(image["b64_json"].as_str().unwrap()).unwrap()).collect()
    }
}

impl Server {
    fn start(folder: &Path, args: &[&str]) -> Self {
        let mut command = vilg(&["serve", "--port", "0", "--json", "--model", "model"]);
        command.args(args).current_dir(folder).env_remove("VILG_SERVE_TOKEN");
        let (program, line) = Running::start(&mut command);
        let started: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
        Self { program, address: started["address"].as_str().unwrap().to_owned() }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request and reads until the server closes the connection.
    fn send(&self, request: &str) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).unwrap();
        Answer::of(&response)
    }

    fn get(&self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    }

    fn request(path: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        format!(
            "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n{headers}\r\n{body}"
        )
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(&Self::request(path, "", &body.to_string()))
    }

    fn generate(&self, body: &Value) -> Answer {
        self.post("/v1/images/generations", body)
    }

    /// A request whose response is being read.
    fn open(&self, body: &Value) -> BufReader<TcpStream> {
        let mut stream = self.connect();
        stream.write_all(Self::request("/v1/images/generations", "", &body.to_string()).as_bytes()).unwrap();
        BufReader::new(stream)
    }

    /// A value of /metrics.
    fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn wait_for(&self, what: &str, is_true: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_true(self) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {}", self.get("/metrics").body);
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Reads lines until one contains `text`.
fn read_until(stream: &mut BufReader<TcpStream>, text: &str) -> String {
    let mut all = String::new();
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the connection ended without `{text}`: {all}");
        all += &line;
        if line.contains(text) {
            return all;
        }
    }
}

/// An image as a data URL.
fn image(side: u32) -> String {
    let image = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([(x * 5) as u8, (y * 3) as u8, 90]));
    format!("data:image/png;base64,{}", BASE64_STANDARD.encode(vilg::data::image_file::png(&image).unwrap()))
}

/// Clients with different prompts, seeds, numbers and ways of sampling at the same time: each gets, byte for byte, what
/// `vilg t2i` writes.
#[test]
fn images_are_those_of_t2i_in_any_company() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--max-batch", "5"]);
    let cases = [
        ("一弯月", 3, 1, ["1", "0", "1", "constant"]),
        ("红月，星", 0, 4, ["0.8", "6", "2.5", "linear"]),
        ("星", 7, 2, ["0", "0", "3", "cosine"]),
        ("一红月", 1 << 40, 7, ["1.3", "0", "1", "linear"]),
        ("月", 3, 3, ["1", "3", "1", "constant"]),
    ];
    let check = |round: usize, (prompt, seed, count, sampling): (&str, u64, usize, [&str; 4])| {
        let [temperature, top_k, guidance, schedule] = sampling;
        let number = |text: &str| text.parse::<f64>().unwrap();
        let found = server.generate(&json!({ "prompt": prompt, "seed": seed, "n": count, "guidance": number(guidance),
            "temperature": number(temperature), "top_k": top_k.parse::<u32>().unwrap(), "guidance_schedule": schedule,
            "temperature_schedule": schedule }));
        let seeds: Vec<u64> =
            found.json()["data"].as_array().unwrap().iter().map(|i| i["seed"].as_u64().unwrap()).collect();
        assert_eq!(seeds, (seed..).take(count).collect::<Vec<_>>());
        let name = format!("{prompt}-{seed}-{round}");
        let mut t2i = vilg(&["t2i", prompt, "--model", "model", "--each", "-n"]);
        t2i.args([&count.to_string(), "--seed", &seed.to_string(), "--temperature", temperature, "--top-k", top_k]);
        t2i.args(["--guidance-schedule", schedule, "--temperature-schedule", schedule]);
        t2i.args(["--guidance", guidance, "-o", &format!("{name}.png")]).current_dir(folder.path());
        assert!(t2i.output().unwrap().status.success());
        for (i, image) in found.images().into_iter().enumerate() {
            let file = if count == 1 { format!("{name}.png") } else { format!("{name}-{}.png", i + 1) };
            assert!(fs::read(folder.path().join(&file)).unwrap() == image, "{file}");
        }
    };
    thread::scope(|scope| {
        for (round, case) in (0..2).flat_map(|round| cases.map(|case| (round, case))) {
            scope.spawn(move || check(round, case));
        }
    });
    let (steps, codes) = (server.metric("vilg_steps_total"), server.metric("vilg_codes_total"));
    assert_eq!(codes, 2 * 17 * 16);
    assert!(steps < codes, "{steps} steps for {codes} codes: no image ever shared a step");
}

#[test]
fn a_stream_shows_the_rows_of_each_image_as_they_come() {
    let folder = folder();
    let server = Server::start(folder.path(), &[]);
    let ask = json!({ "prompt": "一弯月", "n": 2, "seed": 5, "size": "32x32", "stream": true, "partial_images": 3 });
    let answer = server.generate(&ask);
    assert!(answer.status == 200 && answer.head.contains("content-type: text/event-stream"), "{}", answer.head);
    let events: Vec<Value> =
        answer.body.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect();
    assert_eq!(events.len(), 8);
    for image in 0..2 {
        let own: Vec<&Value> = events.iter().filter(|event| event["image_index"] == image).collect();
        for (index, event) in own.iter().enumerate() {
            let bytes = BASE64_STANDARD.decode(event["b64_json"].as_str().unwrap()).unwrap();
            let pixels = image::load_from_memory(&bytes).unwrap();
            assert_eq!((pixels.width(), pixels.height(), &event["seed"]), (32, 32, &json!(5 + image)));
            if index == 3 {
                assert_eq!(event["type"], "image_generation.completed");
                assert_eq!(event["usage"]["output_tokens"], 16);
                continue;
            }
            assert_eq!(
                (&event["type"], &event["partial_image_index"]),
                (&json!("image_generation.partial_image"), &json!(index))
            );
            // The upper rows are there, the others are transparent.
            let alpha = |y| pixels.to_rgba8().get_pixel(16, y).0[3];
            assert_eq!((alpha(2), alpha(31)), (255, 0));
            assert_eq!((alpha(8 * index as u32 + 5), alpha(8 * index as u32 + 11)), (255, 0));
        }
    }
    let names = answer.body.lines().filter(|line| *line == "event: image_generation.completed").count();
    assert_eq!(names, 2);
    // The complete images are those of a request without a stream.
    let last = |event: &Value| BASE64_STANDARD.decode(event["b64_json"].as_str().unwrap()).unwrap();
    let plain = server.generate(&json!({ "prompt": "一弯月", "n": 2, "seed": 5, "size": "32x32" })).images();
    let streamed: Vec<_> =
        events.iter().filter(|event| event["type"] == "image_generation.completed").map(last).collect();
    assert!(plain.iter().all(|image| streamed.contains(image)));
}

#[test]
fn captions_answers_and_scores() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--matcher", "demo"]);
    let image = image(40);
    let captions = server.post("/v1/captions", &json!({ "image": image, "beam": 4, "n": 2 }));
    assert_eq!(captions.status, 200, "{}", captions.body);
    let found: Vec<String> =
        captions.json()["data"].as_array().unwrap().iter().map(|c| c["caption"].as_str().unwrap().to_owned()).collect();
    let bytes = BASE64_STANDARD.decode(image.rsplit(',').next().unwrap()).unwrap();
    fs::write(folder.path().join("a.png"), bytes).unwrap();
    let expected =
        vilg(&["caption", "a.png", "--beam", "4", "-n", "2", "--model", "model"]).current_dir(folder.path()).output();
    assert_eq!(found.join("\n"), String::from_utf8(expected.unwrap().stdout).unwrap().trim());

    let scores = server.post("/v1/scores", &json!({ "image": image, "texts": ["红苹果", "小狗"] })).json();
    let expected =
        vilg(&["score", "a.png", "--json", "--", "红苹果", "小狗"]).current_dir(folder.path()).output().unwrap();
    let expected: Value = serde_json::from_slice(&expected.stdout).unwrap();
    for (found, expected) in scores["data"].as_array().unwrap().iter().zip(expected["scores"].as_array().unwrap()) {
        assert_eq!(found["text"], expected["text"]);
        assert!((found["cosine"].as_f64().unwrap() - expected["cosine"].as_f64().unwrap()).abs() < 1e-5);
    }
    // This model has not learnt it, and the list of models says so.
    let refused = server.post("/v1/answers", &json!({ "image": image, "question": "月？" }));
    assert!(
        refused.status == 400 && refused.message().contains("has not learnt to answer questions"),
        "{}",
        refused.body
    );
    let model = &server.get("/v1/models").json()["data"][0];
    assert_eq!((&model["answers"], &model["scores"], &model["image_size"]), (&json!(false), &json!(true), &json!(16)));
    drop(server);

    let config = folder.path().join("model/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("vqa_batch_size = 0"));
    fs::write(&config, text.replace("vqa_batch_size = 0", "vqa_batch_size = 4")).unwrap();
    let server = Server::start(folder.path(), &["--allow-mismatch"]);
    let answer = server.post("/v1/answers", &json!({ "image": image, "question": "月？" }));
    let expected = vilg(&["vqa", "a.png", "月？", "--model", "model", "--allow-mismatch"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert_eq!(answer.json()["data"][0]["answer"], String::from_utf8(expected.stdout).unwrap().trim());
    let refused = server.post("/v1/scores", &json!({ "image": image, "texts": ["月"] }));
    assert!(refused.status == 400 && refused.message().contains("--matcher"), "{}", refused.body);
}

#[test]
fn wrong_requests_are_refused_and_say_why() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--matcher", "demo"]);
    let long = "月".repeat(1001);
    for (body, status, message) in [
        (json!({}), 400, "missing field `prompt`"),
        (json!([1]), 400, "the body is not what it should be"),
        (json!({ "prompt": 3 }), 400, "expected a string"),
        (json!({ "prompt": " " }), 400, "`prompt` is empty"),
        (json!({ "prompt": long }), 400, "longer than 1000 characters"),
        (json!({ "prompt": "月", "n": 0 }), 400, "`n` must be from 1 to 16"),
        (json!({ "prompt": "月", "n": 17 }), 400, "`n` must be from 1 to 16"),
        (json!({ "prompt": "月", "n": -1 }), 400, "the body is not what it should be"),
        (json!({ "prompt": "月", "size": "64x32" }), 400, "`size` must be"),
        (json!({ "prompt": "月", "size": "9999x9999" }), 400, "`size` must be"),
        (json!({ "prompt": "月", "temperature": -1 }), 400, "`temperature` must be from 0 to 100"),
        (json!({ "prompt": "月", "top_p": 0 }), 400, "`top_p` must be above 0"),
        (json!({ "prompt": "月", "negative_prompt": "星" }), 400, "no effect without guidance"),
        (json!({ "prompt": "月", "guidance_start": 2 }), 400, "`guidance_start` has no effect without a schedule"),
        (json!({ "prompt": "月", "guidance_schedule": "steep" }), 400, "unknown variant `steep`"),
        (json!({ "prompt": "月", "partial_images": 99 }), 400, "`partial_images` must be from 0 to 4"),
        (json!({ "prompt": "月", "output_format": "webp" }), 400, "`output_format` must be `png`"),
        (json!({ "prompt": "月", "background": "transparent" }), 400, "`background` must be"),
        (json!({ "prompt": "月", "model": "../../etc/passwd" }), 404, "no such model"),
        (json!({ "prompt": "月", "model": "dall-e-3" }), 404, "no such model"),
        (json!({ "prompt": "月", "path": "/etc/passwd" }), 400, "unknown field `path`"),
    ] {
        let answer = server.generate(&body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert!(answer.message().contains(message), "{body}: {}", answer.body);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    let bomb = {
        // A PNG of 60,000 x 60,000 pixels in its header.
        let mut png = vilg::data::image_file::png(&image::RgbImage::new(1, 1)).unwrap();
        png[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
        BASE64_STANDARD.encode(png)
    };
    for (image, message) in [
        ("/etc/passwd", "cannot be used"),
        ("file:///etc/passwd", "cannot be used"),
        ("data:image/png,abc", "must be in base64"),
        ("aGVsbG8=", "cannot be used"),
        (bomb.as_str(), "cannot be used"),
    ] {
        for (path, body) in
            [("/v1/captions", json!({ "image": image })), ("/v1/scores", json!({ "image": image, "texts": ["月"] }))]
        {
            let answer = server.post(path, &body);
            assert!(answer.status == 400 && answer.message().contains(message), "{path} {image}: {}", answer.body);
        }
    }
    let many: Vec<&str> = vec!["月"; 65];
    assert_eq!(server.post("/v1/scores", &json!({ "image": image(8), "texts": many })).status, 400);
    assert_eq!(server.post("/v1/captions", &json!({ "image": image(8), "beam": 99 })).status, 400);
    // Bodies that are too large, of another type, or broken.
    let path = "/v1/images/generations";
    let large = "x".repeat(65 << 10);
    assert_eq!(server.send(&Server::request(path, "", &large)).status, 413);
    let head = "Host: localhost\r\nConnection: close\r\nContent-Type: application/json";
    let huge = server.send(&format!("POST /v1/captions HTTP/1.1\r\n{head}\r\nContent-Length: 99999999999\r\n\r\n"));
    assert_eq!((huge.status, huge.json()["error"]["code"].as_str()), (413, Some("body_too_large")));
    // Without a length, in chunks.
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 20, "x".repeat(1 << 20)).repeat(13);
    let chunked = server
        .send(&format!("POST /v1/captions HTTP/1.1\r\n{head}\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n"));
    assert_eq!(chunked.status, 413, "{}", chunked.head);
    let chunk = format!("{:x}\r\n{}\r\n", 70 << 10, "x".repeat(70 << 10));
    let chunked = format!("POST {path} HTTP/1.1\r\n{head}\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n");
    assert_eq!(server.send(&chunked).status, 413);
    assert_eq!(server.send(&Server::request(path, "", "{\"prompt\":\"\\ud800\"}")).status, 400);
    let form = server.send(&format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 8\r\n\r\nprompt=a"
    ));
    assert_eq!(form.status, 415);
    for (path, status) in [
        ("/nothing", 404),
        ("/../Cargo.toml", 404),
        ("/v1/models/x", 404),
        ("/v1/images/generations", 405),
        ("/%2e%2e/etc/passwd", 404),
    ] {
        let answer = server.get(path);
        assert_eq!(answer.status, status, "{path}");
        assert!(!answer.message().is_empty() && answer.head.contains("x-content-type-options: nosniff"));
    }
    assert_eq!(server.send("nonsense\r\n\r\n").status, 400);
    // The server is still there.
    assert_eq!(server.generate(&json!({ "prompt": "月" })).images().len(), 1);
}

#[test]
fn other_sites_and_wrong_tokens_are_kept_out() {
    let folder = folder();
    fs::write(folder.path().join("token.txt"), "abcdefghijklmnop0123\n").unwrap();
    let server = Server::start(folder.path(), &["--token-file", "token.txt", "--allow-host", "images.example"]);
    let get = |path: &str, headers: &str| {
        server.send(&format!("GET {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n")).status
    };
    let right = "Authorization: Bearer abcdefghijklmnop0123\r\n";
    // The page and the health check are open, the rest is not.
    for path in ["/", "/style.css", "/script.js", "/healthz", "/openapi.json"] {
        assert_eq!(get(path, "Host: localhost\r\n"), 200, "{path}");
    }
    for path in ["/v1/models", "/metrics", "/v1/captions"] {
        assert_eq!(get(path, "Host: localhost\r\n"), 401, "{path}");
    }
    for wrong in
        ["Bearer ", "Bearer abcdefghijklmnop012", "Bearer abcdefghijklmnop01234", "Basic abcdefghijklmnop0123", "abc"]
    {
        assert_eq!(get("/v1/models", &format!("Host: localhost\r\nAuthorization: {wrong}\r\n")), 401, "{wrong}");
    }
    assert_eq!(get("/v1/models", &format!("Host: localhost\r\n{right}")), 200);
    // A name that another site owns, and a page of another site.
    for (host, status) in [("evil.example", 403), ("images.example", 200), ("127.0.0.1:1", 200), ("[::1]", 200)] {
        assert_eq!(get("/v1/models", &format!("Host: {host}\r\n{right}")), status, "{host}");
    }
    assert_eq!(get("/", "Host: evil.example\r\n"), 403);
    assert!([400, 403].contains(&get("/", "")));
    for (origin, status) in
        [("http://127.0.0.1", 200), ("http://evil.example", 403), ("http://127.0.0.1:9", 403), ("null", 403)]
    {
        let headers = format!("{right}Origin: {origin}\r\n");
        let answer =
            server.send(&Server::request("/v1/images/generations", &headers, &json!({ "prompt": "月" }).to_string()));
        assert_eq!(answer.status, status, "{origin}: {}", answer.body);
    }
    drop(server);

    fs::write(folder.path().join("token.txt"), "short").unwrap();
    for args in [&["--token-file", "token.txt"][..], &["--token-file", "nowhere.txt"], &["--matcher", "nowhere"]] {
        let output =
            vilg(&["serve", "--port", "0", "--model", "model"]).args(args).current_dir(folder.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!([1, 2].contains(&output.status.code().unwrap()) && said.contains("hint: "), "{said}");
    }
    // From the environment; and the warning of a server that is open to others.
    let mut command = vilg(&["serve", "--port", "0", "--host", "0.0.0.0", "--model", "model"]);
    command.current_dir(folder.path()).env("VILG_SERVE_TOKEN", "0123456789abcdef");
    let (program, url) = Running::start(&mut command);
    let port = url.trim().trim_end_matches('/').rsplit(':').next().unwrap().to_owned();
    let server = Server { program, address: format!("127.0.0.1:{port}") };
    assert_eq!(server.get("/v1/models").status, 401);
    server.program.signal("-TERM");
    let (code, said) = server.program.end();
    assert!(code == Some(0) && said.contains("warning: 0.0.0.0 IS OPEN TO OTHER MACHINES"), "{said}");
}

#[test]
fn a_full_queue_asks_to_come_back() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--queue", "8", "--max-batch", "1"]);
    let many = json!({ "prompt": "月", "n": 9 });
    let answer = server.generate(&many);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (429, &json!("queue_full")));
    let after = answer.head.lines().find_map(|line| line.strip_prefix("retry-after: ")).unwrap().to_owned();
    assert!((1..=60).contains(&after.parse::<u32>().unwrap()), "{after}");
    // What fits is served, and the places are free again.
    let answers: Vec<u16> = thread::scope(|scope| {
        let clients: Vec<_> =
            (0..12).map(|_| scope.spawn(|| server.generate(&json!({ "prompt": "月", "n": 4 })).status)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert!(answers.contains(&200) && answers.iter().all(|status| [200, 429].contains(status)), "{answers:?}");
    let served = answers.iter().filter(|status| **status == 200).count() as u64;
    assert_eq!((server.metric("vilg_images_total"), server.metric("vilg_queue_length")), (4 * served, 0));
    assert_eq!(server.generate(&json!({ "prompt": "月", "n": 8 })).status, 200);
}

#[test]
fn a_client_that_leaves_costs_nothing_more() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--max-batch", "1", "--queue", "1000"]);
    let ask = json!({ "prompt": "月", "n": 16, "stream": true, "partial_images": 3, "size": "1024x1024" });
    let mut stream = server.open(&ask);
    read_until(&mut stream, "partial_image_index");
    drop(stream);
    server.wait_for("the stream is given up", |server| {
        server.metric("vilg_running_images") == 0 && server.metric("vilg_queue_length") == 0
    });
    assert!(server.metric("vilg_images_total") < 16 && server.metric("vilg_cancelled_total") > 0);
    // Without a stream, while it waits and while it runs.
    for _ in 0..8 {
        let mut stream = server.connect();
        let request = Server::request("/v1/images/generations", "", &json!({ "prompt": "星", "n": 16 }).to_string());
        stream.write_all(request.as_bytes()).unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    server.wait_for("all are given up", |server| {
        server.metric("vilg_running_images") == 0 && server.metric("vilg_queue_length") == 0
    });
    assert!(server.metric("vilg_images_total") < 8 * 16);
    assert_eq!(server.generate(&json!({ "prompt": "月" })).status, 200);
}

/// Clients that send their headers or their body slowly, or read nothing, do not stop others, and are sent away.
#[test]
fn slow_clients_are_sent_away() {
    let folder = folder();
    let server = Server::start(folder.path(), &[]);
    let mut heads: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    heads.iter_mut().for_each(|stream| stream.write_all(b"POST /v1/images/generations HTTP/1.1\r\nHost: loc").unwrap());
    let mut body = server.connect();
    let head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000";
    body.write_all(format!("POST /v1/captions HTTP/1.1\r\n{head}\r\n\r\n{{\"image\"").as_bytes()).unwrap();
    // This one never reads its response.
    let deaf =
        server.open(&json!({ "prompt": "月", "n": 16, "stream": true, "partial_images": 3, "size": "1024x1024" }));
    let begun = Instant::now();
    assert_eq!(server.generate(&json!({ "prompt": "月" })).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(12), "slow clients delay others");
    for stream in &mut heads {
        // A byte every now and then changes nothing: the time is that of all headers.
        let _ = stream.write_all(b"a");
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut rest = Vec::new();
        // Where the byte came after the end, the system answers it with a reset.
        let open = |error: &std::io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        assert!(!stream.read_to_end(&mut rest).as_ref().is_err_and(open), "the connection is still open");
    }
    let mut rest = Vec::new();
    body.read_to_end(&mut rest).unwrap();
    assert_eq!(Answer::of(&rest).status, 408);
    assert_eq!(server.get("/healthz").status, 200);
    drop(deaf);
}

#[test]
fn requests_in_progress_are_finished_when_the_server_stops() {
    let folder = folder();
    let ask = json!({ "prompt": "月", "n": 16, "stream": true, "partial_images": 3 });
    for (signal, code) in [("-TERM", 0), ("-INT", 130)] {
        let server = Server::start(folder.path(), &["--max-batch", "1"]);
        let mut stream = server.open(&ask);
        read_until(&mut stream, "partial_image_index");
        server.program.signal(signal);
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest.matches("event: image_generation.completed").count(), 16);
        assert!(TcpStream::connect(&server.address).is_err(), "nobody listens any more");
        let (found, said) = server.program.end();
        assert_eq!(found, Some(code), "{said}");
    }
    // Without time, they get an error.
    let server = Server::start(folder.path(), &["--max-batch", "1", "--grace", "0"]);
    let mut stream = server.open(&ask);
    let waiting = server.open(&json!({ "prompt": "星", "n": 16 }));
    read_until(&mut stream, "partial_image_index");
    server.program.signal("-TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("event: error") && rest.contains("the server was stopped"), "{rest}");
    let mut response = Vec::new();
    waiting.into_inner().read_to_end(&mut response).unwrap();
    assert_eq!(Answer::of(&response).status, 503);
    let (found, said) = server.program.end();
    assert!(found == Some(1) && said.contains("were given up") && said.contains("hint: "), "{said}");
}

#[test]
fn a_request_that_takes_too_long_is_ended() {
    let folder = folder();
    let server = Server::start(folder.path(), &["--max-batch", "1", "--time-limit", "1", "--queue", "10000"]);
    // Some of these cannot be done within a second, one after the other.
    let answers: Vec<u16> = thread::scope(|scope| {
        let ask = json!({ "prompt": "月", "n": 16, "guidance": 2 });
        let clients: Vec<_> = (0..120)
            .map(|_| {
                scope.spawn({
                    let (server, ask) = (&server, ask.clone());
                    move || server.generate(&ask).status
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|status| [200, 503].contains(status)) && answers.contains(&503), "{answers:?}");
    assert!(server.metric("vilg_expired_total") > 0);
    server.wait_for("nothing is left", |server| server.metric("vilg_queue_length") == 0);
    assert_eq!(server.generate(&json!({ "prompt": "月" })).status, 200);
}
