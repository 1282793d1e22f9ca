//! The calibration of a matcher, which is stored in its model folder, and the digest of what makes its embeddings.

use super::{Bundle, Parts, Place, WEIGHTS, manifest, write::write_as};
use crate::{
    config::{self, Task},
    error::{Context, Result, ensure, usage},
    nn::weights::{self, Piece},
};
use safetensors::Dtype;
use std::{fs, io::Write, path::PathBuf};

impl Bundle {
    /// Stores slope and offset of the score in the matcher's model folder. The folder is written anew beside its place and
    /// then exchanged, with the same weights, vocabulary and attribution.
    ///
    /// # Errors
    /// As [`Self::calibration_folder`], or the folder holds other files or cannot be written. It is then unchanged.
    pub fn calibrate(&self, slope_and_offset: [f64; 2]) -> Result<()> {
        let folder = self.calibration_folder()?;
        ensure!(slope_and_offset.iter().all(|x| x.is_finite()), "a calibration that is not finite");
        let mut config = self.config.clone();
        config.matcher.calibration = slope_and_offset.into();
        let bytes = self.place.weights()?;
        let mut stored = weights::stored(&bytes, &self.place.file(WEIGHTS), Dtype::F32)?;
        for values in stored.values_mut() {
            if let Some(Piece::Stored(_, dtype)) = values.pieces.first() {
                values.dtype = *dtype;
            }
        }
        let parts = Parts {
            config: &config,
            weights: stored,
            vocab: Some(self.vocab()?),
            attribution: self.attribution(),
            image_tokenizer: None,
        };
        write_as(&folder, &parts, Dtype::F32, None, false)
    }

    /// The folder that a calibration would be stored in. If the model's folder is a link, it is the one that it points to.
    ///
    /// # Errors
    /// The model is not a matcher in a folder of its own, or its parts do not belong together.
    pub fn calibration_folder(&self) -> Result<PathBuf> {
        self.expect(Task::Matcher)?;
        let Place::Folder(folder) = &self.place else {
            let what = format!("{} is part of the program and cannot be changed", self.place.name());
            return Err(usage(what, "name the folder of your own matcher with --model"));
        };
        // A renewed manifest would declare parts that do not belong together to be sound.
        let mismatch = self.manifest.is_none() && self.place.manifest()?.is_some();
        let what = format!("the parts of {} do not belong together", folder.display());
        ensure!(!mismatch, manifest::mismatch(what));
        fs::canonicalize(folder).with_context(|| format!("cannot find {}", folder.display()))
    }

    /// Digest of what makes a matcher's embeddings: weights, vocabulary and settings, without its calibration and the
    /// settings of its training.
    ///
    /// # Errors
    /// The model is not a matcher, or a file cannot be read.
    pub fn matcher_digest(&self) -> Result<String> {
        self.expect(Task::Matcher)?;
        let defaults = config::Matcher::default();
        let matcher = config::Matcher {
            calibration: Vec::new(),
            loss: defaults.loss,
            min_crop_area: defaults.min_crop_area,
            flip: defaults.flip,
            ..self.config.matcher.clone()
        };
        let text = (self.config.text.max_tokens, self.config.text.normalize);
        let mut hasher = blake3::Hasher::new();
        write!(hasher, "vilg matcher 1\n{}\n", serde_json::to_string(&(matcher, text))?)?;
        hasher.update(self.vocab()?.as_bytes()).update(&[0]);
        hasher.update(&self.place.weights()?);
        Ok(hasher.finalize().to_hex().to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        bundle::{Changes, MANIFEST, write},
        model::Matcher,
        nn::params::Scope,
        runtime,
        text::WordPiece,
    };
    use candle_core::{DType, Tensor};
    use std::path::Path;

    /// A tiny matcher with random weights, multiplied by `scale`.
    pub(crate) fn model(folder: &Path, dtype: Dtype, scale: f64) -> Bundle {
        let vocab = crate::text::train(["红苹果", "小狗"], 20).unwrap();
        let mut config = config::Config { task: Task::Matcher, ..Default::default() };
        config.text.max_tokens = 8;
        config.matcher = config::Matcher {
            image_size: 8,
            patch_size: 4,
            image_layers: 1,
            image_hidden: 8,
            image_heads: 2,
            text_layers: 1,
            text_hidden: 8,
            text_heads: 2,
            embedding: 4,
            ..Default::default()
        };
        let scope = Scope::from_seed(1, DType::F32, &runtime::device().unwrap());
        let size = WordPiece::parse(&vocab).unwrap().vocab_size();
        Matcher::new(&scope, &config.matcher, (size, 8), config::Precision::F32).unwrap();
        let larger = |tensor: &Tensor| weights::of_tensor(&tensor.affine(scale, 0.0).unwrap()).unwrap();
        let weights = scope.params().iter().map(|(name, param)| (name.clone(), larger(param))).collect();
        let attribution = "Ours.".into();
        let parts = Parts { config: &config, weights, vocab: Some(vocab), attribution, image_tokenizer: None };
        let full = folder.join("full");
        write(&full, &parts, Dtype::F32).unwrap();
        let path = folder.join("model");
        open(&full).export(&path, dtype, &Changes::default(), true).unwrap();
        open(&path)
    }

    fn open(path: &Path) -> Bundle {
        Bundle::open(path.to_str().unwrap()).unwrap()
    }

    #[test]
    fn only_the_calibration_changes() {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let folder = tempfile::tempdir().unwrap();
            let (before, path) = (model(folder.path(), dtype, 1.0), folder.path().join("model"));
            let bytes = |name: &str| fs::read(path.join(name)).unwrap();
            let files = ["model.safetensors", "vocab.txt", "ATTRIBUTION.md"];
            let old: Vec<Vec<u8>> = files.iter().map(|name| bytes(name)).collect();
            before.calibrate([20.0, -5.5]).unwrap();
            let after = open(&path);
            assert_eq!(after.config.matcher.slope_and_offset(), Some([20.0, -5.5]));
            assert!(after.manifest.is_some() && after.matcher().is_ok());
            assert_eq!(old, files.iter().map(|name| bytes(name)).collect::<Vec<_>>());
            assert_eq!(after.matcher_digest().unwrap(), before.matcher_digest().unwrap());
            // Again, through a link.
            let link = folder.path().join("link");
            std::os::unix::fs::symlink(&path, &link).unwrap();
            open(&link).calibrate([1.0, 2.0]).unwrap();
            assert_eq!(open(&path).config.matcher.calibration, [1.0, 2.0]);
            assert!(link.is_symlink());
        }
    }

    #[test]
    fn folders_with_other_files_and_other_models_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (bundle, path) = (model(folder.path(), Dtype::F32, 1.0), folder.path().join("model"));
        fs::write(path.join("notes.txt"), "mine").unwrap();
        assert!(format!("{:#}", bundle.calibrate([1.0, 0.0]).unwrap_err()).contains("notes.txt"));
        assert_eq!(fs::read_to_string(path.join("notes.txt")).unwrap(), "mine");
        assert!(bundle.calibrate([f64::NAN, 0.0]).is_err());
        assert!(Bundle::open("demo").unwrap().calibrate([1.0, 0.0]).is_err());
        fs::remove_file(path.join("notes.txt")).unwrap();
        let mismatched = Bundle { manifest: None, ..bundle };
        assert!(path.join(MANIFEST).exists());
        assert!(mismatched.calibrate([1.0, 0.0]).unwrap_err().to_string().contains("do not belong together"));
    }
}
