//! Image codes in shards: `KEY.npy` (`u16`, grid height × grid width) next to `KEY.txt` and `KEY.json`. A `codes.json`
//! in the folder identifies the tokenizer.

use super::{
    bad::{Bad, Cause},
    numpy,
};
use crate::{
    bounded_read,
    error::{Hint, Result, ensure, failed},
};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Name of the file that describes a folder of code shards.
pub const CODES_FILE: &str = "codes.json";

/// Content of `codes.json`: the tokenizer and grid of a folder of code shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodesInfo {
    /// blake3 digest of the image tokenizer's configuration and weights.
    pub tokenizer: String,
    /// Grid height and width.
    pub grid: [usize; 2],
    /// Codebook size.
    pub codebook_size: usize,
}

impl CodesInfo {
    /// Reads `codes.json` in `folder`.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_file(&folder.join(CODES_FILE))
    }

    /// Reads a `codes.json` that may have another name.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn read_file(path: &Path) -> Result<Self> {
        let hint = "code shards come from `vilg data encode --model DIR SOURCE -o FOLDER`";
        let bytes =
            bounded_read::read(path, bounded_read::TEXT).hint(format_args!("cannot read {}", path.display()), hint)?;
        let info: Self = serde_json::from_slice(&bytes).hint(format_args!("bad {}", path.display()), hint)?;
        let sane =
            info.grid.iter().all(|side| (1..=4096).contains(side)) && (1..=1 << 16).contains(&info.codebook_size);
        ensure!(sane, failed(format_args!("bad sizes in {}", path.display()), hint));
        Ok(info)
    }

    /// Parses the codes of a `.npy` member, in raster order.
    pub(super) fn parse(&self, file: &[u8]) -> Result<Vec<u16>, Bad> {
        let (shape, codes) = parse_npy(file).ok_or_else(|| Bad::new(Cause::BadCodes, "no npy array of u16"))?;
        if shape != self.grid {
            let [h, w] = self.grid;
            return Err(Bad::new(Cause::BadCodes, format_args!("a grid of {shape:?}, not {h}x{w}")));
        }
        match codes.iter().find(|code| usize::from(**code) >= self.codebook_size) {
            Some(code) => Err(Bad::new(Cause::BadCodes, format_args!("code {code} of {}", self.codebook_size))),
            None => Ok(codes),
        }
    }
}

/// Writes codes `(height, width)` as a `.npy` file.
pub fn npy(grid: [usize; 2], codes: &[u16]) -> Vec<u8> {
    let mut bytes = numpy::header("<u2", &grid);
    bytes.extend(codes.iter().flat_map(|code| code.to_le_bytes()));
    bytes
}

fn parse_npy(bytes: &[u8]) -> Option<([usize; 2], Vec<u16>)> {
    let numpy::Array { descr, fortran_order, shape, data } = numpy::parse(bytes)?;
    let [h, w] = shape[..] else { return None };
    let right = descr == "<u2" && !fortran_order;
    let fits = right && data.len().checked_div(2)? == h.checked_mul(w)? && data.len() % 2 == 0;
    let codes = data.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    fits.then(|| ([h, w], codes.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn npy_round_trip_and_refusals() {
        let codes: Vec<u16> = (0..6).collect();
        let info = CodesInfo { tokenizer: String::new(), grid: [2, 3], codebook_size: 6 };
        let bytes = npy([2, 3], &codes);
        assert_eq!(bytes.len() % 64, 12);
        assert_eq!(info.parse(&bytes).unwrap(), codes);
        assert!(CodesInfo { grid: [3, 2], ..info.clone() }.parse(&bytes).is_err());
        assert!(CodesInfo { codebook_size: 5, ..info.clone() }.parse(&bytes).is_err());
        assert!((0..bytes.len()).all(|cut| info.parse(&bytes[..cut]).is_err()));
    }
}
