//! Copies of a model folder: in another precision, with another decoder, or with the names of others.

use super::{
    Bundle, Parts, WEIGHTS,
    import::Family,
    write,
    write::{sibling, write_weights},
};
use crate::{
    config::{Architecture, QuantizerKind, Task},
    error::{Context, Result, ensure, usage},
    nn::weights,
    tokenizer,
};
use safetensors::Dtype;
use std::{collections::BTreeMap, fs, path::Path};

impl Bundle {
    /// Writes a copy of this model folder with its weights stored as `dtype`, and with `tokenizer` in the place of a
    /// generator's own.
    ///
    /// # Errors
    /// `tokenizer` makes other codes, so that the generator's would mean nothing to it.
    pub fn export(&self, folder: &Path, dtype: Dtype, tokenizer: Option<&Self>) -> Result<()> {
        let generator = self.config.task == Task::Generator;
        let hint = "name a generator's folder, or leave it out";
        ensure!(generator || tokenizer.is_none(), usage("an image tokenizer has no image tokenizer in it", hint));
        let own = self.image_tokenizer_folder()?;
        let tokenizer = tokenizer.map(Self::image_tokenizer_folder).transpose()?;
        if let Some(tokenizer) = &tokenizer {
            check_codes(&own, tokenizer)?;
        }
        let bytes = self.place.weights()?;
        let parts = Parts {
            config: &self.config,
            weights: weights::stored(&bytes, &self.place.file(WEIGHTS), dtype)?,
            vocab: if generator { Some(self.vocab()?) } else { None },
            attribution: self.attribution(),
            image_tokenizer: generator.then(|| tokenizer.unwrap_or(own)),
        };
        write(folder, &parts, dtype)
    }

    /// Writes the image tokenizer's weights into a file with LlamaGen's names, which `vilg import llamagen-vq` reads, too.
    ///
    /// # Errors
    /// LlamaGen has no such tokenizer.
    pub fn export_llamagen(&self, file: &Path, dtype: Dtype) -> Result<()> {
        let own = self.image_tokenizer_folder()?;
        let settings = &own.config.image_tokenizer;
        let theirs = settings.architecture == Architecture::Vqgan
            && settings.quantizer == QuantizerKind::Nearest
            && settings.l2_normalize;
        let what = format!("LlamaGen has no image tokenizer like {}", own.place.name());
        ensure!(theirs, usage(what, "its tokenizers are VQGANs that compare nearest codes with l2_normalize"));
        let levels = settings.channel_multipliers.len();
        let bytes = own.place.weights()?;
        let stored = weights::stored(&bytes, &own.place.file(WEIGHTS), dtype)?;
        let renamed: BTreeMap<_, _> =
            stored.into_iter().map(|(name, values)| (Family::LlamaGen.name(&name, levels), values)).collect();
        // An older file stays until the new one is complete.
        let new = sibling(file, ".new");
        let written = write_weights(&new, &renamed).and_then(|()| Ok(fs::rename(&new, file)?));
        written.with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The settings beside weights and their shapes that say what codes are.
fn of_codes(bundle: &Bundle) -> impl PartialEq + use<> {
    let settings = bundle.config.image_tokenizer.clone();
    let quantizer = (settings.quantizer, settings.fsq_levels, settings.l2_normalize);
    (settings.architecture, settings.image_size, settings.attention_sides, quantizer)
}

/// Checks that two image tokenizers make the same codes of every picture.
fn check_codes(own: &Bundle, other: &Bundle) -> Result<()> {
    let names = (own.place.name(), other.place.name());
    let differ = |what: String| {
        let hint = "train it with train.init_from = the generator's folder and train.freeze = [\"encoder\", \"quant_conv\", \
            \"quantize\"]";
        usage(format!("the codes of {} mean something else to {}: {what}", names.0, names.1), hint)
    };
    ensure!(of_codes(own) == of_codes(other), differ("their architectures or quantisers differ".into()));
    let (ours, theirs) = (own.weights()?, other.weights()?);
    for (name, ours) in ours.iter().filter(|(name, _)| tokenizer::makes_codes(name)) {
        let same = match theirs.get(name) {
            Some(theirs) if theirs.shape() == ours.shape() => {
                (theirs - ours)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? == 0.0
            }
            _ => false,
        };
        ensure!(same, differ(format!("`{name}` differs")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bundle::{DEMO_NAME, IMAGE_TOKENIZER, import},
        error::{Exit, exit_of},
    };
    use candle_core::Tensor;
    use std::collections::HashMap;

    fn bits(weights: &HashMap<String, Tensor>) -> BTreeMap<&str, Vec<u32>> {
        let bits =
            |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits);
        weights.iter().map(|(name, tensor)| (name.as_str(), bits(tensor).collect())).collect()
    }

    fn open(folder: &Path) -> Bundle {
        Bundle::open(folder.to_str().unwrap()).unwrap()
    }

    /// A tokenizer like the demo's, where one weight is another.
    fn changed(folder: &Path, name: &str) -> Bundle {
        let demo = Bundle::open(DEMO_NAME).unwrap().image_tokenizer_folder().unwrap();
        let mut weights = demo.weights().unwrap();
        let other = (&weights[name] + 0.25).unwrap();
        weights.insert(name.into(), other);
        let weights =
            weights.iter().map(|(name, tensor)| (name.clone(), weights::of_tensor(tensor).unwrap())).collect();
        let parts = Parts {
            config: &demo.config,
            weights,
            vocab: None,
            attribution: "Another's.".into(),
            image_tokenizer: None,
        };
        write(&folder.join(name), &parts, Dtype::F32).unwrap();
        open(&folder.join(name))
    }

    #[test]
    fn a_generator_takes_another_decoder_but_no_other_codes() {
        let place = tempfile::tempdir().unwrap();
        let (demo, out) = (Bundle::open(DEMO_NAME).unwrap(), place.path().join("out"));
        let decoder = changed(place.path(), "decoder.conv_out.bias");
        demo.export(&out, Dtype::F32, Some(&decoder)).unwrap();
        let inside = open(&out.join(IMAGE_TOKENIZER));
        assert_eq!(bits(&inside.weights().unwrap()), bits(&decoder.weights().unwrap()));
        assert_eq!(inside.attribution(), "Another's.");
        open(&out).generator().unwrap();
        for name in ["quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.bias"] {
            let error = demo.export(&out, Dtype::F32, Some(&changed(place.path(), name))).unwrap_err();
            assert!(error.to_string().contains(name), "{error:#}");
            assert_eq!(exit_of(&error), Exit::Usage);
        }
        assert_eq!(exit_of(&decoder.export(&out, Dtype::F32, Some(&decoder)).unwrap_err()), Exit::Usage);
    }

    #[test]
    fn imported_from_llamagen_s_names_it_is_what_was_exported() {
        let place = tempfile::tempdir().unwrap();
        let (file, folder) = (place.path().join("vq.safetensors"), place.path().join("again"));
        let demo = Bundle::open(DEMO_NAME).unwrap();
        demo.export_llamagen(&file, Dtype::F32).unwrap();
        import::vqgan(&file, Family::LlamaGen, None, &folder).unwrap();
        let tokenizer = demo.image_tokenizer_folder().unwrap().weights().unwrap();
        assert_eq!(bits(&open(&folder).weights().unwrap()), bits(&tokenizer));
        let again = place.path().join("again.safetensors");
        open(&folder).export_llamagen(&again, Dtype::F32).unwrap();
        assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap());
    }
}
