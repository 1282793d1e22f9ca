//! Captions: COCO's results, or the lines of `vilg caption --json`.

use super::{Source, folder::Folder, json};
use crate::{
    error::{Result, ensure, failed, usage},
    eval::{
        caption_metrics::ImageId,
        human::draft::{Item, Output},
    },
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

const FORMAT: &str = r#"captions look like [{"image_id": 1, "caption": "一只猫"}] or, one on each line, {"image": "1.png", "caption": "一只猫"}"#;

#[derive(Deserialize)]
struct Caption {
    /// A file, as `vilg caption` writes it.
    image: Option<String>,
    /// An id, as in COCO's results.
    image_id: Option<ImageId>,
    caption: String,
}

impl Caption {
    fn key(&self) -> Option<String> {
        let id = self.image_id.as_ref().map(|id| match id {
            ImageId::Number(number) => number.to_string(),
            ImageId::Text(text) => text.clone(),
        });
        self.image.clone().or(id)
    }
}

/// The images of the first system's file with the captions of each system. With `folder`, an image is the file there with the
/// name or number of its id; without, ids are paths.
///
/// # Errors
/// A file cannot be read, an image is missing, or it does not have one caption of each system.
pub fn captions(systems: &[Source], folder: Option<&Path>) -> Result<Vec<Item>> {
    let folder = folder.map(Folder::open).transpose()?;
    let mut items: Vec<Item> = Vec::new();
    for (number, system) in systems.iter().enumerate() {
        let mut found = read(&system.path)?;
        if number == 0 {
            let item = |(key, _): &(String, String)| {
                Ok(Item {
                    image: Some(image(key, folder.as_ref())?),
                    key: key.clone(),
                    aspect: String::new(),
                    prompt: String::new(),
                    outputs: Vec::new(),
                })
            };
            items = found.iter().map(item).collect::<Result<_>>()?;
        }
        let mut captions = BTreeMap::new();
        for (key, caption) in found.drain(..) {
            let message = format!("{} has two captions of image `{key}`", system.path.display());
            ensure!(captions.insert(key, caption).is_none(), failed(message, "give one caption for each image"));
        }
        for item in &mut items {
            let Some(caption) = captions.remove(&item.key) else {
                let message = format!("{} has no caption of image `{}`", system.path.display(), item.key);
                return Err(failed(message, "all systems must caption the same images"));
            };
            item.outputs.push(Output::Text(caption));
        }
        if let Some(key) = captions.keys().next() {
            let message = format!(
                "{} has a caption of image `{key}`, and {} has none",
                system.path.display(),
                systems[0].path.display()
            );
            return Err(failed(message, "all systems must caption the same images"));
        }
    }
    Ok(items)
}

fn read(path: &Path) -> Result<Vec<(String, String)>> {
    let keyed = |caption: Caption| {
        let message = format!("{} has a caption without `image` or `image_id`", path.display());
        let Some(key) = caption.key() else { return Err(failed(message, FORMAT)) };
        Ok((key, caption.caption))
    };
    json::objects(path, FORMAT)?.into_iter().map(keyed).collect()
}

fn image(key: &str, folder: Option<&Folder>) -> Result<PathBuf> {
    match folder {
        Some(folder) => {
            let name = Path::new(key).file_name().and_then(|name| name.to_str()).unwrap_or(key);
            Ok(folder.find(name)?.to_owned())
        }
        None => {
            let path = PathBuf::from(key);
            let hint = "say where the images are with --image-folder DIR";
            ensure!(path.is_file(), usage(format_args!("there is no image {key}"), hint));
            Ok(path)
        }
    }
}
