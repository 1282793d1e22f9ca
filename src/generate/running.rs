//! Images that are generated together although they begin at different times: each joins the running batch, and leaves it
//! when it is complete or no longer wanted.

use super::{Models, Request, Sampling, sampling::guide, text_to_image::next_code};
use crate::{
    error::{Context, Result, ensure},
    model::Running,
};
use image::{RgbImage, imageops};
use rayon::prelude::*;

/// An image that is being generated: the first candidate of its request.
pub struct RunningImage {
    /// The number that it joined with.
    pub id: u64,
    request: Request,
    sampling: Sampling,
    /// Tokens of the prompt.
    prompt: Vec<u32>,
    /// The codes so far, in raster order.
    codes: Vec<u32>,
}

impl RunningImage {
    /// The codes so far, in raster order.
    pub fn codes(&self) -> &[u32] {
        &self.codes
    }

    /// Number of tokens of the prompt, `[CLS]` and `[SEP]` included.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    fn rows(&self) -> usize {
        rows(&self.sampling)
    }

    /// Logits `(rows, vocabulary)` → one more of the image's `count` codes.
    fn advance(&mut self, logits: &mut [f32], vocabulary: usize, count: usize) -> Result<()> {
        let position = self.codes.len();
        let sampling = self.sampling.at(position, count);
        let (conditional, unconditional) = logits.split_at_mut(vocabulary);
        if !unconditional.is_empty() {
            guide(conditional, unconditional, sampling.guidance);
        }
        let drawn = next_code(conditional, &sampling, self.request.seed, (0, position as u64))?;
        self.codes.push(self.request.given.get(position).copied().unwrap_or(drawn));
        Ok(())
    }
}

/// Number of sequences that an image needs.
fn rows(sampling: &Sampling) -> usize {
    if sampling.is_guided() { 2 } else { 1 }
}

/// The images that are being generated. Each is the one that [`Models::generate_images`] makes of its request, bit for bit
/// on the CPU, together with any others.
pub struct RunningImages<'m> {
    models: &'m Models,
    running: Running<'m>,
    images: Vec<RunningImage>,
}

impl<'m> RunningImages<'m> {
    /// No images yet.
    ///
    /// # Errors
    /// The weights cannot be packed.
    pub fn new(models: &'m Models) -> Result<Self> {
        Ok(Self { models, running: models.decoder.running()?, images: Vec::new() })
    }

    /// Number of sequences: one for each image, two with guidance.
    pub fn sequences(&self) -> usize {
        self.running.sequences()
    }

    /// The images, in the order in which they joined.
    pub fn images(&self) -> &[RunningImage] {
        &self.images
    }

    /// Begins an image. `id` is any number that no other image has.
    ///
    /// # Errors
    /// The text cannot be encoded; the other images go on.
    pub fn join(&mut self, id: u64, request: Request, sampling: Sampling) -> Result<()> {
        let encode = |text: &str| self.models.text.encode(text, self.models.generator.max_text());
        let (prompt, before) = (encode(&request.prompt)?, self.running.sequences());
        self.running.join(&prompt)?;
        if rows(&sampling) > 1 {
            // The branch that classifier-free guidance leads away from.
            if let Err(error) = encode(&request.negative).and_then(|negative| self.running.join(&negative)) {
                self.running.keep(&(0..before).collect::<Vec<_>>())?;
                return Err(error);
            }
        }
        self.images.push(RunningImage { id, request, sampling, prompt, codes: Vec::new() });
        Ok(())
    }

    /// One more code for each image.
    ///
    /// # Errors
    /// There is no image, or a logit is not finite: the weights are damaged.
    pub fn step(&mut self) -> Result<()> {
        let last = |image: &RunningImage| vec![image.codes.last().copied().unwrap_or(0); image.rows()];
        let tokens: Vec<u32> = self.images.iter().flat_map(last).collect();
        let mut logits = self.running.step(&tokens)?;
        let (vocabulary, count) = (logits.len() / tokens.len(), self.models.generator.grid().len());
        ensure!(vocabulary > 0, "the model has an empty vocabulary");
        let mut of_image = Vec::with_capacity(self.images.len());
        for image in &self.images {
            let (own, rest) = logits.split_at_mut(image.rows() * vocabulary);
            of_image.push(own);
            logits = rest;
        }
        let advance = |(image, logits): (&mut RunningImage, &mut [f32])| image.advance(logits, vocabulary, count);
        self.images.par_iter_mut().zip(of_image).try_for_each(advance)
    }

    /// Keeps the images for which `wanted` is true, and returns those that are complete; they leave the batch too.
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn leave(&mut self, wanted: impl Fn(&RunningImage) -> bool) -> Result<Vec<RunningImage>> {
        let count = self.models.generator.grid().len();
        let (mut kept, mut first, mut complete) = (Vec::new(), 0, Vec::new());
        for image in std::mem::take(&mut self.images) {
            let rows = first..first + image.rows();
            first = rows.end;
            match wanted(&image) {
                true if image.codes.len() < count => {
                    kept.extend(rows);
                    self.images.push(image);
                }
                true => complete.push(image),
                false => {}
            }
        }
        if kept.len() < first {
            self.running.keep(&kept)?;
        }
        Ok(complete)
    }
}

impl Models {
    /// The pixels of an image. Where codes are missing, those of the last complete row are repeated: what is above it looks
    /// almost as in the complete image.
    ///
    /// # Errors
    /// No row is complete, or the weights are damaged.
    pub fn pixels(&self, image: &RunningImage) -> Result<RgbImage> {
        let (grid, mut codes) = (self.generator.grid(), image.codes.clone());
        let rows = codes.len() / grid.width;
        let first = rows.checked_sub(1).context("no row of the image is complete")? * grid.width;
        codes.truncate(rows * grid.width);
        let last = codes[first..].to_vec();
        codes.extend(last.into_iter().cycle().take(grid.len() - codes.len()));
        self.images(&[&image.prompt], &[codes])?.pop().context("the decoder returned no image")
    }

    /// The upper part of an image, as far as its rows of codes are complete.
    ///
    /// # Errors
    /// As [`Self::pixels`].
    pub fn upper_part(&self, image: &RunningImage) -> Result<RgbImage> {
        let (grid, whole) = (self.generator.grid(), self.pixels(image)?);
        let height = whole.height() * (image.codes.len() / grid.width) as u32 / grid.height as u32;
        Ok(imageops::crop_imm(&whole, 0, 0, whole.width(), height).to_image())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Schedule,
        generate::{BestOf, tests::tiny},
    };

    /// With and without guidance, sampled in different ways, begun at different steps, among images that are given up.
    #[test]
    fn an_image_is_the_same_in_any_company() {
        let models = tiny();
        let sampling = |i: usize| Sampling {
            temperature: [1.0, 0.7, 0.0][i % 3],
            top_k: [0, 5][i % 2],
            top_p: [1.0, 0.9][i % 2],
            guidance: [1.0, 3.0][i / 2 % 2],
            guidance_schedule: [Schedule::Constant, Schedule::Linear][i / 4 % 2],
            temperature_schedule: [Schedule::Cosine, Schedule::Constant][i / 3 % 2],
            temperature_start: 1.5,
            ..Sampling::GREEDY
        };
        let count = models.generator.grid().len();
        let request = |i: usize| Request {
            negative: ["", "星"][i % 2].to_owned(),
            given: if i == 5 { vec![3, 1] } else { Vec::new() },
            ..Request::new(["一弯月", "月", "星，一弯月星月"][i % 3], i as u64 / 2)
        };
        let mut running = RunningImages::new(&models).unwrap();
        let mut found = vec![None; 9];
        for step in 0..9 * 2 + count {
            if step % 2 == 0 && step < 18 {
                running.join(step as u64 / 2, request(step / 2), sampling(step / 2)).unwrap();
            }
            running.step().unwrap();
            for image in running.images().iter().filter(|image| image.codes().len() % 4 == 0 && image.id == 1) {
                let part = models.upper_part(image).unwrap();
                assert_eq!(part.width(), models.image_tokenizer.image_size() as u32);
            }
            // The third image is given up.
            for image in running.leave(|image| image.id != 2 || image.codes().len() < 3).unwrap() {
                found[image.id as usize] = Some((image.codes().to_vec(), models.pixels(&image).unwrap()));
            }
            if running.images().is_empty() {
                break;
            }
        }
        assert_eq!((running.images().len(), running.sequences()), (0, 0));
        for (i, found) in found.into_iter().enumerate() {
            let Some((codes, pixels)) = found else {
                assert_eq!(i, 2);
                continue;
            };
            let alone = models.generate_images(&[request(i)], &sampling(i), &BestOf::ONE, |_| {}).unwrap().remove(0);
            assert_eq!((codes, pixels), (alone.codes, alone.image), "image {i}");
        }
    }
}
