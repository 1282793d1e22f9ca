//! Generated images with their prompts.

use super::{
    Source,
    folder::Folder,
    prompts::{self, Prompt},
};
use crate::{
    error::{Result, ensure, failed},
    eval::human::draft::{Item, Output},
};
use std::path::Path;

/// The prompts of a file with the images of each system. The image of a prompt has the prompt's id as its name or as the
/// number at the end of its name; without ids, the prompt's number in the file, as `vilg t2i --each` numbers images.
///
/// # Errors
/// A file or folder cannot be read, an image is missing or ambiguous, or prompts have no ids and a folder has another number
/// of images than there are prompts.
pub fn images(systems: &[Source], prompts: &Path) -> Result<Vec<Item>> {
    let (found, have_ids) = prompts::read(prompts)?;
    let folders = systems.iter().map(|system| Folder::open(&system.path)).collect::<Result<Vec<_>>>()?;
    for (system, folder) in systems.iter().zip(&folders) {
        let (images, count) = (folder.count, found.len());
        let message = format!("{images} images in {} for {count} prompts", system.path.display());
        let hint = "one image for each prompt; or say in a column `id` which image belongs to which prompt";
        ensure!(have_ids || images == count, failed(message, hint));
    }
    let item = |Prompt { id, aspect, prompt }: Prompt| {
        let image = |folder: &Folder| Ok(Output::Image(folder.find(&id)?.to_owned()));
        let outputs = folders.iter().map(image).collect::<Result<_>>()?;
        Ok(Item { key: id, aspect, prompt, image: None, outputs })
    };
    found.into_iter().map(item).collect()
}
