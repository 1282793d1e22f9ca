//! The folder of images that annotations refer to, by file name or by id.

use super::row::Image;
use crate::{
    data::{
        bad::{Bad, Cause},
        paths,
        record::IMAGE_EXTENSIONS,
    },
    error::{Hint, Result, ensure, usage},
};
use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

/// A folder of images.
#[derive(Debug, Clone)]
pub struct Images {
    folder: PathBuf,
}

impl Images {
    /// # Errors
    /// There is no such folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let message = format!("there is no folder {}", folder.display());
        ensure!(folder.is_dir(), usage(message, "name the folder of the images with --images"));
        Ok(Self { folder: folder.to_owned() })
    }

    /// The image file `name` below the folder.
    ///
    /// # Errors
    /// The name is absolute, leaves the folder or has control characters.
    pub fn file(&self, name: &str) -> Result<Image, Bad> {
        let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        let leaves = name.split(['/', '\\']).any(|part| part == "..");
        if name.is_empty() || !inside || leaves || name.chars().any(char::is_control) {
            return Err(Bad::new(Cause::UnsafeName, name.escape_debug()));
        }
        Ok(Image::File { path: self.folder.join(name), name: name.to_owned() })
    }

    /// Lists the images of the folder and its subfolders.
    ///
    /// # Errors
    /// The folder cannot be listed or has no images.
    pub fn by_id(&self) -> Result<ById> {
        let found = paths::find(&self.folder.to_string_lossy())
            .hint("cannot list the images", "name the folder of the images with --images")?;
        let mut by_id = ById { images: self.clone(), names: HashMap::new(), numbers: HashMap::new() };
        for (_, below) in found.images {
            let (Some(name), Some(stem)) = (below.to_str(), below.file_stem().and_then(|stem| stem.to_str())) else {
                continue;
            };
            // COCO_val2014_000000550529 and 000000550529 are the image 550529.
            if let Some(number) = stem.rsplit('_').next().and_then(|digits| digits.parse().ok()) {
                by_id.numbers.entry(number).or_insert_with(|| name.to_owned());
            }
            by_id.names.entry(stem.to_owned()).or_insert_with(|| name.to_owned());
        }
        Ok(by_id)
    }
}

/// The images of a folder by their ids. Where several files have one id, the first one by path counts.
#[derive(Debug)]
pub struct ById {
    images: Images,
    names: HashMap<String, String>,
    numbers: HashMap<u64, String>,
}

impl ById {
    /// The image with this id: its file name with or without extension, or its COCO number.
    ///
    /// # Errors
    /// There is no such image.
    pub fn find(&self, id: &str) -> Result<Image, Bad> {
        let extension = id.rsplit_once('.').filter(|(_, end)| IMAGE_EXTENSIONS.contains(&&*end.to_ascii_lowercase()));
        let stem = extension.map_or(id, |(stem, _)| stem);
        let number = || id.parse().ok().and_then(|number: u64| self.numbers.get(&number));
        let name = self.names.get(stem).or_else(number).ok_or_else(|| Bad::new(Cause::NoImage, id))?;
        self.images.file(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(dir.path()).unwrap();
        for name in ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "..\\x.jpg", "a\nb.jpg", ""] {
            assert_eq!(images.file(name).unwrap_err().cause, Cause::UnsafeName, "{name:?}");
        }
        assert!(images.file("val2014/a..b.jpg").is_ok() && images.file("./a.jpg").is_ok());
        assert!(Images::open(&dir.path().join("none")).is_err());
    }

    #[test]
    fn images_are_found_by_name_and_by_coco_number() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("val2014")).unwrap();
        for name in ["val2014/COCO_val2014_000000000042.jpg", "10_ab.png", "000000000007.jpg"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let images = Images::open(dir.path()).unwrap().by_id().unwrap();
        let found = |id: &str| match images.find(id) {
            Ok(Image::File { name, .. }) => name,
            _ => "none".into(),
        };
        assert_eq!(found("COCO_val2014_000000000042"), "val2014/COCO_val2014_000000000042.jpg");
        assert_eq!(found("42"), "val2014/COCO_val2014_000000000042.jpg");
        assert_eq!(
            (found("7"), found("10_ab.png"), found("8")),
            ("000000000007.jpg".into(), "10_ab.png".into(), "none".into())
        );
    }
}
