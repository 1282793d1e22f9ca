//! Statistics of features in `.npz` files, as pytorch-fid, clean-fid and DM-GAN save them: `mu` and `sigma`. Ours also name
//! their protocol, which other programs ignore.

use super::{frechet::Gaussian, protocol::Protocol};
use crate::{
    bounded_read,
    data::numpy,
    error::{Context, Hint, Result, bail, ensure, failed},
};
use flate2::read::DeflateDecoder;
use nalgebra::{DMatrix, DVector};
use std::{
    fs::File,
    io::{Cursor, Read, Write},
    path::Path,
};
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

/// Maximum size of an array in bytes; the covariance of 2048 features has 34 MB.
const MAX_ARRAY: u64 = 256 << 20;
const PROTOCOL: &str = "protocol";

/// Reads statistics. If the file names a protocol, it must be `protocol`.
///
/// # Errors
/// The file cannot be read, lacks an array, or is of another protocol.
pub fn read(path: &Path, protocol: Protocol) -> Result<Gaussian> {
    let name = path.display();
    let hint =
        "statistics are .npz files with `mu` and `sigma`, as pytorch-fid and `vilg eval fid --save-stats` write them";
    let bytes = bounded_read::read(path, 2 * MAX_ARRAY).hint(format_args!("cannot read {name}"), hint)?;
    let mut archive = ZipArchive::new(Cursor::new(bytes)).hint(format_args!("{name} is not a .npz file"), hint)?;
    let found = member(&mut archive, PROTOCOL)?.map(|bytes| text(&bytes)).transpose()?;
    let other = found.filter(|found| found != protocol.name());
    let hint_protocol = "choose that protocol with --protocol, or save statistics of the other one";
    let message =
        format!("{name} has statistics of the protocol {}, not {}", other.as_deref().unwrap_or("-"), protocol.name());
    ensure!(other.is_none(), failed(message, hint_protocol));
    let mut array = |array: &str| -> Result<_> {
        let bytes = member(&mut archive, array)?.with_context(|| format!("it has no `{array}`"))?;
        floats(&bytes).with_context(|| format!("`{array}` is not an array of floats"))
    };
    let both = array("mu").and_then(|mu| Ok((mu, array("sigma")?)));
    let ((shape, mean), (square, covariance)) = both.hint(format_args!("bad statistics in {name}"), hint)?;
    let dim = mean.len();
    let fits = shape == [dim] && square == [dim, dim] && dim > 0;
    ensure!(fits, failed(format_args!("`mu` and `sigma` in {name} have the shapes {shape:?} and {square:?}"), hint));
    let finite = mean.iter().chain(&covariance).all(|value| value.is_finite());
    ensure!(finite, failed(format_args!("statistics in {name} are not finite"), hint));
    Ok(Gaussian { mean: DVector::from_vec(mean), covariance: DMatrix::from_vec(dim, dim, covariance) })
}

/// Writes statistics to a new file.
///
/// # Errors
/// The file exists or cannot be written.
pub fn write(path: &Path, statistics: &Gaussian, protocol: Protocol) -> Result<()> {
    let hint = "choose another file";
    let file = File::create_new(path).hint(format_args!("cannot write {}", path.display()), hint)?;
    let dim = statistics.mean.len();
    let array = |shape: &[usize], values: &[f64]| {
        let mut bytes = numpy::header("<f8", shape);
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        bytes
    };
    let mut name = numpy::header(&format!("|S{}", protocol.name().len()), &[]);
    name.extend_from_slice(protocol.name().as_bytes());
    let mut writer = ZipWriter::new(std::io::BufWriter::new(file));
    let mut write = || -> Result<()> {
        // A covariance is symmetric, so that rows and columns need not be told apart.
        for (name, bytes) in [
            ("mu", array(&[dim], statistics.mean.as_slice())),
            ("sigma", array(&[dim, dim], statistics.covariance.as_slice())),
            (PROTOCOL, name.clone()),
        ] {
            let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            writer.start_file(format!("{name}.npy"), options)?;
            writer.write_all(&bytes)?;
        }
        Ok(())
    };
    let written = write().and_then(|()| Ok(writer.finish()?.flush()?));
    written.hint(format_args!("cannot write {}", path.display()), hint)
}

/// The content of the member `name.npy`, stored or deflated.
fn member(archive: &mut ZipArchive<Cursor<Vec<u8>>>, name: &str) -> Result<Option<Vec<u8>>> {
    let Some(index) = archive.index_for_name(&format!("{name}.npy")) else { return Ok(None) };
    let member = archive.by_index_raw(index)?;
    let (method, crc, size) = (member.compression(), member.crc32(), member.size());
    ensure!(size <= MAX_ARRAY, "`{name}` has {size} bytes");
    let mut bytes = Vec::new();
    match method {
        CompressionMethod::Stored => member.take(size).read_to_end(&mut bytes)?,
        CompressionMethod::DEFLATE => DeflateDecoder::new(member).take(size).read_to_end(&mut bytes)?,
        other => bail!("`{name}` is compressed with {other}"),
    };
    let mut sum = flate2::Crc::new();
    sum.update(&bytes);
    ensure!(bytes.len() as u64 == size && sum.sum() == crc, "`{name}` is damaged");
    Ok(Some(bytes))
}

fn text(bytes: &[u8]) -> Result<String> {
    let array = numpy::parse(bytes).context("`protocol` is not an array")?;
    Ok(String::from_utf8_lossy(array.data).trim_end_matches('\0').to_owned())
}

/// Shape and elements of an array of f32 or f64.
fn floats(bytes: &[u8]) -> Option<(Vec<usize>, Vec<f64>)> {
    let array = numpy::parse(bytes)?;
    let values: Vec<f64> = match array.descr.as_str() {
        "<f8" => array.data.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        "<f4" => array.data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes).into()).collect(),
        _ => return None,
    };
    let count = array.shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size))?;
    (count == values.len()).then_some((array.shape, values))
}

#[cfg(test)]
mod tests {
    use super::{super::frechet::Moments, *};
    use crate::{error::hint_of, nn::weights};
    use std::fs;

    fn of_golden() -> Result<Gaussian> {
        let golden = weights::parse(include_bytes!("../../../tests/golden/fid.safetensors"), "golden")?;
        Moments::of(&golden["features.c"])?.gaussian()
    }

    /// As `np.savez_compressed` writes it (scripts/golden_fid.py).
    #[test]
    fn pytorch_fid_s_statistics_are_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("golden.npz");
        fs::write(&path, include_bytes!("../../../tests/golden/fid_statistics.npz"))?;
        let (ours, theirs) = (of_golden()?, read(&path, Protocol::DmGan)?);
        assert!((&ours.mean - &theirs.mean).amax() < 1e-6 && (&ours.covariance - &theirs.covariance).amax() < 1e-6);
        Ok(())
    }

    #[test]
    fn statistics_are_written_once_and_know_their_protocol() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (path, statistics) = (folder.path().join("a.npz"), of_golden()?);
        write(&path, &statistics, Protocol::Clean)?;
        assert_eq!(read(&path, Protocol::Clean)?, statistics);
        let error = read(&path, Protocol::PytorchFid).unwrap_err();
        assert!(
            error.to_string().contains("the protocol clean, not pytorch-fid") && hint_of(&error).is_some(),
            "{error}"
        );
        assert!(write(&path, &statistics, Protocol::Clean).is_err(), "nothing is replaced");
        Ok(())
    }

    #[test]
    fn damaged_files_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.npz");
        let golden = include_bytes!("../../../tests/golden/fid_statistics.npz");
        for at in (0..golden.len()).step_by(97) {
            fs::write(&path, &golden[..at])?;
            assert!(read(&path, Protocol::Clean).is_err(), "cut at {at}");
            let mut bytes = golden.to_vec();
            bytes[at] ^= 0x55;
            fs::write(&path, bytes)?;
            // Some bytes do not matter, such as those of dates; no array may differ.
            if let Ok(found) = read(&path, Protocol::Clean) {
                assert!((&found.mean - of_golden()?.mean).amax() < 1e-6, "changed at {at}");
            }
        }
        Ok(())
    }
}
