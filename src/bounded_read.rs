//! Bounded reads of small files from users or downloads: only regular files, and never more bytes than a limit.
//!
//! A link to `/dev/zero` never ends, and opening a FIFO waits for a writer that may never come.

use crate::error::{Context, Result, ensure};
use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Maximum size of a text that a person wrote, such as a configuration or a licence, in bytes.
pub const TEXT: u64 = 4 << 20;
/// Maximum size of a vocabulary in bytes; the largest published vocabularies have about 10 MB.
pub const VOCABULARY: u64 = 64 << 20;
/// Time that a FIFO may take to be opened for writing.
const WRITER: Duration = Duration::from_secs(3);

/// Opens a regular file for reading. Symbolic links are followed.
///
/// # Errors
/// The file is missing, or it is a folder, device, socket or FIFO.
pub fn open(path: &Path) -> Result<File> {
    let file = open_any(path)?;
    let meta = file.metadata().with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(meta.is_file(), "{} is not a regular file", path.display());
    Ok(file)
}

fn open_any(path: &Path) -> Result<File> {
    open_without_waiting(path).with_context(|| format!("cannot open {}", path.display()))
}

/// Opens a file, pipe or device for reading. A FIFO without a writer does not block.
///
/// # Errors
/// The file cannot be opened.
pub fn open_without_waiting(path: &Path) -> io::Result<File> {
    // Regular files ignore the flag.
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Reads a file, pipe or device of at most `limit` bytes. A FIFO that nobody opens for writing within 3 seconds is empty.
///
/// # Errors
/// It is a folder, longer than `limit` bytes, or cannot be read.
pub fn read_stream(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let read = read_beyond(open_any(path)?, limit);
    let bytes = read.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(bytes.len() as u64 <= limit, "{} is longer than {limit} bytes", path.display());
    Ok(bytes)
}

/// Reads what [`open_without_waiting`] opened to its end, or until there are more than `limit` bytes. A FIFO that nobody opens
/// for writing within 3 seconds is empty.
///
/// # Errors
/// It is a folder, or cannot be read.
pub fn read_beyond(mut file: File, limit: u64) -> io::Result<Vec<u8>> {
    let (is_fifo, opened) = (file.metadata()?.file_type().is_fifo(), Instant::now());
    let (mut bytes, mut chunk) = (Vec::new(), vec![0; 64 << 10]);
    while bytes.len() as u64 <= limit {
        match file.read(&mut chunk) {
            Ok(0) if !is_fifo || !bytes.is_empty() || opened.elapsed() > WRITER => break,
            Ok(read) if read > 0 => bytes.extend_from_slice(&chunk[..read]),
            Err(e) if !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Err(e),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
    Ok(bytes)
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// As [`open`]; the file is longer than `limit` bytes or cannot be read.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // The file may grow after its length is read, and files of /proc have no length.
    let count = open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    let count = count.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(count as u64 <= limit, "{} is longer than {limit} bytes", path.display());
    Ok(bytes)
}

/// Reads a regular UTF-8 file of at most `limit` bytes.
///
/// # Errors
/// As [`read`], or the file is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    String::from_utf8(read(path, limit)?).with_context(|| format!("{} is not UTF-8 text", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_up_to_the_limit_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "四字").unwrap();
        assert_eq!(read_text(&path, 6).unwrap(), "四字");
        assert!(read_text(&path, 5).unwrap_err().to_string().contains("longer than 5 bytes"));
        assert!(read_text(folder.path(), 6).unwrap_err().to_string().contains("not a regular file"));
        std::fs::write(&path, b"\xff").unwrap();
        assert!(read_text(&path, 6).unwrap_err().to_string().contains("not UTF-8"));
        assert!(read_text(&folder.path().join("nowhere"), 6).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn devices_and_fifos_without_a_writer_are_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let (link, fifo) = (folder.path().join("link"), folder.path().join("fifo"));
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [link, fifo] {
            assert!(read(&path, 10).unwrap_err().to_string().contains("not a regular file"));
        }
    }

    #[cfg(unix)]
    #[test]
    fn streams_are_read_to_their_end_but_not_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let (file, fifo) = (folder.path().join("file"), folder.path().join("fifo"));
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(read_stream(&fifo, 10).unwrap().is_empty(), "nobody writes");
        let writer = thread::spawn({
            let fifo = fifo.clone();
            move || std::fs::write(fifo, "0123456789").unwrap()
        });
        assert_eq!(read_stream(&fifo, 10).unwrap(), b"0123456789");
        writer.join().unwrap();
        std::fs::write(&file, "0123456789").unwrap();
        assert_eq!(read_stream(&file, 10).unwrap(), b"0123456789");
        for (path, limit) in [(file.as_path(), 9), (Path::new("/dev/zero"), 1 << 20)] {
            assert!(read_stream(path, limit).unwrap_err().to_string().contains("longer than"));
        }
        assert!(read_stream(folder.path(), 10).is_err());
    }
}
