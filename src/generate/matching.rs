//! How well images match texts, by a matcher. The paper filters its data (§3.2.1) and ranks generated images with one.

use crate::{
    bundle::Bundle,
    data::{image::to_pixels, resize_bicubic},
    error::{Context, Result, ensure, failed},
    model::{
        Matcher, Tokens,
        matcher::{Input, unnormalized},
    },
    ops, runtime,
    text::WordPiece,
};
use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;

/// Images in one forward pass.
const IMAGES: usize = 32;
/// Texts in one forward pass.
const TEXTS: usize = 64;

/// A loaded matcher with its text tokenizer.
pub struct Matching {
    matcher: Matcher,
    text: WordPiece,
    max_tokens: usize,
    image_size: u32,
    embedding: usize,
    calibration: Option<[f64; 2]>,
}

impl Matching {
    /// Loads the matcher of a model folder.
    ///
    /// # Errors
    /// The folder holds another kind of model, or a part is missing, damaged or does not match the others.
    pub fn open(bundle: &Bundle) -> Result<Self> {
        let matcher = bundle.matcher()?;
        let config = &bundle.config;
        Ok(Self {
            matcher,
            text: bundle.text()?,
            max_tokens: config.text.max_tokens,
            image_size: u32::try_from(config.matcher.image_size)?,
            embedding: config.matcher.embedding,
            calibration: config.matcher.slope_and_offset(),
        })
    }

    /// Side length of the images that the matcher reads, in pixels.
    pub fn image_size(&self) -> u32 {
        self.image_size
    }

    /// Numbers of an embedding.
    pub fn embedding(&self) -> usize {
        self.embedding
    }

    /// Embeds images of any sizes: → f32 `(images, embedding)` of length 1, on the CPU. An image is resized to the
    /// matcher's square without cropping.
    ///
    /// # Errors
    /// The embedding of an image is not finite.
    pub fn embed_images(&self, images: &[RgbImage]) -> Result<Tensor> {
        let side = self.image_size;
        let embed = |batch: &[RgbImage]| {
            let batch: Vec<RgbImage> = batch.par_iter().map(|image| resize_bicubic(image, side, side)).collect();
            Ok(Input::Images(to_pixels(&batch)?.to_device(&runtime::device()?)?))
        };
        let name = |index: usize| format!("image {} of {}", index + 1, images.len());
        self.embed(images.chunks(IMAGES).map(embed), images.len(), name)
    }

    /// Embeds texts: → f32 `(texts, embedding)` of length 1, on the CPU.
    ///
    /// # Errors
    /// The embedding of a text is not finite.
    pub fn embed_texts<T: AsRef<str>>(&self, texts: &[T]) -> Result<Tensor> {
        let embed = |batch: &[T]| {
            let batch = batch.iter().map(AsRef::as_ref);
            Ok(Input::Texts(Tokens::of_texts(&self.text, batch, self.max_tokens, &runtime::device()?)?))
        };
        let name = |index: usize| format!("the text `{}`", texts.get(index).map_or("", AsRef::as_ref));
        self.embed(texts.chunks(TEXTS).map(embed), texts.len(), name)
    }

    /// Embeds images and texts: the numbers of [`Self::embed_images`] and of [`Self::embed_texts`].
    ///
    /// # Errors
    /// As these.
    pub fn embed_pairs(&self, images: &[RgbImage], texts: &[String]) -> Result<[Vec<f32>; 2]> {
        let numbers = |embeddings: Tensor| -> Result<Vec<f32>> { Ok(embeddings.flatten_all()?.to_vec1()?) };
        Ok([numbers(self.embed_images(images)?)?, numbers(self.embed_texts(texts)?)?])
    }

    /// The cosine above which the score is above `score`; `None`: the matcher is not calibrated, or higher cosines have
    /// lower scores.
    pub fn cosine_of(&self, score: f64) -> Option<f64> {
        let score = score.clamp(0.0, 1.0);
        let [slope, offset] = self.calibration.filter(|[slope, _]| *slope > 0.0)?;
        Some(((score / (1.0 - score)).ln() - offset) / slope)
    }

    fn embed(
        &self,
        batches: impl Iterator<Item = Result<Input>>,
        count: usize,
        name: impl Fn(usize) -> String,
    ) -> Result<Tensor> {
        let mut values = Vec::with_capacity(count * self.embedding);
        for batch in batches {
            values.extend(self.matcher.embed(&batch?)?.flatten_all()?.to_vec1::<f32>()?);
        }
        let wrong = unnormalized(&values, self.embedding);
        let what = wrong.map_or(String::new(), name);
        let hint = "the model's weights are damaged, or its training diverged: use another model";
        ensure!(wrong.is_none(), failed(format_args!("the embedding of {what} is not finite or has no length"), hint));
        Tensor::from_vec(values, (count, self.embedding), &Device::Cpu).context("an embedding has another size")
    }

    /// The cosines of embeddings `(images, embedding)` and `(texts, embedding)`: → `(images, texts)`.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub fn cosines(images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        ops::linear(images, texts, None)
    }

    /// The cosine of each image with its own text, of embeddings `(pairs, embedding)`: → `(pairs)`.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn pair_cosines(images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        Ok((images * texts)?.sum(1)?)
    }

    /// Whether there are scores.
    pub fn is_calibrated(&self) -> bool {
        self.calibration.is_some()
    }

    /// The probability that an image and a text with this cosine are a pair, where pairs and others are equally
    /// frequent: σ(a · cosine + b). `None`: the matcher is not calibrated.
    pub fn score(&self, cosine: f64) -> Option<f64> {
        self.calibration.map(|[slope, offset]| 1.0 / (1.0 + (-slope * cosine - offset).exp()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tiny_matcher;
    use image::Rgb;
    use safetensors::Dtype;

    fn image(number: u8) -> RgbImage {
        RgbImage::from_fn(9, 7, |x, y| Rgb([number * 3, (x * 20) as u8, (y * 30) as u8]))
    }

    #[test]
    fn embeddings_do_not_depend_on_the_batch() {
        let folder = tempfile::tempdir().unwrap();
        let matching = Matching::open(&tiny_matcher(folder.path(), Dtype::F32, 1.0)).unwrap();
        let images: Vec<RgbImage> = (0..40).map(image).collect();
        let texts: Vec<String> = (0..70).map(|n| "红苹果小狗".chars().cycle().take(1 + n % 9).collect()).collect();
        let (all, all_texts) = (matching.embed_images(&images).unwrap(), matching.embed_texts(&texts).unwrap());
        assert_eq!((all.dims(), all_texts.dims()), (&[40, 4][..], &[70, 4][..]));
        let gap =
            |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(gap(&all.narrow(0, 37, 1).unwrap(), &matching.embed_images(&images[37..38]).unwrap()) < 1e-5);
        assert!(gap(&all_texts.narrow(0, 66, 1).unwrap(), &matching.embed_texts(&texts[66..67]).unwrap()) < 1e-5);
        let cosines = Matching::cosines(&all, &all_texts).unwrap();
        assert_eq!(cosines.dims(), [40, 70]);
        let most = cosines.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(most <= 1.0 + 1e-5, "{most}");
        let none: [&str; 0] = [];
        assert_eq!(
            (matching.embed_images(&[]).unwrap().dims(), matching.embed_texts(&none).unwrap().dims()),
            (&[0, 4][..], &[0, 4][..])
        );
        assert_eq!((matching.score(0.5), matching.cosine_of(0.5)), (None, None));
    }

    #[test]
    fn a_calibrated_score_is_a_probability_and_can_be_inverted() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = tiny_matcher(folder.path(), Dtype::F32, 1.0);
        bundle.calibrate([20.0, -5.0]).unwrap();
        let matching = Matching::open(&Bundle::open(&bundle.name()).unwrap()).unwrap();
        assert_eq!(matching.score(0.25), Some(0.5));
        for score in [0.01, 0.3, 0.5, 0.99] {
            let again = matching.score(matching.cosine_of(score).unwrap()).unwrap();
            assert!((again - score).abs() < 1e-12, "{again} instead of {score}");
        }
        assert_eq!((matching.cosine_of(-1.0), matching.cosine_of(2.0)), (Some(f64::NEG_INFINITY), Some(f64::INFINITY)));
    }

    #[test]
    fn an_embedding_that_is_not_finite_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let matching = Matching::open(&tiny_matcher(folder.path(), Dtype::F32, 1e30)).unwrap();
        let error = matching.embed_texts(&["小狗"]).unwrap_err();
        assert!(error.to_string().contains("the text `小狗` is not finite or has no length"), "{error}");
        let error = matching.embed_images(&[image(1), image(2)]).unwrap_err();
        assert!(error.to_string().contains("image 1 of 2 is not finite or has no length"), "{error}");
    }
}
