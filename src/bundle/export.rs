//! Copies of a model folder: in another precision, with another decoder, or with the names of others.

use super::{
    Bundle, Changes, Parts, WEIGHTS, codes,
    import::Family,
    publish,
    write::{write_as, write_weights_to},
};
use crate::{
    config::{Architecture, EndToEnd, QuantizerKind, Task, begins_with},
    error::{Result, ensure, usage},
    model::end_to_end,
    nn::weights,
    tokenizer,
};
use safetensors::Dtype;
use std::{collections::BTreeMap, path::Path};

impl Bundle {
    /// Writes a copy of this model folder with its weights stored as `dtype`. An older model folder in its place is
    /// replaced, with `force` any folder.
    ///
    /// # Errors
    /// The new image tokenizer makes other codes, so that it would misread the generator's; there is no reconstructor to
    /// leave out; `folder` cannot be written or replaced.
    pub fn export(&self, folder: &Path, dtype: Dtype, changes: &Changes, force: bool) -> Result<()> {
        let (task, Changes { tokenizer, two_stage }) = (self.config.task, *changes);
        let what = format!("{} is {}, without an end-to-end reconstructor", self.place.name(), task.model());
        ensure!(!two_stage || task.has_reconstructor(), usage(what, "leave out --two-stage"));
        let hint = "name a generator's folder, or leave it out";
        let what = format_args!("{} has no image tokenizer in it", task.model());
        ensure!(task.is_generator() || tokenizer.is_none(), usage(what, hint));
        let tokenizer = match (task, tokenizer) {
            (Task::Generator | Task::EndToEnd, Some(tokenizer)) => {
                let tokenizer = tokenizer.image_tokenizer_folder()?;
                check_codes(&self.image_tokenizer_folder()?, &tokenizer)?;
                Some(tokenizer)
            }
            (Task::Generator | Task::EndToEnd, None) => Some(self.image_tokenizer_folder()?),
            (Task::ImageTokenizer | Task::Matcher, _) => None,
        };
        let codes = match task {
            Task::Generator | Task::EndToEnd | Task::ImageTokenizer => Some(self.digest()?),
            Task::Matcher => None,
        };
        let bytes = self.place.weights()?;
        let (mut config, mut weights) =
            (self.config.clone(), weights::stored(&bytes, &self.place.file(WEIGHTS), dtype)?);
        self.adapt_stored(&mut weights)?;
        if two_stage {
            (config.task, config.end_to_end) = (Task::Generator, EndToEnd::default());
            weights.retain(|name, _| !begins_with(name, end_to_end::SCOPE));
        }
        let parts = Parts {
            config: &config,
            weights,
            vocab: task.has_vocabulary().then(|| self.vocab()).transpose()?,
            attribution: self.attribution(),
            image_tokenizer: tokenizer,
        };
        write_as(folder, &parts, dtype, codes, force)
    }

    /// Writes the image tokenizer's weights into a safetensors file with LlamaGen's names, which `vilg import llamagen-vq`
    /// reads. An older safetensors file in its place is replaced, with `force` any regular file.
    ///
    /// # Errors
    /// LlamaGen has no such tokenizer; `file` cannot be written or replaced.
    pub fn export_llamagen(&self, file: &Path, dtype: Dtype, force: bool) -> Result<()> {
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
        publish::file(file, force, |out| write_weights_to(out, &renamed))
    }
}

/// Checks that two image tokenizers make the same codes of every image.
fn check_codes(own: &Bundle, other: &Bundle) -> Result<()> {
    let names = (own.place.name(), other.place.name());
    let differ = |what: String| {
        let hint = "train it with train.init_from = the generator's folder and train.freeze = [\"encoder\", \"quant_conv\", \
            \"quantize\"]";
        usage(format!("the codes of {} mean something else to {}: {what}", names.0, names.1), hint)
    };
    if own.digest()? == other.digest()? {
        return Ok(());
    }
    let settings = |bundle: &Bundle| codes::settings(&bundle.config.image_tokenizer);
    ensure!(settings(own)? == settings(other)?, differ("their architectures or quantisers differ".into()));
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
        bundle::{DEMO_NAME, IMAGE_TOKENIZER, import, write},
        error::{Exit, exit_of},
    };
    use candle_core::Tensor;
    use std::{collections::HashMap, fs};

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

    fn with(tokenizer: &Bundle) -> Changes<'_> {
        Changes { tokenizer: Some(tokenizer), ..Changes::default() }
    }

    #[test]
    fn a_generator_takes_another_decoder_but_no_other_codes() {
        let place = tempfile::tempdir().unwrap();
        let (demo, out) = (Bundle::open(DEMO_NAME).unwrap(), place.path().join("out"));
        let decoder = changed(place.path(), "decoder.conv_out.bias");
        demo.export(&out, Dtype::F32, &with(&decoder), false).unwrap();
        let inside = open(&out.join(IMAGE_TOKENIZER));
        assert_eq!(bits(&inside.weights().unwrap()), bits(&decoder.weights().unwrap()));
        assert_eq!(inside.attribution(), "Another's.");
        open(&out).generator().unwrap();
        for name in ["quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.bias"] {
            let error = demo.export(&out, Dtype::F32, &with(&changed(place.path(), name)), false).unwrap_err();
            assert!(error.to_string().contains(name), "{error:#}");
            assert_eq!(exit_of(&error), Exit::Usage);
        }
        assert_eq!(exit_of(&decoder.export(&out, Dtype::F32, &with(&decoder), false).unwrap_err()), Exit::Usage);
    }

    #[test]
    fn imported_from_llamagen_s_names_it_is_what_was_exported() {
        let place = tempfile::tempdir().unwrap();
        let (file, folder) = (place.path().join("vq.safetensors"), place.path().join("again"));
        let demo = Bundle::open(DEMO_NAME).unwrap();
        demo.export_llamagen(&file, Dtype::F32, false).unwrap();
        import::vqgan(&file, Family::LlamaGen, None, &folder, false).unwrap();
        let tokenizer = demo.image_tokenizer_folder().unwrap().weights().unwrap();
        assert_eq!(bits(&open(&folder).weights().unwrap()), bits(&tokenizer));
        let again = place.path().join("again.safetensors");
        open(&folder).export_llamagen(&again, Dtype::F32, false).unwrap();
        assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap());
    }
}
