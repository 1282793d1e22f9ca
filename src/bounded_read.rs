//! Bounded reads of small files from users or downloads: only regular files, and never more bytes than a limit.
//!
//! A link to `/dev/zero` never ends, and opening a FIFO waits for a writer that may never come.

use crate::error::{Context, Result, ensure};
use std::{
    fs::{File, OpenOptions},
    io::Read,
    path::Path,
};

/// Maximum size of a text that a person wrote, such as a configuration or a licence, in bytes.
pub const TEXT: u64 = 4 << 20;
/// Maximum size of a vocabulary in bytes; the largest published vocabularies have about 10 MB.
pub const VOCABULARY: u64 = 64 << 20;

/// Opens a regular file for reading. Symbolic links are followed.
///
/// # Errors
/// The file is missing, or it is a folder, device, socket or FIFO.
pub fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Without this flag, opening a FIFO waits for a writer. Regular files ignore the flag.
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let meta = file.metadata().with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(meta.is_file(), "{} is not a regular file", path.display());
    Ok(file)
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
}
