//! Keys of the images in folders. Their codes are stored under these keys in a shard.

use std::{collections::HashSet, path::Path};

/// A key for each path below a source's folder: the path without its extension, with dots and control characters
/// replaced by `_`, because a key ends at the first dot of a file name. If two paths would get the same key, the later
/// one is extended by its extension, and by a number if that key is taken too (`x.jpg` and `x.png`: `x` and `x_png`).
pub fn keys<'a>(paths: impl Iterator<Item = &'a Path>) -> Vec<String> {
    let mut taken = HashSet::new();
    paths.map(|path| key(path, &mut taken)).collect()
}

fn key(path: &Path, taken: &mut HashSet<String>) -> String {
    let plain = |text: &str| text.replace(|c: char| c == '.' || c.is_control(), "_");
    let stem = plain(&path.with_extension("").to_string_lossy());
    let extension = plain(&path.extension().unwrap_or_default().to_string_lossy());
    let numbered = (2..).map(|number: u64| format!("{stem}_{extension}_{number}"));
    let mut candidates = [stem.clone(), format!("{stem}_{extension}")].into_iter().chain(numbered);
    let free = candidates.find(|key| !taken.contains(key)).unwrap_or_default();
    taken.insert(free.clone());
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_unique_and_have_no_dots() {
        let paths = ["photo.v1.0.png", "photo.v1.1.png", "sub/a/0.png", "sub/b/0.png", "x.jpg", "x.png", "x_png.png"];
        let expected = ["photo_v1_0", "photo_v1_1", "sub/a/0", "sub/b/0", "x", "x_png", "x_png_png"];
        assert_eq!(keys(paths.iter().map(Path::new)), expected);
        assert_eq!(keys(["x.png", "x.png", "x.png"].iter().map(Path::new)), ["x", "x_png", "x_png_2"]);
        assert_eq!(keys(["a\u{1b}[2J.png"].iter().map(Path::new)), ["a_[2J"]);
    }
}
