//! The sample images of a generator's run.

use crate::{
    bundle::Bundle,
    config::Config,
    data::image_file::{grid, write_png},
    error::Result,
    generate::{BestOf, Models, Request},
    model::Generator,
    ops::packed::Format,
    text::WordPiece,
};
use std::path::Path;

/// Writes a grid with one image for each prompt of `sample.prompts`; nothing if there are none.
///
/// # Errors
/// The image tokenizer cannot be loaded, the weights are damaged, or the file cannot be written.
pub fn write(
    path: &Path,
    generator: Generator,
    image_tokenizer: &Bundle,
    text: &WordPiece,
    config: &Config,
) -> Result<()> {
    let models = Models::new(generator, Format::F32, image_tokenizer.image_tokenizer()?, text.clone());
    let request = |prompt: &String| Request::new(prompt.as_str(), config.seed);
    let requests: Vec<Request> = config.sample.prompts.iter().map(request).collect();
    if requests.is_empty() {
        return Ok(());
    }
    let generated = models.generate_images(&requests, &(&config.sample).into(), &BestOf::ONE, |_| {})?;
    let images: Vec<_> = generated.into_iter().map(|generated| generated.image).collect();
    write_png(path, &grid(&images, 0))
}
