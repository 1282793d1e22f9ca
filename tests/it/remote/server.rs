//! An HTTP server that fails on purpose, and a real S3 server.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// A request; names of headers in lower case.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

impl Request {
    /// First byte that is wanted.
    pub fn start(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// An answer, and how it fails.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// `Content-Length`, where it is not the length of the body.
    pub length: Option<usize>,
    /// The connection ends after this many bytes.
    pub cut: Option<usize>,
    /// The server sends nothing more after this many bytes.
    pub stall: Option<usize>,
    /// Wait after each 16 KiB.
    pub pause: Duration,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        let (headers, body, pause) = (Vec::new(), Vec::new(), Duration::ZERO);
        Self { status, headers, body, length: None, cut: None, stall: None, pause }
    }

    pub fn whole(content: &[u8], etag: &str) -> Self {
        let headers = vec![("ETag", format!("\"{etag}\""))];
        Self { headers, body: content.to_vec(), ..Self::status(200) }
    }

    /// The answer of a correct server to a request with or without a range.
    pub fn right(request: &Request, content: &[u8], etag: &str) -> Self {
        let whole = Self::whole(content, etag);
        let quoted = format!("\"{etag}\"");
        if request.headers.get("if-none-match") == Some(&quoted) {
            return Self { body: Vec::new(), status: 304, ..whole };
        }
        let same = request.headers.get("if-range").is_none_or(|wanted| *wanted == quoted);
        match request.start().filter(|_| same) {
            Some(start) if start >= content.len() => Self::status(416),
            Some(start) => Self::rest(content, etag, start),
            None => whole,
        }
    }

    pub fn rest(content: &[u8], etag: &str, start: usize) -> Self {
        let mut reply = Self { status: 206, body: content[start..].to_vec(), ..Self::whole(content, etag) };
        reply.headers.push(("Content-Range", format!("bytes {start}-{}/{}", content.len() - 1, content.len())));
        reply
    }

    pub fn cut(self, after: usize) -> Self {
        Self { cut: Some(after), ..self }
    }
}

/// A server on the loopback device; it ends with the process.
pub struct Server {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// `reply` also gets the number of earlier requests.
    pub fn start(reply: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, reply) = (Arc::clone(&requests), Arc::new(reply));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, reply) = (Arc::clone(&seen), Arc::clone(&reply));
                thread::spawn(move || serve(&stream.unwrap(), &seen, &*reply));
            }
        });
        Self { url, requests }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(stream: &TcpStream, seen: &Mutex<Vec<Request>>, reply: &dyn Fn(&Request, usize) -> Reply) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let header = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(header).collect();
    let request = Request { path, headers };
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.len() - 1
    };
    // The client may hang up at any time.
    let _ = send(stream, &reply(&request, number));
}

fn send(mut stream: &TcpStream, reply: &Reply) -> std::io::Result<()> {
    let length = reply.length.unwrap_or(reply.body.len());
    let mut head = format!("HTTP/1.1 {} x\r\nContent-Length: {length}\r\nConnection: close\r\n", reply.status);
    reply.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    let end = reply.cut.or(reply.stall).unwrap_or(reply.body.len()).min(reply.body.len());
    for chunk in reply.body[..end].chunks(16 << 10) {
        stream.write_all(chunk)?;
        thread::sleep(reply.pause);
    }
    if reply.stall.is_some() {
        thread::sleep(Duration::from_secs(30));
    }
    Ok(())
}

/// A `moto` server, which `scripts/s3_server.sh` installs.
pub struct S3 {
    child: Child,
    address: String,
}

impl S3 {
    pub fn start() -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/s3/bin/moto_server");
        let command = || Command::new(&program).args(["-H", "127.0.0.1", "-p", "0"]).stderr(Stdio::piped()).spawn();
        let mut child = command().unwrap_or_else(|e| panic!("{}: {e}: run ./scripts/s3_server.sh", program.display()));
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.split_once("http://")?.1.trim().to_owned())).unwrap();
        // It writes a line for each request.
        thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn put(&self, path: &str, content: &[u8]) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let credential =
            "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=b";
        let head = format!(
            "PUT {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: {credential}\r\nContent-Type: application/octet-stream\r\nx-amz-acl: public-read\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            self.address,
            content.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(content).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
