//! What the first pass finds out about a row. Features are stored beside the output, so that a run can be resumed and
//! ranks can share their work; the duplicate rules compare the features of all inputs.

use super::{image_hash::ImageHash, rule::Rule};
use crate::{
    bounded_read,
    data::{bad::BadCounts, output::write_whole},
    error::{Context, Result, ensure},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Seek, Write},
    path::Path,
};

/// Bytes of a stored feature.
const BYTES: usize = 40;
/// Maximum size of the header line in bytes.
const MAX_HEADER: u64 = 1 << 20;
/// The stored number of a row that no rule refuses.
const PASSES: u8 = u8::MAX;

/// One row: a sample of a shard or a row of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Feature {
    /// The first rule of the first pass that the row breaks.
    pub broken: Option<Rule>,
    /// Length of the caption in words or characters.
    pub length: u16,
    /// Hash of the caption without case, spaces and punctuation.
    pub caption: u64,
    pub image: Option<ImageHash>,
    /// Similarity of image and caption, if it was read or computed.
    pub similarity: Option<f64>,
}

/// The features of one input, in the order of its rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Features {
    pub rows: Vec<Feature>,
    /// Damaged rows by cause.
    pub bad: BadCounts,
}

/// The first line of a file of features.
#[derive(Serialize, Deserialize)]
struct Header {
    /// What the features were made from: the input's stamp and the settings.
    made_from: String,
    rows: u64,
    bad: BadCounts,
}

impl Features {
    /// Writes the features of an input whose stamp and settings are `made_from`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path, made_from: &str) -> Result<()> {
        let header = Header { made_from: made_from.to_owned(), rows: self.rows.len() as u64, bad: self.bad.clone() };
        write_whole(path, |file| {
            serde_json::to_writer(&mut *file, &header)?;
            file.write_all(b"\n")?;
            for row in &self.rows {
                file.write_all(&row.to_bytes())?;
            }
            Ok(true)
        })
        .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The number of rows and the damaged ones, of stored features; `None` if there are none that were made from
    /// `made_from`.
    pub fn stored(path: &Path, made_from: &str) -> Option<(u64, BadCounts)> {
        let (header, mut file) = open(path, made_from).ok()?;
        let start = file.stream_position().ok()?;
        let length = file.get_ref().metadata().ok()?.len();
        (length == start + header.rows * BYTES as u64).then_some((header.rows, header.bad))
    }

    /// Reads stored features one by one.
    ///
    /// # Errors
    /// There are none that were made from `made_from`, or they are damaged.
    pub fn for_each(path: &Path, made_from: &str, mut each: impl FnMut(&Feature)) -> Result<()> {
        let cannot = || format!("cannot read {}", path.display());
        let (header, mut file) = open(path, made_from).with_context(cannot)?;
        let mut bytes = [0; BYTES];
        for _ in 0..header.rows {
            file.read_exact(&mut bytes).with_context(cannot)?;
            each(&Feature::of_bytes(&bytes));
        }
        Ok(())
    }
}

fn open(path: &Path, made_from: &str) -> Result<(Header, BufReader<File>)> {
    let mut file = BufReader::new(bounded_read::open(path)?);
    let mut line = Vec::new();
    Read::by_ref(&mut file).take(MAX_HEADER).read_until(b'\n', &mut line)?;
    let header: Header = serde_json::from_slice(&line)?;
    ensure!(header.made_from == made_from, "features of another input or of other settings");
    Ok((header, file))
}

impl Feature {
    fn to_bytes(self) -> [u8; BYTES] {
        let image = self.image.unwrap_or_default();
        let number = |rule| Rule::ALL.iter().position(|other| *other == rule).map_or(PASSES, |number| number as u8);
        let head = [self.broken.map_or(PASSES, number), u8::from(self.image.is_some())];
        let mut bytes = [0; BYTES];
        let fields: [&[u8]; 7] = [
            &head,
            &self.length.to_le_bytes(),
            &image.colors.to_le_bytes(),
            &self.caption.to_le_bytes(),
            &image.bits.to_le_bytes(),
            &image.mirrored.to_le_bytes(),
            &self.similarity.unwrap_or(f64::NAN).to_le_bytes(),
        ];
        bytes.iter_mut().zip(fields.concat()).for_each(|(to, from)| *to = from);
        bytes
    }

    fn of_bytes(bytes: &[u8; BYTES]) -> Self {
        let [rule, has_image, l0, l1, c0, c1, c2, c3, rest @ ..] = bytes;
        let number = |at: usize| {
            let bytes = rest.iter().skip(8 * at).take(8).rev();
            bytes.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let colors = u32::from_le_bytes([*c0, *c1, *c2, *c3]);
        let image = ImageHash { bits: number(1), mirrored: number(2), colors };
        let similarity = f64::from_bits(number(3));
        Self {
            broken: Rule::of_number(*rule),
            length: u16::from_le_bytes([*l0, *l1]),
            caption: number(0),
            image: (*has_image == 1).then_some(image),
            similarity: (!similarity.is_nan()).then_some(similarity),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::bad::{Bad, Cause};

    #[test]
    fn features_are_read_as_they_were_written() {
        let image = ImageHash { bits: u64::MAX - 5, mirrored: 1 << 63, colors: 0x1234_5678 };
        let rows = vec![
            Feature { broken: Some(Rule::NoNoun), length: 300, caption: 7, image: None, similarity: Some(-0.25) },
            Feature { broken: None, length: 1, caption: u64::MAX, image: Some(image), similarity: None },
        ];
        let mut features = Features { rows, bad: BadCounts::default() };
        features.bad.add(Bad::new(Cause::BadJson, "row 3"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.features");
        features.write(&path, "made").unwrap();
        let mut read = Features { rows: Vec::new(), bad: Features::stored(&path, "made").unwrap().1 };
        Features::for_each(&path, "made", |row| read.rows.push(*row)).unwrap();
        assert_eq!(read, features);
        assert!(Features::stored(&path, "other").is_none());
        let length = std::fs::metadata(&path).unwrap().len();
        File::options().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
        assert!(Features::stored(&path, "made").is_none());
    }
}
