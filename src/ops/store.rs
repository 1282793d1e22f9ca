//! Vectors that only the optimizer touches, in memory or on a disk: what `train.offload` decides (ZeRO-Infinity, arXiv 2104.07857).

use crate::error::{Context, Hint, Result};
use memmap2::MmapMut;
use std::{
    fs::{self, File},
    io,
    ops::{Deref, DerefMut},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// Where new vectors are stored.
#[derive(Debug, Clone, Default)]
pub enum Store {
    #[default]
    Memory,
    /// In files of this folder. They have no name once they are open, so nothing is left behind, however the program ends.
    Disk(PathBuf),
}

/// f32 numbers in memory, or in a mapped file whose pages the system can evict when memory is short.
pub enum Floats {
    Memory(Vec<f32>),
    Disk(MmapMut),
}

impl Store {
    /// `len` zeros.
    ///
    /// # Errors
    /// The disk is full.
    pub fn zeros(&self, len: usize) -> Result<Floats> {
        match self {
            Self::Disk(folder) if len > 0 => {
                let hint = "free some space there, or set train.offload to `cpu`";
                let what = || format!("cannot lay {} bytes down in {}", 4 * len, folder.display());
                mapped(folder, 4 * len).map(Floats::Disk).hint(what(), hint)
            }
            _ => Ok(Floats::Memory(vec![0.0; len])),
        }
    }

    /// A copy of `values`.
    pub fn copy(&self, values: &[f32]) -> Result<Floats> {
        let mut floats = self.zeros(values.len())?;
        floats.copy_from_slice(values);
        Ok(floats)
    }
}

fn mapped(folder: &Path, bytes: usize) -> Result<MmapMut> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    let name = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = folder.join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).context("cannot make a file")?;
    fs::remove_file(&path)?;
    reserve(&file, bytes)?;
    // SAFETY: the file has no name any more: nobody else can change or shorten it.
    Ok(unsafe { MmapMut::map_mut(&file) }?)
}

/// Gives a file its length and its blocks on the disk: without it, a full disk would show as a crash in the middle of a step.
fn reserve(file: &File, bytes: usize) -> Result<()> {
    // SAFETY: the descriptor is open as long as `file` is; no memory is involved.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, libc::off_t::try_from(bytes)?) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code).into()),
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Memory(values) => values,
            Self::Disk(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Memory(values) => values,
            Self::Disk(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_holds_what_memory_holds_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Store::Disk(folder.path().join("offload"));
        for store in [Store::Memory, disk.clone()] {
            let mut floats = store.copy(&[1.0, -2.0, 3.5]).unwrap();
            floats[1] = 7.0;
            assert_eq!(*floats, [1.0, 7.0, 3.5]);
            assert_eq!(*store.zeros(5000).unwrap(), [0.0; 5000]);
            assert!(store.zeros(0).unwrap().is_empty());
        }
        assert_eq!(fs::read_dir(folder.path().join("offload")).unwrap().count(), 0);
        let error = disk.zeros(1 << 52).err().unwrap();
        assert!(format!("{error:#}").contains("cannot lay"), "{error:#}");
    }
}
