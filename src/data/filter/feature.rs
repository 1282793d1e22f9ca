//! What the first pass finds out about a row. Features are stored beside the output, so that a run can be resumed and
//! ranks can share their work; the duplicate rules compare the features of all inputs.

use super::{image_hash::ImageHash, rule::Rule};
use crate::{
    bounded_read,
    data::{
        bad::{Bad, BadCounts},
        output::write_whole,
    },
    error::{Context, Result, ensure},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
};

/// Bytes of a stored feature.
pub const BYTES: usize = 40;
/// Maximum size of the footer in bytes.
const MAX_FOOTER: u64 = 1 << 20;
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

/// A row of the first pass: its feature, or why it cannot be used.
pub type Scanned = Result<Feature, Bad>;

/// The last line of a file of features. It follows the rows, because it counts them, and its length follows it (8 bytes).
#[derive(Serialize, Deserialize)]
struct Footer {
    /// What the features were made from: the input's stamp and the settings.
    made_from: String,
    rows: u64,
    /// Damaged rows by cause.
    bad: BadCounts,
}

/// Writes the features of an input while its rows are scanned, so that they are never in memory together.
pub struct FeatureWriter<'a> {
    file: &'a mut BufWriter<File>,
    rows: u64,
    bad: BadCounts,
}

impl FeatureWriter<'_> {
    /// Adds rows. A damaged one breaks the rule [`Rule::Bad`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, rows: Vec<Scanned>) -> Result<()> {
        for row in rows {
            let feature = row.unwrap_or_else(|bad| {
                self.bad.add(bad);
                Feature { broken: Some(Rule::Bad), ..Feature::default() }
            });
            self.file.write_all(&feature.to_bytes()).context("cannot write features")?;
            self.rows += 1;
        }
        Ok(())
    }
}

/// Writes the features of an input whose stamp and settings are `made_from`. `scan` adds the rows and returns the damage of
/// the input itself.
///
/// # Errors
/// `scan` fails, or the file cannot be written.
pub fn write(
    path: &Path,
    made_from: &str,
    scan: impl FnOnce(&mut FeatureWriter<'_>) -> Result<BadCounts>,
) -> Result<()> {
    let mut scanned = Ok(());
    let written = write_whole(path, |file| {
        let mut writer = FeatureWriter { file, rows: 0, bad: BadCounts::default() };
        let mut bad = match scan(&mut writer) {
            Ok(bad) => bad,
            Err(error) => {
                scanned = Err(error);
                return Ok(false);
            }
        };
        let FeatureWriter { file, rows, bad: of_rows } = writer;
        bad.merge(of_rows);
        let footer = serde_json::to_vec(&Footer { made_from: made_from.to_owned(), rows, bad })?;
        file.write_all(&footer)?;
        file.write_all(&(footer.len() as u64).to_le_bytes())?;
        Ok(true)
    });
    scanned?;
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// The number of rows and the damaged ones, of stored features; `None` if there are none that were made from `made_from`.
pub fn stored(path: &Path, made_from: &str) -> Option<(u64, BadCounts)> {
    open(path, made_from).ok().map(|(footer, _)| (footer.rows, footer.bad))
}

/// Reads stored features one by one.
///
/// # Errors
/// There are none that were made from `made_from`, or they are damaged.
pub fn for_each(path: &Path, made_from: &str, mut each: impl FnMut(&Feature)) -> Result<()> {
    let cannot = || format!("cannot read {}", path.display());
    let (footer, file) = open(path, made_from).with_context(cannot)?;
    let mut file = BufReader::new(file);
    let mut bytes = [0; BYTES];
    for _ in 0..footer.rows {
        file.read_exact(&mut bytes).with_context(cannot)?;
        each(&Feature::of_bytes(&bytes));
    }
    Ok(())
}

/// Opens complete features at their first row.
fn open(path: &Path, made_from: &str) -> Result<(Footer, File)> {
    let mut file = bounded_read::open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = [0; 8];
    file.seek(SeekFrom::Start(length.checked_sub(8).context("the file is too short")?))?;
    file.read_exact(&mut bytes)?;
    let size = u64::from_le_bytes(bytes);
    let start = (length - 8).checked_sub(size).filter(|_| size <= MAX_FOOTER).context("its end is missing")?;
    file.seek(SeekFrom::Start(start))?;
    let mut text = Vec::new();
    Read::by_ref(&mut file).take(size).read_to_end(&mut text)?;
    let footer: Footer = serde_json::from_slice(&text)?;
    ensure!(footer.made_from == made_from, "features of another input or of other settings");
    ensure!(footer.rows.checked_mul(BYTES as u64) == Some(start), "it has another number of rows than its end says");
    file.rewind()?;
    Ok((footer, file))
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
        let rows = [
            Feature { broken: Some(Rule::NoNoun), length: 300, caption: 7, image: None, similarity: Some(-0.25) },
            Feature { broken: None, length: 1, caption: u64::MAX, image: Some(image), similarity: None },
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.features");
        let bad = |place: &str| Bad::new(Cause::BadJson, place);
        write(&path, "made", |writer| {
            writer.add(vec![Ok(rows[0]), Err(bad("row 2"))])?;
            writer.add(vec![Ok(rows[1])])?;
            let mut own = BadCounts::default();
            own.add(bad("the file"));
            Ok(own)
        })
        .unwrap();
        let mut read = Vec::new();
        for_each(&path, "made", |row| read.push(*row)).unwrap();
        let damaged = Feature { broken: Some(Rule::Bad), ..Feature::default() };
        assert_eq!(read, [rows[0], damaged, rows[1]]);
        let (count, found) = stored(&path, "made").unwrap();
        assert_eq!((count, found.to_string().as_str()), (3, "2 bad-json (the file, row 2)"));
        assert!(stored(&path, "other").is_none());
        // Lost bytes at the end and in the middle.
        let whole = std::fs::read(&path).unwrap();
        for rest in [&whole[..whole.len() - 1], &whole[BYTES..], &whole[..4], b""] {
            std::fs::write(&path, rest).unwrap();
            assert!(
                stored(&path, "made").is_none() && for_each(&path, "made", |_| {}).is_err(),
                "{} bytes",
                rest.len()
            );
        }
    }

    #[test]
    fn features_of_a_scan_that_fails_are_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.features");
        let error = write(&path, "made", |writer| {
            writer.add(vec![Ok(Feature::default())])?;
            Err(crate::error::failed("the table is cut", "copy it again"))
        });
        assert_eq!(error.unwrap_err().to_string(), "the table is cut");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
