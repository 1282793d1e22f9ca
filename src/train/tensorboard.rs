//! Event files of TensorBoard: records of TensorFlow's format (length, payload, masked CRC-32C of both) whose payloads are
//! `Event` messages in Protocol Buffers (tensorflow/core/util/event.proto, framework/summary.proto).

use std::{
    fs::{File, OpenOptions},
    io::{Result, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The version of the format, in the first record.
const VERSION: &str = "brain.Event:2";

/// An event file that is being written, one record at a time and without a buffer.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

/// What an event says.
enum What<'a> {
    FileVersion,
    /// The run begins anew with the step of the event: what earlier files say about it and later steps does not count.
    SessionStart,
    Scalars(&'a [(String, f64)]),
    Image {
        tag: &'a str,
        png: &'a [u8],
        size: [u32; 2],
    },
}

impl EventFile {
    /// Creates an event file in `folder` for a run that did `step` steps before.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(folder: &Path, host: &str, step: u64) -> Result<Self> {
        let now = SystemTime::now();
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads the files of a folder in the order of their names.
        let host: String = host.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
        let name =
            |count: u32| format!("events.out.tfevents.{:010}.{host}.{}.{count}", since.as_secs(), std::process::id());
        let mut count = 0;
        let (file, path) = loop {
            let path = folder.join(name(count));
            match OpenOptions::new().append(true).create_new(true).open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && count < 1000 => count += 1,
                opened => break (opened?, path),
            }
        };
        let mut events = Self { file, path };
        events.write(&event(since, 0, &What::FileVersion))?;
        events.write(&event(since, step + 1, &What::SessionStart))?;
        Ok(events)
    }

    /// Writes to an existing file, such as a disk that is always full.
    #[cfg(test)]
    pub fn on(path: &Path) -> Self {
        Self { file: OpenOptions::new().write(true).open(path).unwrap(), path: path.to_owned() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the scalars of a step. They are stored as f32.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        self.write(&event(now(), step, &What::Scalars(scalars)))
    }

    /// Writes an image of a step: a PNG file of `size` (width and height in pixels).
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, png: &[u8], size: [u32; 2]) -> Result<()> {
        self.write(&event(now(), step, &What::Image { tag, png, size }))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event))
    }
}

/// Time since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A record: length, its checksum, payload, its checksum.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(payload);
    record.extend(masked_crc(payload).to_le_bytes());
    record
}

/// The checksum of a record. It is masked because a CRC of data that contain their own CRC says little.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// `Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; SessionLog session_log = 7; }`
fn event(time: Duration, step: u64, what: &What) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, time.as_secs_f64());
    event.integer(2, step);
    match what {
        What::FileVersion => event.bytes(3, VERSION.as_bytes()),
        What::Scalars(scalars) => event.message(5, &scalars_summary(scalars)),
        What::Image { tag, png, size } => event.message(5, &image_summary(tag, png, *size)),
        // `SessionLog { SessionStatus status = 1; }`, START = 1
        What::SessionStart => {
            let mut log = Message::default();
            log.integer(1, 1);
            event.message(7, &log);
        }
    }
    event.0
}

/// `Summary { repeated Value value = 1; }`, `Value { string tag = 1; float simple_value = 2; Image image = 4; }`
fn scalars_summary(scalars: &[(String, f64)]) -> Message {
    let mut summary = Message::default();
    for (tag, number) in scalars {
        let mut value = Message::default();
        value.bytes(1, tag.as_bytes());
        value.float(2, *number as f32);
        summary.message(1, &value);
    }
    summary
}

/// `Image { int32 height = 1; int32 width = 2; int32 colorspace = 3; bytes encoded_image_string = 4; }`, RGB = 3
fn image_summary(tag: &str, png: &[u8], [width, height]: [u32; 2]) -> Message {
    let (mut image, mut value, mut summary) = (Message::default(), Message::default(), Message::default());
    image.integer(1, height.into());
    image.integer(2, width.into());
    image.integer(3, 3);
    image.bytes(4, png);
    value.bytes(1, tag.as_bytes());
    value.message(4, &image);
    summary.message(1, &value);
    summary
}

/// A message of Protocol Buffers, field by field in ascending order.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// Number of the field and type of its value: 0 a varint, 1 eight bytes, 2 a length and bytes, 5 four bytes.
    fn key(&mut self, field: u64, kind: u64) {
        self.varint((field << 3) | kind);
    }

    /// 0 is the default, which is not written.
    fn integer(&mut self, field: u64, value: u64) {
        if value != 0 {
            self.key(field, 0);
            self.varint(value);
        }
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn message(&mut self, field: u64, message: &Self) {
        self.bytes(field, &message.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// RFC 3720, B.4.
    #[test]
    fn crc_32c_of_published_vectors() {
        let ascending: Vec<u8> = (0..32).collect();
        let vectors = [(vec![0; 32], 0x8a91_36aa), (vec![0xff; 32], 0x62a8_ab43), (ascending, 0x46dd_794e)];
        for (bytes, crc) in vectors {
            assert_eq!(crc32c(&bytes), crc);
        }
    }

    /// Against TensorBoard's own writer (scripts/golden_tensorboard.py).
    #[test]
    fn files_are_equal_to_those_of_tensorboard() {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden/tensorboard.json")).unwrap();
        let hex = |text: &Value| -> Vec<u8> {
            let digits = text.as_str().unwrap().as_bytes();
            digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
        };
        let mut bytes = Vec::new();
        for stored in golden["events"].as_array().unwrap() {
            let scalars: Vec<(String, f64)> = stored["scalars"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|pair| (pair[0].as_str().unwrap().to_owned(), pair[1].as_f64().unwrap()))
                .collect();
            let png = if stored["png"].is_string() { hex(&stored["png"]) } else { Vec::new() };
            let what = match stored["what"].as_str().unwrap() {
                "file_version" => What::FileVersion,
                "session_start" => What::SessionStart,
                "scalars" => What::Scalars(&scalars),
                _ => What::Image { tag: stored["tag"].as_str().unwrap(), png: &png, size: [300, 2] },
            };
            let time = Duration::from_secs_f64(stored["wall_time"].as_f64().unwrap());
            bytes.extend(record(&event(time, stored["step"].as_u64().unwrap(), &what)));
        }
        assert!(bytes == hex(&golden["file"]), "{bytes:02x?}");
    }

    #[test]
    fn a_second_file_of_the_same_second_has_another_name_and_restarts_after_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = [0, 7].map(|step| EventFile::create(folder.path(), "a/b", step).unwrap());
        assert_ne!(first.path(), second.path());
        // After the version's record of 40 bytes: the header of a record, the time, then the step 8 and the start.
        let content = std::fs::read(second.path()).unwrap();
        assert_eq!(content[40 + 12 + 9..][..6], [0x10, 8, 0x3a, 2, 8, 1]);
    }
}
