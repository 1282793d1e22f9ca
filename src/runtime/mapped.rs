//! Memory-mapped files.

use crate::{
    bounded_read,
    error::{Context, Result},
};
use std::{ops::Deref, path::Path};

/// A read-only memory-mapped file: pages are read from the disk when they are used, and dropped when memory is short.
///
/// A page that cannot be read (the file was truncated after it was opened, or the disk fails) raises SIGBUS. On Linux
/// the program then prints an error and ends with exit code 1.
pub struct Mapped(memmap2::Mmap);

impl Mapped {
    /// Maps a file.
    ///
    /// # Errors
    /// The file is missing, not a regular file, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = bounded_read::open(path)?;
        #[cfg(target_os = "linux")]
        bus_error::explain();
        // SAFETY: files of model folders and checkpoints are never changed in place: new files are written and renamed.
        // If a file is truncated all the same, `bus_error` ends the program.
        let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        Ok(Self(map))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(target_os = "linux")]
mod bus_error {
    use std::sync::Once;

    const MESSAGE: &[u8] = b"error: a file became shorter while it was read, or its disk failed\n\
        hint: do not change model folders and checkpoints in place; check the disk, copy the files again and start again\n";

    /// Installs a SIGBUS handler that ends the program with an error message instead of a core dump.
    pub fn explain() {
        static DONE: Once = Once::new();
        DONE.call_once(|| {
            let handler: extern "C" fn(libc::c_int) = say_and_leave;
            // SAFETY: the handler calls only functions that are safe in a signal handler, and it does not return.
            unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
        });
    }

    extern "C" fn say_and_leave(_: libc::c_int) {
        // SAFETY: write and _exit may be called in a signal handler; the message is a constant of this length.
        unsafe {
            libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(1);
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::process::Command;

    const FILE: &str = "VILG_TEST_FILE_TO_CUT";

    /// Runs in its own process, because it ends that process.
    #[test]
    fn a_file_that_is_cut_while_it_is_mapped_ends_the_program_with_a_message() {
        if let Some(path) = std::env::var_os(FILE) {
            let mapped = Mapped::open(Path::new(&path)).unwrap();
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(10).unwrap();
            assert_eq!(mapped.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 0);
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, vec![1; 1 << 20]).unwrap();
        let name = "runtime::mapped::tests::a_file_that_is_cut_while_it_is_mapped_ends_the_program_with_a_message";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", name, "--nocapture"]).env(FILE, file.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{:?}", output.status);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("error: a file became shorter") && said.contains("hint: "), "{said}");
    }
}
