//! Vectors that only the optimizer touches, on the device, in memory or on a disk: what `train.offload` decides
//! (ZeRO-Infinity, arXiv 2104.07857).

use crate::error::{Context, Hint, Result, bail};
use candle_core::{DType, Device, Tensor};
use memmap2::MmapMut;
use std::{
    borrow::Cow,
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
    /// In the memory of a device, where the optimizer updates them.
    Device(Device),
}

/// What the optimizer keeps of a parameter, flat and in f32: weights, a moment, an average.
pub enum Buffer {
    Host(Floats),
    Device(Tensor),
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
    /// The disk is full, or the device is out of memory.
    pub fn zeros(&self, len: usize) -> Result<Buffer> {
        Ok(match self {
            Self::Disk(folder) if len > 0 => {
                let hint = "free some space there, or set train.offload to `cpu`";
                let what = || format!("cannot lay {} bytes down in {}", 4 * len, folder.display());
                Buffer::Host(Floats::Disk(mapped(folder, 4 * len).hint(what(), hint)?))
            }
            // A driver has no memory of length zero.
            Self::Device(device) => Buffer::Device(Tensor::zeros(len.max(1), DType::F32, device)?.narrow(0, 0, len)?),
            _ => Buffer::Host(Floats::Memory(vec![0.0; len])),
        })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`Store::zeros`].
    pub fn copy(&self, values: &[f32]) -> Result<Buffer> {
        let mut buffer = self.zeros(values.len())?;
        buffer.set(values)?;
        Ok(buffer)
    }
}

impl Buffer {
    /// The numbers, copied to the host if they are not there.
    pub fn values(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match self {
            Self::Host(floats) => Cow::Borrowed(floats),
            Self::Device(tensor) => Cow::Owned(tensor.to_vec1()?),
        })
    }

    /// Replaces the numbers.
    pub fn set(&mut self, values: &[f32]) -> Result<()> {
        self.fill(|floats| {
            floats.copy_from_slice(values);
            Ok(())
        })
    }

    /// Has `f` write the numbers.
    pub fn fill(&mut self, f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
        match self {
            Self::Host(floats) => f(floats),
            Self::Device(tensor) if tensor.elem_count() == 0 => f(&mut []),
            Self::Device(tensor) => {
                let mut floats = vec![0.0; tensor.elem_count()];
                f(&mut floats)?;
                *tensor = Tensor::from_vec(floats, tensor.shape(), tensor.device())?;
                Ok(())
            }
        }
    }

    /// The numbers, if they are on the host.
    pub fn on_host(&mut self) -> Result<&mut Floats> {
        match self {
            Self::Host(floats) => Ok(floats),
            Self::Device(_) => bail!("optimizer state on a device, of weights on the host"),
        }
    }

    /// The numbers, if they are on a device.
    pub fn on_device(&mut self) -> Result<&mut Tensor> {
        match self {
            Self::Device(tensor) => Ok(tensor),
            Self::Host(_) => bail!("optimizer state on the host, of weights on a device"),
        }
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
    fn every_store_holds_what_memory_holds_and_a_disk_keeps_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Store::Disk(folder.path().join("offload"));
        for store in [Store::Memory, disk.clone(), Store::Device(Device::Cpu)] {
            let mut buffer = store.copy(&[1.0, -2.0, 3.5]).unwrap();
            assert_eq!(*buffer.values().unwrap(), [1.0, -2.0, 3.5]);
            buffer.set(&[1.0, 7.0, 3.5]).unwrap();
            assert_eq!(*buffer.values().unwrap(), [1.0, 7.0, 3.5]);
            assert_eq!(*store.zeros(5000).unwrap().values().unwrap(), [0.0; 5000]);
            assert!(store.copy(&[]).unwrap().values().unwrap().is_empty());
            assert_eq!(buffer.on_device().is_ok(), matches!(store, Store::Device(_)));
            assert_ne!(buffer.on_host().is_ok(), matches!(store, Store::Device(_)));
        }
        assert_eq!(fs::read_dir(folder.path().join("offload")).unwrap().count(), 0);
        let error = disk.zeros(1 << 52).err().unwrap();
        assert!(format!("{error:#}").contains("cannot lay"), "{error:#}");
    }
}
