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
    hash::Hash,
    path::{Component, Path, PathBuf},
};

/// Maximum length of a file name with its folders, in bytes. Longer text in the place of a name is something else.
const MAX_NAME: usize = 1024;

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
    /// The name is too long or absolute, leaves the folder or has control characters.
    pub fn file(&self, name: &str) -> Result<Image, Bad> {
        if name.len() > MAX_NAME {
            let (bytes, start) = (name.len(), name.chars().take(40).collect::<String>());
            let place = format_args!("a name of {bytes} bytes, `{start}…` (base64 text needs --base64)");
            return Err(Bad::new(Cause::NoImage, place));
        }
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
            let stem = below.file_stem().and_then(|stem| stem.to_str());
            let base = below.file_name().and_then(|base| base.to_str());
            let (Some(name), Some(base), Some(stem)) = (below.to_str(), base, stem) else { continue };
            // COCO_val2014_000000550529 and 000000550529 are the image 550529.
            if let Some(number) = stem.rsplit('_').next().and_then(|digits| digits.parse().ok()) {
                add(&mut by_id.numbers, number, name);
            }
            add(&mut by_id.names, stem.to_owned(), name);
            add(&mut by_id.names, base.to_owned(), name);
        }
        Ok(by_id)
    }
}

/// The files that have one id.
#[derive(Debug)]
enum Named {
    One(String),
    /// The first two of several.
    Several(String, String),
}

fn add<K: Eq + Hash>(files: &mut HashMap<K, Named>, id: K, name: &str) {
    let named = files.entry(id).or_insert_with(|| Named::One(name.to_owned()));
    if let Named::One(first) = named
        && first != name
    {
        *named = Named::Several(std::mem::take(first), name.to_owned());
    }
}

/// The images of a folder by their ids.
#[derive(Debug)]
pub struct ById {
    images: Images,
    /// By file name, with and without extension.
    names: HashMap<String, Named>,
    numbers: HashMap<u64, Named>,
}

impl ById {
    /// The image with this id: its file name with or without extension, or its COCO number.
    ///
    /// # Errors
    /// There is no such image, or several files have this id.
    pub fn find(&self, id: &str) -> Result<Image, Bad> {
        let extension = id.rsplit_once('.').filter(|(_, end)| IMAGE_EXTENSIONS.contains(&&*end.to_ascii_lowercase()));
        let stem = extension.map_or(id, |(stem, _)| stem);
        let number = || id.parse().ok().and_then(|number: u64| self.numbers.get(&number));
        let named = self.names.get(id).or_else(|| self.names.get(stem)).or_else(number);
        match named.ok_or_else(|| Bad::new(Cause::NoImage, id))? {
            Named::One(name) => self.images.file(name),
            Named::Several(first, second) => {
                Err(Bad::new(Cause::Duplicate, format_args!("{id} is both {first} and {second}")))
            }
        }
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

    #[test]
    fn an_id_of_several_files_is_none_and_a_whole_name_is_one() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.jpg", "a.png", "x_7.jpg", "y_7.jpg", "sub/b.jpg", "thumbs/b.jpg"] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let images = Images::open(dir.path()).unwrap().by_id().unwrap();
        let file = |id: &str| match images.find(id) {
            Ok(Image::File { name, .. }) => Ok(name),
            other => Err(other.unwrap_err()),
        };
        assert_eq!((file("a.png").unwrap(), file("a.jpg").unwrap()), ("a.png".into(), "a.jpg".into()));
        assert_eq!((file("x_7").unwrap(), file("y_7.jpg").unwrap()), ("x_7.jpg".into(), "y_7.jpg".into()));
        for (id, place) in [
            ("a", "a is both a.jpg and a.png"),
            ("7", "7 is both x_7.jpg and y_7.jpg"),
            ("b.jpg", "b.jpg is both sub/b.jpg and thumbs/b.jpg"),
        ] {
            let bad = file(id).unwrap_err();
            assert_eq!((bad.cause, bad.place.as_str()), (Cause::Duplicate, place));
        }
    }
}
