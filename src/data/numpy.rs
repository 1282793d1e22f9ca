//! Numpy's `.npy` format: a header in Python's notation, then the elements.

/// An array in a `.npy` file.
#[derive(Debug, PartialEq, Eq)]
pub struct Array<'a> {
    /// Type of the elements, as `<f8` or `<u2`.
    pub descr: String,
    /// Whether the first index varies fastest.
    pub fortran_order: bool,
    pub shape: Vec<usize>,
    /// The elements; their number has not been compared with the shape.
    pub data: &'a [u8],
}

/// The header (version 1.0) of an array whose last index varies fastest; the elements follow it.
pub fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let sizes: String = shape.iter().map(|size| format!("{size}, ")).collect();
    // Python writes (2, 3) and (2,).
    let sizes = if shape.len() == 1 { sizes.trim_end() } else { sizes.trim_end_matches(", ") };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sizes}), }}");
    // The .npy format pads magic, length and header with a final newline to a multiple of 64 bytes.
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.push_str(&" ".repeat(padded - header.len() - 1));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&(padded as u16).to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    bytes
}

/// Parses a file of version 1 to 3; `None` if it is not one.
pub fn parse(bytes: &[u8]) -> Option<Array<'_>> {
    let (version, rest) = bytes.strip_prefix(b"\x93NUMPY")?.split_first_chunk::<2>()?;
    let (length, rest) = if version[0] == 1 {
        let (length, rest) = rest.split_first_chunk::<2>()?;
        (u16::from_le_bytes(*length) as usize, rest)
    } else {
        let (length, rest) = rest.split_first_chunk::<4>()?;
        (u32::from_le_bytes(*length) as usize, rest)
    };
    let (header, data) = rest.split_at_checked(length)?;
    let header: String = std::str::from_utf8(header).ok()?.split_whitespace().collect();
    let descr = header.split_once("'descr':'")?.1.split_once('\'')?.0.to_owned();
    let sizes = header.split_once("'shape':(")?.1.split_once(')')?.0;
    let shape = sizes.split(',').filter(|size| !size.is_empty()).map(|size| size.parse().ok());
    let fortran_order = header.contains("'fortran_order':True");
    Some(Array { descr, fortran_order, shape: shape.collect::<Option<_>>()?, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_numpy_s() {
        for (shape, text) in [(&[][..], "()"), (&[5], "(5,)"), (&[2, 3], "(2, 3)")] {
            let bytes = header("<f8", shape);
            let expected = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': {text}, }}");
            assert_eq!(bytes.len() % 64, 0);
            assert_eq!(std::str::from_utf8(&bytes[10..]).unwrap().trim_end(), expected);
            let array = Array { descr: "<f8".to_owned(), fortran_order: false, shape: shape.to_vec(), data: &[] };
            assert_eq!(parse(&bytes), Some(array));
            assert!((0..bytes.len()).all(|cut| parse(&bytes[..cut]).is_none()));
        }
    }
}
