//! Sample images of a run over its steps, as data URIs.

use crate::bounded_read;
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{fs, path::Path};

/// Maximum size of an image in bytes.
const LARGEST: u64 = 4 << 20;
/// Maximum number of files that are looked at.
const FILES: usize = 1_000_000;
/// How a PNG file begins.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// A sample image.
pub struct Sample {
    pub step: u64,
    /// Its file as `data:image/png;base64,…`.
    pub uri: String,
    /// Its width in pixels.
    pub width: u32,
}

/// The sample images that are shown.
#[derive(Default)]
pub struct Samples {
    pub shown: Vec<Sample>,
    /// Number of sample images of the run.
    pub total: usize,
    /// What is not shown and why, each a sentence without its end.
    pub problems: Vec<String>,
}

/// Reads `count` of the images `step-N.png` of a folder, evenly spaced with the first and the last, of at most `bytes`
/// together. A missing folder has none.
pub fn read(folder: &Path, count: usize, mut bytes: u64) -> Samples {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(FILES);
    let mut steps: Vec<(u64, String)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let step = name.strip_prefix("step-")?.strip_suffix(".png")?.parse().ok()?;
            Some((step, name))
        })
        .collect();
    steps.sort();
    let mut samples = Samples { total: steps.len(), ..Samples::default() };
    let count = count.min(steps.len());
    for (step, name) in (0..count).filter_map(|i| steps.get(chosen(i, count, steps.len()))) {
        match embed(&folder.join(name), bytes.min(LARGEST)) {
            Ok((uri, width, size)) => {
                bytes -= size;
                samples.shown.push(Sample { step: *step, uri, width });
            }
            Err(problem) => samples.problems.push(format!("{name} is not shown: {problem}")),
        }
    }
    samples
}

/// The `i`-th of `count` evenly spaced numbers from 0 to `total` - 1; one alone is the last.
fn chosen(i: usize, count: usize, total: usize) -> usize {
    if count == 1 { total - 1 } else { i * (total - 1) / (count - 1) }
}

/// The data URI of a PNG file of at most `limit` bytes, its width and its size.
fn embed(path: &Path, limit: u64) -> Result<(String, u32, u64), String> {
    let content = bounded_read::read(path, limit).map_err(|error| format!("{error:#}"))?;
    // Signature, length and name of the header chunk, then the width.
    let width = content.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    match width.filter(|_| content.starts_with(PNG)) {
        Some(width) => {
            let uri = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(&content));
            Ok((uri, width, content.len() as u64))
        }
        None => Err("it is not a PNG file".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_evenly_chosen_and_bounded_in_number_and_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let image = image::RgbImage::from_fn(24, 8, |x, y| image::Rgb([x as u8, y as u8, 9]));
        for step in (10..=110).step_by(10) {
            image.save(folder.path().join(format!("step-{step:07}.png"))).unwrap();
        }
        let steps = |samples: &Samples| samples.shown.iter().map(|sample| sample.step).collect::<Vec<_>>();
        let samples = read(folder.path(), 3, 1 << 20);
        assert_eq!((steps(&samples), samples.total, samples.problems.len()), (vec![10, 60, 110], 11, 0));
        let content = fs::read(folder.path().join("step-0000060.png")).unwrap();
        let encoded = samples.shown[1].uri.strip_prefix("data:image/png;base64,").unwrap();
        assert_eq!((BASE64_STANDARD.decode(encoded).unwrap(), samples.shown[1].width), (content.clone(), 24));
        assert_eq!(steps(&read(folder.path(), 1, 1 << 20)), [110]);
        assert_eq!(steps(&read(folder.path(), 99, 1 << 20)).len(), 11);
        assert!(read(folder.path(), 0, 1 << 20).shown.is_empty());
        let samples = read(folder.path(), 11, 2 * content.len() as u64);
        assert_eq!((samples.shown.len(), samples.problems.len()), (2, 9), "{:?}", samples.problems);
        assert_eq!(read(&folder.path().join("none"), 3, 100).total, 0);
    }

    #[test]
    fn files_that_are_not_images_are_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("step-1.png"), "<script>").unwrap();
        fs::write(folder.path().join("step-x.png"), "not a step").unwrap();
        let samples = read(folder.path(), 3, 1000);
        assert_eq!((samples.total, samples.shown.len()), (1, 0));
        assert_eq!(samples.problems, ["step-1.png is not shown: it is not a PNG file"]);
    }
}
