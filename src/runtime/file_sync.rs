//! Locks of files and durable renames, on file systems that may support neither.

use crate::{
    error::{Context, Result},
    report,
};
use std::{
    fs::{File, TryLockError},
    io::ErrorKind,
    path::Path,
    sync::Once,
};

/// Result of [`lock`].
pub enum Lock {
    /// The lock is held until the file is closed.
    Held,
    /// Another process holds the lock.
    Busy,
    /// The file system does not support locks; the error says why.
    Unsupported(std::io::Error),
}

/// Locks an open file exclusively against other processes, without waiting.
///
/// NFS without a lock service, Lustre without `-o flock` and some FUSE file systems have no `flock`: they answer
/// `ENOSYS`, `EOPNOTSUPP` or `ENOLCK`.
///
/// # Errors
/// The file system supports locks, but locking fails.
pub fn lock(file: &File) -> Result<Lock> {
    outcome(file.try_lock())
}

/// Locks an open file against exclusive locks, without waiting; other processes may hold shared locks too.
///
/// # Errors
/// As [`lock`].
pub fn lock_shared(file: &File) -> Result<Lock> {
    outcome(file.try_lock_shared())
}

fn outcome(locked: std::result::Result<(), TryLockError>) -> Result<Lock> {
    match locked {
        Ok(()) => Ok(Lock::Held),
        Err(TryLockError::WouldBlock) => Ok(Lock::Busy),
        Err(TryLockError::Error(error)) if is_unsupported(&error) => Ok(Lock::Unsupported(error)),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Flushes the entries of a folder (new names and renames) to the disk.
///
/// File systems that cannot do this for a folder (`EINVAL`, `ENOSYS` or `EOPNOTSUPP`) cause one warning per process: a
/// crash of the machine may then lose the newest files, but a file never has partial content under its final name.
///
/// # Errors
/// The folder cannot be opened, or its disk fails.
pub fn sync_folder(folder: &Path) -> Result<()> {
    static WARNED: Once = Once::new();
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Ok(()) => Ok(()),
        Err(error) if is_unsupported(&error) => {
            WARNED.call_once(|| {
                report::warn(format_args!(
                    "the file system of {} cannot sync folders ({error}): a crash of this machine may lose the newest \
                     files",
                    folder.display()
                ));
            });
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("cannot sync {}", folder.display())),
    }
}

/// Whether the file system does not support the operation, as opposed to a failure of it.
fn is_unsupported(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput)
        || error.raw_os_error().is_some_and(|code| [libc::ENOSYS, libc::ENOTSUP, libc::ENOLCK].contains(&code))
}
