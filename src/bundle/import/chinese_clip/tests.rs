//! Against cn_clip and transformers (scripts/golden_matcher.py).

use super::*;
use crate::{
    bundle::Bundle,
    data::{image::to_pixels, resize_bicubic},
    error::hint_of,
    model::{Tokens, matcher::Input},
    ops::testing::{hashed, values},
};
use candle_core::Tensor;
use image::RgbImage;
use safetensors::SafeTensors;
use std::{collections::HashMap, fs};

/// What cn_clip and transformers answer.
struct Golden {
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

type Shapes = BTreeMap<String, Vec<usize>>;

fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chinese_clip")
}

impl Golden {
    fn read() -> Result<Self> {
        let bytes = fs::read(golden_folder().join("answers.safetensors"))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
        let metadata = metadata.metadata().clone().context("no metadata")?;
        Ok(Self { tensors: weights::parse(&bytes, "answers")?, metadata })
    }

    /// Names and shapes of the tensors of a model.
    fn shapes(&self, model: &str) -> Result<Shapes> {
        let mut all: HashMap<String, Shapes> = serde_json::from_str(&self.metadata["names"])?;
        all.remove(model).context("no such model")
    }

    /// Texts with their ids.
    fn texts(&self) -> Result<Vec<(String, Vec<u32>)>> {
        Ok(serde_json::from_str(&self.metadata["texts"])?)
    }

    /// The texts of the models' answers.
    fn rows(&self) -> Result<Vec<String>> {
        let (texts, rows): (_, Vec<usize>) = (self.texts()?, serde_json::from_str(&self.metadata["rows"])?);
        Ok(rows.into_iter().map(|row| texts[row].0.clone()).collect())
    }

    /// Asserts what a model answers for preprocessed pixels and for images.
    fn check(&self, folder: &Path, model: &str) -> Result<()> {
        let bundle = open(folder)?;
        let (matcher, side) = (bundle.matcher()?, bundle.config.matcher.image_size as u32);
        let rows = self.rows()?;
        let texts = Tokens::of_texts(&bundle.text()?, rows.iter().map(String::as_str), MAX_TOKENS, &Device::Cpu)?;
        let texts = matcher.embed(&Input::Texts(texts))?;
        // Their pixels are normalized, ours are in [-1, 1].
        let normalized = self.tensors[&format!("pixels.{side}")].permute((0, 2, 3, 1))?.contiguous()?;
        let mean = Tensor::new(&[0.481_454_66f32, 0.457_827_5, 0.408_210_73], &Device::Cpu)?;
        let std = Tensor::new(&[0.268_629_54f32, 0.261_302_6, 0.275_777_1], &Device::Cpu)?;
        let pixels = normalized.broadcast_mul(&std)?.broadcast_add(&mean)?.affine(2.0, -1.0)?;
        let images = (0..).map_while(|i| self.tensors.get(&format!("picture.{i}")));
        let images = images.map(|tensor| Ok(resize_bicubic(&image(tensor)?, side, side)));
        let images = to_pixels(&images.collect::<Result<Vec<_>>>()?)?;
        let scale = values(&bundle.weights()?["logit_scale"])[0].exp();
        let theirs = |what: &str| &self.tensors[&format!("{model}.{what}")];
        assert_close(&texts, theirs("texts"), 1e-4, model);
        for (pixels, tolerance) in [(pixels, 1e-4), (images, 1e-3)] {
            let images = matcher.embed(&Input::Images(pixels))?;
            assert_close(&images, theirs("images"), tolerance, model);
            let logits = (images.matmul(&texts.t()?)? * scale)?;
            assert_close(&logits, theirs("logits"), tolerance, model);
        }
        Ok(())
    }
}

fn image(tensor: &Tensor) -> Result<RgbImage> {
    let (height, width, _) = tensor.dims3()?;
    let bytes = values(tensor).into_iter().map(|value| value as u8).collect();
    RgbImage::from_raw(width as u32, height as u32, bytes).context("an image")
}

fn assert_close(ours: &Tensor, theirs: &Tensor, tolerance: f64, model: &str) {
    assert_eq!(ours.dims(), theirs.dims(), "{model}");
    let differences = values(ours).into_iter().zip(values(theirs)).map(|(a, b)| (a - b).abs());
    let most = differences.fold(0.0, f64::max);
    assert!(most < tolerance, "{model}: {most}");
}

/// The formula of scripts/golden_matcher.py.
fn weight(name: &str, shape: &[usize]) -> Result<Tensor> {
    if name.ends_with("running_var") {
        return Ok((hashed(name, shape, 0.4).abs()? + 1.0)?);
    }
    if name == "logit_scale" {
        return Ok((hashed(name, shape, 1.0) + 2.0)?);
    }
    if shape.len() == 1 {
        let shift = if name.ends_with(".weight") { 1.0 } else { 0.0 };
        return Ok((hashed(name, shape, 0.4) + shift)?);
    }
    Ok(hashed(name, shape, (24.0 / shape[1..].iter().product::<usize>() as f64).sqrt()))
}

fn weights_of(shapes: &Shapes) -> Result<HashMap<String, Tensor>> {
    shapes.iter().map(|(name, shape)| Ok((name.clone(), weight(name, shape)?))).collect()
}

/// A folder with the vocabulary and these weights as `file`; returns the path of the file.
fn source(folder: &Path, file: &str, tensors: &HashMap<String, Tensor>) -> Result<PathBuf> {
    fs::create_dir_all(folder)?;
    fs::copy(golden_folder().join(VOCAB), folder.join(VOCAB))?;
    let values = tensors.iter().map(|(name, tensor)| Ok((name.clone(), weights::of_tensor(tensor)?)));
    let path = folder.join(file);
    weights::write(&mut fs::File::create(&path)?, &values.collect::<Result<_>>()?)?;
    Ok(path)
}

fn open(folder: &Path) -> Result<Bundle> {
    Bundle::open(&folder.display().to_string())
}

fn bits(folder: &Path) -> Result<BTreeMap<String, Vec<u64>>> {
    let weights = open(folder)?.weights()?;
    Ok(weights
        .into_iter()
        .map(|(name, tensor)| (name, values(&tensor).into_iter().map(f64::to_bits).collect()))
        .collect())
}

fn error<T>(result: Result<T>) -> String {
    result.err().map(|error| format!("{error:#}")).unwrap_or_default()
}

#[test]
fn a_training_checkpoint_answers_as_in_cn_clip() -> Result<()> {
    let (place, golden) = (tempfile::tempdir()?, Golden::read()?);
    let folder = place.path().join("tiny");
    chinese_clip(&golden_folder().join("tiny.pt"), None, &folder, false)?;
    golden.check(&folder, "tiny")?;
    let bundle = open(&folder)?;
    assert!(bundle.attribution().contains("tiny.pt") && bundle.config.text.max_tokens == 52);
    assert_eq!((bundle.config.matcher.text_positions, bundle.config.matcher.patch_size), (60, 8));
    Ok(())
}

#[test]
fn each_encoder_and_layout_answers_as_there() -> Result<()> {
    let (place, golden) = (tempfile::tempdir()?, Golden::read()?);
    let folder = |name: &str| place.path().join(name);
    for model in ["vit", "resnet"] {
        let tensors = weights_of(&golden.shapes(model)?)?;
        let path = source(&folder("source"), "model.safetensors", &tensors)?;
        chinese_clip(&path, None, &folder(model), false)?;
        golden.check(&folder(model), model)?;

        let (exported, again) = (folder("source").join("exported.safetensors"), folder(&format!("{model}-again")));
        open(&folder(model))?.export_chinese_clip(&exported, Dtype::F32, false)?;
        let names = |path: &Path| -> Result<Vec<String>> {
            Ok(CheckpointFile::open(path)?.names().map(str::to_owned).collect())
        };
        assert_eq!(names(&exported)?, names(&path)?);
        let shapes: Shapes = CheckpointFile::open(&exported).map(|file| {
            file.names().map(|name| (name.to_owned(), file.shape(name).unwrap_or_default().to_vec())).collect()
        })?;
        assert_eq!(shapes, golden.shapes(model)?);
        chinese_clip(&exported, None, &again, false)?;
        assert!(bits(&folder(model))? == bits(&again)?, "{model}");
    }

    // The same weights as with flash attention.
    let plain = weights_of(&golden.shapes("vit")?)?;
    let flash = |name: &String| -> Result<Tensor> {
        if let Some(tensor) = plain.get(name) {
            return Ok(tensor.clone());
        }
        if let Some((prefix, kind)) = name.split_once("attention.self.Wqkv") {
            let part = |part| &plain[&format!("{prefix}attention.self.{part}{kind}")];
            return Ok(Tensor::cat(&["query", "key", "value"].map(part), 0)?);
        }
        let plainly = [("attention.self.out_proj", "attention.output.dense"), ("attn.Wqkv.", "attn.in_proj_")];
        Ok(plain[&plainly.iter().fold(name.clone(), |name, (flash, plain)| name.replace(flash, plain))].clone())
    };
    let shapes = golden.shapes("flash")?;
    let tensors = shapes.keys().map(|name| Ok((name.clone(), flash(name)?)));
    let path = source(&folder("source"), "flash.safetensors", &tensors.collect::<Result<_>>()?)?;
    chinese_clip(&path, None, &folder("flash"), false)?;
    assert!(bits(&folder("vit"))? == bits(&folder("flash"))?);
    Ok(())
}

#[test]
fn a_hugging_face_folder_answers_as_in_transformers() -> Result<()> {
    let (place, golden) = (tempfile::tempdir()?, Golden::read()?);
    let (from, folder) = (place.path().join("hf"), place.path().join("model"));
    let mut tensors = weights_of(&golden.shapes("hugging_face")?)?;
    source(&from, "model.safetensors", &tensors)?;
    // Without config.json the heads of 32 channels would be unknown.
    assert!(error(chinese_clip(&from, None, &folder, false)).contains("not a multiple of 64"));
    let config = fs::read_to_string(golden_folder().join("config.json"))?;
    for (theirs, other, wrong) in [
        ("quick_gelu", "relu", "`relu` is not supported"),
        ("\"layer_norm_eps\": 1e-12", "\"layer_norm_eps\": 1e-6", "layer_norm_eps is 0.000001"),
        ("vision_config", "vision", "not the configuration of a ChineseCLIPModel"),
        ("\"num_attention_heads\": 3", "\"num_attention_heads\": 5", "matcher.image_heads"),
    ] {
        fs::write(from.join("config.json"), config.replace(theirs, other))?;
        let message = error(chinese_clip(&from, None, &folder, false));
        assert!(message.contains(wrong), "{message}");
    }
    fs::write(from.join("config.json"), config)?;
    // The same weights in another format, as in published folders.
    fs::write(from.join("pytorch_model.bin"), "not read")?;
    chinese_clip(&from, None, &folder, false)?;
    golden.check(&folder, "hugging_face")?;
    assert_eq!(open(&folder)?.config.matcher.image_heads, 3);
    let exported = error(open(&folder)?.export_chinese_clip(&place.path().join("x.safetensors"), Dtype::F32, false));
    assert!(exported.contains("Chinese-CLIP has no model like"), "{exported}");
    tensors.remove("vision_model.pre_layrnorm.bias");
    source(&from, "model.safetensors", &tensors)?;
    let message = error(chinese_clip(&from, None, &folder, false));
    assert!(message.contains("lacks 1 of 62 tensors, `vision_model.pre_layrnorm.bias` first"), "{message}");
    Ok(())
}

#[test]
fn texts_have_the_ids_of_cn_clip() -> Result<()> {
    let text = WordPiece::load(golden_folder().join(VOCAB))?;
    let texts = Golden::read()?.texts()?;
    assert!(texts.len() > 15);
    for (one, mut ids) in texts {
        ids.truncate(ids.iter().position(|id| *id == text.pad()).unwrap_or(ids.len()));
        assert_eq!(text.encode(&one, MAX_TOKENS)?, ids, "{one}");
    }
    Ok(())
}

#[test]
fn other_files_and_vocabularies_are_refused() -> Result<()> {
    let (place, golden) = (tempfile::tempdir()?, Golden::read()?);
    let (from, folder) = (place.path().join("from"), place.path().join("model"));
    let tensors = weights_of(&golden.shapes("vit")?)?;
    let import = |change: &dyn Fn(&mut HashMap<String, Tensor>) -> Result<()>| -> Result<String> {
        let mut tensors = tensors.clone();
        change(&mut tensors)?;
        let path = source(&from, "model.safetensors", &tensors)?;
        Ok(error(chinese_clip(&path, None, &folder, false)))
    };
    let replace = |name: &'static str, shape: &'static [usize]| {
        move |all: &mut HashMap<String, Tensor>| {
            all.insert(name.to_owned(), hashed(name, shape, 1.0));
            Ok(())
        }
    };
    let remove = |name: &'static str| {
        move |all: &mut HashMap<String, Tensor>| {
            all.remove(name).context("it was not there")?;
            Ok(())
        }
    };
    for (message, expected) in [
        (
            import(&remove("bert.encoder.layer.1.attention.self.key.bias"))?,
            "lacks 1 of 62 tensors, `bert.encoder.layer.1.attention.self.key.bias`",
        ),
        (import(&remove("visual.conv1.weight"))?, "neither `visual.conv1.weight` nor `vision_model."),
        (
            import(&remove("bert.embeddings.word_embeddings.weight"))?,
            "it lacks `bert.embeddings.word_embeddings.weight`",
        ),
        (
            import(&remove("bert.embeddings.token_type_embeddings.weight"))?,
            "`bert.embeddings.token_type_embeddings.weight` first",
        ),
        (import(&remove("text_projection"))?, "`text_projection` first"),
        (
            import(&replace("visual.ln_pre.weight", &[64]))?,
            "`visual.ln_pre.weight` gives the shape [64], expected [128]",
        ),
        (import(&replace("visual.positional_embedding", &[16, 128]))?, "16 image positions are not a square"),
        (import(&replace("visual.conv1.weight", &[128, 192]))?, "cannot read `visual.conv1.weight`"),
        (import(&replace("visual.conv1.weight", &[100, 3, 8, 8]))?, "100 is not a multiple of 64"),
        (
            import(&replace("bert.embeddings.token_type_embeddings.weight", &[2, 64]))?,
            "cannot read `bert.embeddings.position",
        ),
        (import(&replace("text_projection", &[128, 25]))?, "`text_projection` gives the shape [25, 128]"),
        (
            import(&replace("visual.transformer.resblocks.9.ln_1.weight", &[128]))?,
            "holds `visual.transformer.resblocks.9.ln_1.weight`",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
    let wrong = source(&from, "wrong.safetensors", &{
        let mut tensors = tensors.clone();
        replace("visual.conv1.weight", &[128, 192])(&mut tensors)?;
        tensors
    })?;
    let refused = chinese_clip(&wrong, None, &folder, false).unwrap_err();
    assert!(hint_of(&refused).is_some_and(|hint| hint.contains("clip_cn_")), "{refused:#}");
    let path = source(&from, "model.safetensors", &tensors)?;
    let long = from.join("long.txt");
    fs::write(&long, fs::read_to_string(from.join(VOCAB))? + "more\n")?;
    let message = error(chinese_clip(&path, Some(&long), &folder, false));
    assert!(message.contains("the vocabulary has 233 tokens, but") && message.contains("has 232"), "{message}");
    fs::rename(from.join(VOCAB), from.join("right.txt"))?;
    assert!(error(chinese_clip(&path, None, &folder, false)).contains("there is no vocabulary for"));
    assert!(!folder.exists(), "nothing is left behind");
    chinese_clip(&path, Some(&from.join("right.txt")), &folder, false)?;
    for other in ["lpips.safetensors", "torch_zip.pth", "taming_vqgan.safetensors"] {
        let path = golden_folder().with_file_name(other);
        let message = error(chinese_clip(&path, Some(&from.join("right.txt")), &folder, true));
        assert!(message.contains("is not a Chinese-CLIP"), "{message}");
    }
    Ok(())
}
