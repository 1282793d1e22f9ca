//! VQGANs of taming-transformers. Ours have the same names, so that only the configuration is to be found: by the shapes
//! of the weights, against which a YAML beside them is checked.

use super::{Candidate, take};
use crate::{
    bundle::{Parts, write},
    config::{Config, ImageTokenizer, QuantizerKind, Task},
    error::{Context, Hint, Result, ensure, failed, usage},
    nn::{checkpoint_file::CheckpointFile, params::Scope, weights},
    tokenizer,
};
use candle_core::Device;
use safetensors::Dtype;
use serde::Deserialize;
use std::{collections::BTreeMap, fs, path::Path};

/// Side of the published models' pictures.
const IMAGE_SIZE: usize = 256;
/// A configuration is far shorter.
const MAX_YAML: u64 = 1 << 20;
/// What the names of a tokenizer's tensors begin with.
const PARTS: [&str; 5] = ["encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."];

/// The part of taming's YAML that says what the weights are.
#[derive(Deserialize)]
struct Yaml {
    model: YamlModel,
}

#[derive(Deserialize)]
struct YamlModel {
    params: YamlParams,
}

#[derive(Deserialize)]
struct YamlParams {
    embed_dim: usize,
    n_embed: usize,
    ddconfig: YamlSizes,
}

#[derive(Deserialize)]
struct YamlSizes {
    ch: usize,
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    attn_resolutions: Vec<usize>,
    z_channels: usize,
    resolution: usize,
}

/// Writes the model folder of a VQGAN with the quantiser `kind`. `yaml` is the configuration that was published with it.
///
/// # Errors
/// A tensor is missing, left over or misshapen; the YAML says other sizes than the weights have; the quantiser is another.
pub fn taming(source: &Path, kind: QuantizerKind, yaml: Option<&Path>, folder: &Path) -> Result<()> {
    let file = CheckpointFile::open(source)?;
    let yaml = yaml.map(|path| read_yaml(path).map(|yaml| (path, yaml))).transpose()?;
    let image_size = yaml.as_ref().map_or(IMAGE_SIZE, |(_, yaml)| yaml.model.params.ddconfig.resolution);
    let settings = settings(&file, kind, image_size).hint(
        format!("{} is not such a VQGAN", source.display()),
        "taming-gumbel has `quantize.proj`, taming-vqgan has not",
    )?;
    if let Some((path, yaml)) = &yaml {
        check_yaml(&settings, &yaml.model.params).with_context(|| format!("{} is of other weights", path.display()))?;
    }
    let name = folder.file_name().map_or("vqgan".to_owned(), |name| name.to_string_lossy().into_owned());
    let config = Config { name, task: Task::ImageTokenizer, image_tokenizer: settings, ..Config::default() };
    config.validate().with_context(|| format!("{}: its sizes", source.display()))?;

    let scope = Scope::empty_from_seed(0, &Device::Cpu);
    tokenizer::ImageTokenizer::new(&scope, &config.image_tokenizer)?;
    let wanted = scope.params();
    let left = file.names().find(|name| PARTS.iter().any(|part| name.starts_with(part)) && !wanted.contains_key(*name));
    let hint = "a VQGAN of this kind has no such tensor";
    ensure!(left.is_none(), failed(format!("{} holds `{}`", source.display(), left.unwrap_or_default()), hint));
    let tensors = take(&file, source, &wanted, |name| vec![Candidate::new(name.to_owned())])?;
    let weights = tensors.into_iter().map(|(name, tensor)| Ok((name, weights::of_tensor(&tensor)?)));
    let weights = weights.collect::<Result<BTreeMap<_, _>>>()?;
    let attribution = String::new();
    write(folder, &Parts { config: &config, weights, vocab: None, attribution, image_tokenizer: None }, Dtype::F32)
}

/// The sizes of a tokenizer by the shapes of its weights.
fn settings(file: &CheckpointFile, kind: QuantizerKind, image_size: usize) -> Result<ImageTokenizer> {
    let size = |name: &str, dimension: usize| -> Result<usize> {
        let shape = file.shape(name).with_context(|| format!("it lacks `{name}`"))?;
        shape.get(dimension).copied().with_context(|| format!("`{name}` has shape {shape:?}"))
    };
    let channels = size("encoder.conv_in.weight", 0)?;
    let count = |name: &dyn Fn(usize) -> String| (0..64).take_while(|i| file.shape(&name(*i)).is_some()).count();
    let levels = count(&|level| format!("encoder.down.{level}.block.0.conv1.weight"));
    let width =
        |level| size(&format!("encoder.down.{level}.block.0.conv1.weight"), 0).map(|width| width / channels.max(1));
    let attends = |level: &usize| file.shape(&format!("encoder.down.{level}.attn.0.norm.weight")).is_some();
    let gumbel = file.shape("quantize.proj.weight").is_some();
    ensure!(gumbel == (kind == QuantizerKind::Gumbel), "its quantiser is of the other kind");
    let codebook = if gumbel { "quantize.embed.weight" } else { "quantize.embedding.weight" };
    Ok(ImageTokenizer {
        image_size,
        channels,
        channel_multipliers: (0..levels).map(width).collect::<Result<_>>()?,
        residual_blocks: count(&|block| format!("encoder.down.0.block.{block}.conv1.weight")),
        attention_sides: (0..levels).filter(attends).map(|level| image_size >> level).collect(),
        latent_channels: size("encoder.conv_out.weight", 0)?,
        quantizer: kind,
        codebook_size: size(codebook, 0)?,
        code_dim: size(codebook, 1)?,
        // The published ones were trained so.
        legacy_beta: true,
        l1_weight: 1.0,
        l2_weight: 0.0,
        ..ImageTokenizer::default()
    })
}

fn read_yaml(path: &Path) -> Result<Yaml> {
    let name = path.display();
    let short = fs::metadata(path).with_context(|| format!("cannot open {name}"))?.len() <= MAX_YAML;
    ensure!(
        short,
        usage(format_args!("{name} is too long for a configuration"), "name the model.yaml of the checkpoint")
    );
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    serde_yaml_ng::from_str(&text).hint(
        format!("{name} is not a configuration of taming-transformers"),
        "leave `--yaml` out: sizes are read from the weights",
    )
}

fn check_yaml(ours: &ImageTokenizer, yaml: &YamlParams) -> Result<()> {
    let sizes = &yaml.ddconfig;
    let mut attention = sizes.attn_resolutions.clone();
    attention.sort_unstable_by(|a, b| b.cmp(a));
    let pairs = [
        ("ch", vec![sizes.ch], vec![ours.channels]),
        ("ch_mult", sizes.ch_mult.clone(), ours.channel_multipliers.clone()),
        ("num_res_blocks", vec![sizes.num_res_blocks], vec![ours.residual_blocks]),
        ("attn_resolutions", attention, ours.attention_sides.clone()),
        ("z_channels", vec![sizes.z_channels], vec![ours.latent_channels]),
        ("embed_dim", vec![yaml.embed_dim], vec![ours.code_dim]),
        ("n_embed", vec![yaml.n_embed], vec![ours.codebook_size]),
    ];
    for (name, theirs, ours) in pairs {
        ensure!(theirs == ours, "it says {name} = {theirs:?}, the weights have {ours:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use candle_core::Tensor;
    use std::path::PathBuf;

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/taming_vqgan.safetensors")
    }

    const YAML: &str = "model:\n  target: taming.models.vqgan.VQModel\n  params:\n    embed_dim: 6\n    n_embed: 64\n    ddconfig:\n      \
        double_z: false\n      ch: 32\n      ch_mult: [2, 1]\n      num_res_blocks: 1\n      attn_resolutions: [8]\n      \
        z_channels: 16\n      resolution: 16\n";

    fn error(result: Result<()>) -> String {
        result.err().map(|error| format!("{error:#}")).unwrap_or_default()
    }

    #[test]
    fn imported_exported_and_imported_again_it_answers_as_taming_does() -> Result<()> {
        let place = tempfile::tempdir()?;
        let (folder, yaml) = (place.path().join("a"), place.path().join("model.yaml"));
        fs::write(&yaml, YAML)?;
        taming(&golden(), QuantizerKind::Nearest, Some(&yaml), &folder)?;
        let open = |folder: &Path| Bundle::open(&folder.display().to_string());
        let model = open(&folder)?.image_tokenizer()?;
        let golden_file = CheckpointFile::open(&golden())?;
        let x = golden_file.tensor("golden.x")?.permute((0, 2, 3, 1))?.contiguous()?;
        let codes =
            |model: &tokenizer::ImageTokenizer| -> Result<Vec<u32>> { Ok(model.encode(&x)?.flatten_all()?.to_vec1()?) };
        let theirs: Vec<f32> = golden_file.tensor("golden.codes")?.flatten_all()?.to_vec1()?;
        assert_eq!(codes(&model)?, theirs.iter().map(|code| *code as u32).collect::<Vec<_>>());

        let (exported, again) = (place.path().join("b"), place.path().join("c"));
        open(&folder)?.export(&exported, Dtype::F32)?;
        taming(&exported, QuantizerKind::Nearest, Some(&yaml), &again)?;
        let bits = |folder: &Path| -> Result<Vec<(String, Vec<u32>)>> {
            let flat = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>());
            let mut all = Vec::new();
            for (name, tensor) in open(folder)?.weights()? {
                all.push((name, flat(&tensor)?.into_iter().map(f32::to_bits).collect()));
            }
            all.sort();
            Ok(all)
        };
        assert!(bits(&folder)? == bits(&again)?);
        Ok(())
    }

    #[test]
    fn other_kinds_and_yamls_of_other_weights_are_refused() -> Result<()> {
        let place = tempfile::tempdir()?;
        let (folder, yaml) = (place.path().join("a"), place.path().join("model.yaml"));
        let import = |kind| error(taming(&golden(), kind, Some(&yaml), &folder));
        for (from, to, wrong) in [
            ("n_embed: 64", "n_embed: 65", "n_embed = [65], the weights have [64]"),
            ("ch_mult: [2, 1]", "ch_mult: [1, 2]", "ch_mult"),
            ("[8]", "[16]", "attn_resolutions"),
            ("num_res_blocks: 1", "num_res_blocks: 2", "num_res_blocks"),
            ("ddconfig", "other", "not a configuration of taming"),
        ] {
            fs::write(&yaml, YAML.replace(from, to))?;
            let message = import(QuantizerKind::Nearest);
            assert!(message.contains(wrong), "{message}");
        }
        fs::write(&yaml, YAML)?;
        assert!(import(QuantizerKind::Gumbel).contains("other kind"));
        let lpips = golden().with_file_name("lpips.safetensors");
        assert!(
            error(taming(&lpips, QuantizerKind::Nearest, None, &folder)).contains("lacks `encoder.conv_in.weight`")
        );
        assert!(!folder.exists(), "nothing is left behind");
        Ok(())
    }
}
