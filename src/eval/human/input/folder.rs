//! The images of a folder, found by name or number.

use crate::{
    data::IMAGE_EXTENSIONS,
    error::{Context, Hint, Result, ensure, failed},
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Maximum number of images of a folder; the training images of COCO are 82,783.
const MAX_FILES: usize = 1_000_000;

/// The images directly in a folder.
pub struct Folder {
    path: PathBuf,
    /// By file name, by name without extension, and by the number at its end.
    names: BTreeMap<String, Vec<PathBuf>>,
    pub count: usize,
}

impl Folder {
    /// Lists the images of a folder.
    ///
    /// # Errors
    /// The folder cannot be read or has no images.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let mut folder = Self { path: path.to_owned(), names: BTreeMap::new(), count: 0 };
        for entry in fs::read_dir(path).hint(format_args!("cannot read {name}"), "name a folder of images")? {
            let file = entry.with_context(|| format!("cannot read {name}"))?.path();
            let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
            let (Some(whole), Some(stem)) = (text(file.file_name()), text(file.file_stem())) else { continue };
            if whole.starts_with('.') || !IMAGE_EXTENSIONS.contains(&extension.as_str()) {
                continue;
            }
            folder.count += 1;
            ensure!(folder.count <= MAX_FILES, "{name} has more than {MAX_FILES} images");
            let mut keys = vec![whole, number(&stem).unwrap_or_else(|| stem.clone()), stem];
            keys.dedup();
            keys.into_iter().for_each(|key| folder.names.entry(key).or_default().push(file.clone()));
        }
        ensure!(folder.count > 0, failed(format_args!("{name} has no images"), "name a folder of images"));
        Ok(folder)
    }

    /// The image with this name, name without extension, or number at the end of the name (`moon-0012.png` is 12).
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn find(&self, key: &str) -> Result<&Path> {
        let found = self.names.get(key).map_or(&[][..], Vec::as_slice);
        let folder = self.path.display();
        match found {
            [file] => Ok(file),
            [] => {
                let hint = "an image belongs to the prompt or caption with its name, or with the number at the end of its name";
                Err(failed(format_args!("{folder} has no image `{key}`"), hint))
            }
            [one, two, ..] => {
                let message = format!("{} and {} could both be image `{key}`", one.display(), two.display());
                Err(failed(message, "remove one of them from the folder"))
            }
        }
    }
}

fn text(name: Option<&std::ffi::OsStr>) -> Option<String> {
    name.and_then(|name| name.to_str()).map(str::to_owned)
}

/// The number at the end of a name, without leading zeros.
fn number(stem: &str) -> Option<String> {
    let digits = stem.len() - stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    stem.get(stem.len() - digits..)?.parse::<u64>().ok().map(|number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_by_name_stem_and_number() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "moon-1.png",
            "moon-02.jpg",
            "COCO_val2014_000000000042.jpg",
            "b.PNG",
            "7.webp",
            "a.txt",
            ".8.png",
            "b.gif",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let opened = Folder::open(folder.path()).unwrap();
        assert_eq!(opened.count, 6);
        let name = |key: &str| opened.find(key).map(|file| file.file_name().unwrap().to_str().unwrap().to_owned());
        for (key, file) in [
            ("1", "moon-1.png"),
            ("2", "moon-02.jpg"),
            ("moon-02", "moon-02.jpg"),
            ("42", "COCO_val2014_000000000042.jpg"),
            ("7", "7.webp"),
            ("b.PNG", "b.PNG"),
        ] {
            assert_eq!(name(key).unwrap(), file, "{key}");
        }
        assert!(name("8").unwrap_err().to_string().ends_with("has no image `8`"));
        assert!(name("../a").is_err() && name("a.txt").is_err() && name("").is_err());
        assert!(name("b").unwrap_err().to_string().contains("could both be image `b`"));
        fs::write(folder.path().join("sun-1.png"), "").unwrap();
        assert!(Folder::open(folder.path()).unwrap().find("1").is_err());
        assert!(Folder::open(&folder.path().join("none")).is_err());
    }
}
