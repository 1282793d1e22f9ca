//! VQGANs of taming-transformers, whose names are ours, and of LlamaGen (arXiv 2406.06525), which has others for the same
//! layers. The configuration is found by the shapes of the weights, against which a YAML beside them is checked.

use super::{Candidate, take};
use crate::{
    bounded_read,
    bundle::{Parts, write::write_as},
    config::{Config, ImageTokenizer, QuantizerKind, Task},
    error::{Context, Hint, Result, ensure, failed, plain, usage},
    nn::{checkpoint_file::CheckpointFile, params::Scope, weights},
    tokenizer,
};
use candle_core::Device;
use safetensors::Dtype;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Side of the published models' images.
const IMAGE_SIZE: usize = 256;
/// Bytes of a configuration; published ones have about 2 KB. The YAML parser's time grows with the square of this.
const MAX_YAML: u64 = 32 << 10;
/// What the names of a tokenizer's tensors begin with.
const PARTS: [&str; 5] = ["encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."];

/// Who published it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// taming-transformers, with a learned codebook.
    TamingVq,
    /// The same with a Gumbel quantiser.
    TamingGumbel,
    /// LlamaGen: codes are compared by cosine.
    LlamaGen,
}

impl Family {
    /// The name in the family's files of one of our tensors, in a tokenizer with this number of levels.
    pub(in crate::bundle) fn name(self, ours: &str, levels: usize) -> String {
        if self != Self::LlamaGen {
            return ours.to_owned();
        }
        let parts: Vec<&str> = ours.split('.').collect();
        let renamed = match parts[..] {
            ["encoder", "down", level, part, ..] => ["encoder.conv_blocks", level, part].map(str::to_owned),
            ["decoder", "up", level, part, ..] => {
                // In the order in which they run.
                let place = level.parse::<usize>().map_or(0, |level| levels.saturating_sub(level + 1));
                ["decoder.conv_blocks".to_owned(), place.to_string(), part.to_owned()]
            }
            [half, "mid", part, ..] => {
                let place = ["block_1", "attn_1", "block_2"].iter().position(|name| *name == part).unwrap_or(0);
                let rest = parts[3..].join(".");
                return format!("{half}.mid.{place}.{rest}");
            }
            _ => return ours.to_owned(),
        };
        let [half, level, part] = renamed;
        let part = if part == "block" { "res".to_owned() } else { part };
        format!("{half}.{level}.{part}.{}", parts[4..].join("."))
    }

    fn quantizer(self) -> QuantizerKind {
        if self == Self::TamingGumbel { QuantizerKind::Gumbel } else { QuantizerKind::Nearest }
    }
}

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

/// Writes the model folder of a VQGAN. `yaml` is the configuration that was published with it.
///
/// # Errors
/// A tensor is missing, left over or misshapen; the YAML says other sizes than the weights have; the quantiser is another.
pub fn vqgan(source: &Path, family: Family, yaml: Option<&Path>, folder: &Path, force: bool) -> Result<()> {
    let file = CheckpointFile::open(source)?;
    let yaml = yaml.map(|path| read_yaml(path).map(|yaml| (path, yaml))).transpose()?;
    let image_size = yaml.as_ref().map_or(IMAGE_SIZE, |(_, yaml)| yaml.model.params.ddconfig.resolution);
    let settings = settings(&file, family, image_size).hint(
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
    let levels = config.image_tokenizer.channel_multipliers.len();
    let known: BTreeSet<String> = wanted.keys().map(|name| family.name(name, levels)).collect();
    // LlamaGen counts there what was used.
    let extra = |name: &&str| PARTS.iter().any(|part| name.starts_with(part)) && *name != "quantize.codebook_used";
    let left = file.names().filter(extra).find(|name| !known.contains(*name));
    let hint = "a VQGAN of this kind has no such tensor";
    ensure!(left.is_none(), failed(format!("{} holds `{}`", source.display(), left.unwrap_or_default()), hint));
    let tensors = take(&file, source, &wanted, |name| vec![Candidate::new(family.name(name, levels))])?;
    let weights = tensors.into_iter().map(|(name, tensor)| Ok((name, weights::of_tensor(&tensor)?)));
    let weights = weights.collect::<Result<BTreeMap<_, _>>>()?;
    let attribution = String::new();
    let parts = Parts { config: &config, weights, vocab: None, attribution, image_tokenizer: None };
    write_as(folder, &parts, Dtype::F32, None, force)
}

/// The sizes of a tokenizer by the shapes of its weights.
fn settings(file: &CheckpointFile, family: Family, image_size: usize) -> Result<ImageTokenizer> {
    let size = |name: &str, dimension: usize| -> Result<usize> {
        let shape = file.shape(name).with_context(|| format!("it lacks `{name}`"))?;
        shape.get(dimension).copied().with_context(|| format!("`{name}` has shape {shape:?}"))
    };
    let there = |ours: String| family.name(&ours, 0);
    let channels = size("encoder.conv_in.weight", 0)?;
    let count = |ours: &dyn Fn(usize) -> String| (0..64).take_while(|i| file.shape(&there(ours(*i))).is_some()).count();
    let levels = count(&|level| format!("encoder.down.{level}.block.0.conv1.weight"));
    let width = |level| {
        let name = there(format!("encoder.down.{level}.block.0.conv1.weight"));
        size(&name, 0).map(|width| width / channels.max(1))
    };
    let attends = |level: &usize| file.shape(&there(format!("encoder.down.{level}.attn.0.norm.weight"))).is_some();
    ensure!(levels > 0, "it lacks `{}`", there("encoder.down.0.block.0.conv1.weight".to_owned()));
    let gumbel = file.shape("quantize.proj.weight").is_some();
    ensure!(gumbel == (family == Family::TamingGumbel), "its quantiser is of the other kind");
    let codebook = if gumbel { "quantize.embed.weight" } else { "quantize.embedding.weight" };
    Ok(ImageTokenizer {
        image_size,
        channels,
        channel_multipliers: (0..levels).map(width).collect::<Result<_>>()?,
        residual_blocks: count(&|block| format!("encoder.down.0.block.{block}.conv1.weight")),
        attention_sides: (0..levels).filter(attends).map(|level| image_size >> level).collect(),
        latent_channels: size("encoder.conv_out.weight", 0)?,
        quantizer: family.quantizer(),
        l2_normalize: family == Family::LlamaGen,
        codebook_size: size(codebook, 0)?,
        code_dim: size(codebook, 1)?,
        // taming's published ones were trained so.
        legacy_beta: family == Family::TamingVq,
        l1_weight: 1.0,
        l2_weight: 0.0,
        ..ImageTokenizer::default()
    })
}

fn read_yaml(path: &Path) -> Result<Yaml> {
    let name = path.display();
    let text = bounded_read::read_text(path, MAX_YAML)
        .map_err(|e| usage(format_args!("{e:#}"), "name the model.yaml of the checkpoint"))?;
    serde_yaml_ng::from_str(&text).map_err(plain).hint(
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
    use crate::bundle::{Bundle, Changes};
    use candle_core::Tensor;
    use std::{fs, path::PathBuf};

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
        vqgan(&golden(), Family::TamingVq, Some(&yaml), &folder, false)?;
        let open = |folder: &Path| Bundle::open(&folder.display().to_string());
        let model = open(&folder)?.image_tokenizer()?;
        let golden_file = CheckpointFile::open(&golden())?;
        let x = golden_file.tensor("golden.x")?.permute((0, 2, 3, 1))?.contiguous()?;
        let codes =
            |model: &tokenizer::ImageTokenizer| -> Result<Vec<u32>> { Ok(model.encode(&x)?.flatten_all()?.to_vec1()?) };
        let theirs: Vec<f32> = golden_file.tensor("golden.codes")?.flatten_all()?.to_vec1()?;
        assert_eq!(codes(&model)?, theirs.iter().map(|code| *code as u32).collect::<Vec<_>>());

        let (exported, again) = (place.path().join("b"), place.path().join("c"));
        open(&folder)?.export(&exported, Dtype::F32, &Changes::default(), false)?;
        vqgan(&exported, Family::TamingVq, Some(&yaml), &again, false)?;
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
        let import = |family| error(vqgan(&golden(), family, Some(&yaml), &folder, false));
        for (from, to, wrong) in [
            ("n_embed: 64", "n_embed: 65", "n_embed = [65], the weights have [64]"),
            ("ch_mult: [2, 1]", "ch_mult: [1, 2]", "ch_mult"),
            ("[8]", "[16]", "attn_resolutions"),
            ("num_res_blocks: 1", "num_res_blocks: 2", "num_res_blocks"),
            ("ddconfig", "other", "not a configuration of taming"),
        ] {
            fs::write(&yaml, YAML.replace(from, to))?;
            let message = import(Family::TamingVq);
            assert!(message.contains(wrong), "{message}");
        }
        // Nested without end, and longer than any published file.
        for (times, wrong) in [(30_000, "not a configuration of taming"), (400_000, "longer than")] {
            fs::write(&yaml, format!("model: {}", "[".repeat(times)))?;
            assert!(import(Family::TamingVq).contains(wrong));
        }
        fs::write(&yaml, YAML)?;
        assert!(import(Family::TamingGumbel).contains("other kind"));
        let lpips = golden().with_file_name("lpips.safetensors");
        assert!(
            error(vqgan(&lpips, Family::TamingVq, None, &folder, false)).contains("lacks `encoder.conv_in.weight`")
        );
        assert!(!folder.exists(), "nothing is left behind");
        Ok(())
    }

    /// The golden VQGAN under LlamaGen's names, which were read in its source: the same layers, so the same weights.
    #[test]
    fn llamagen_s_names_are_those_of_the_same_layers() -> Result<()> {
        let place = tempfile::tempdir()?;
        let file = CheckpointFile::open(&golden())?;
        let rename = |name: &str| {
            [
                ("encoder.down.0.block.", "encoder.conv_blocks.0.res."),
                ("encoder.down.1.block.", "encoder.conv_blocks.1.res."),
                ("encoder.down.1.attn.", "encoder.conv_blocks.1.attn."),
                ("encoder.down.0.downsample.", "encoder.conv_blocks.0.downsample."),
                ("decoder.up.0.block.", "decoder.conv_blocks.1.res."),
                ("decoder.up.1.block.", "decoder.conv_blocks.0.res."),
                ("decoder.up.1.attn.", "decoder.conv_blocks.0.attn."),
                ("decoder.up.1.upsample.", "decoder.conv_blocks.0.upsample."),
                (".mid.block_1.", ".mid.0."),
                (".mid.attn_1.", ".mid.1."),
                (".mid.block_2.", ".mid.2."),
            ]
            .iter()
            .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
        };
        let mut renamed = BTreeMap::new();
        for name in file.names().filter(|name| !name.starts_with("golden.")) {
            renamed.insert(rename(name), weights::of_tensor(&file.tensor(name)?)?);
        }
        let (source, folder) = (place.path().join("vq.safetensors"), place.path().join("a"));
        weights::write(&mut fs::File::create(&source)?, &renamed)?;
        vqgan(&source, Family::LlamaGen, None, &folder, false)?;
        let bundle = Bundle::open(&folder.display().to_string())?;
        let settings = &bundle.config.image_tokenizer;
        assert!(settings.l2_normalize && settings.channel_multipliers == [2, 1] && settings.attention_sides == [128]);
        for (name, tensor) in bundle.weights()? {
            let flat = |tensor: &Tensor| tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>());
            assert_eq!(flat(&tensor)?, flat(&file.tensor(&name)?)?, "{name}");
        }
        assert!(
            error(vqgan(&golden(), Family::LlamaGen, None, &folder, false)).contains("lacks `encoder.conv_blocks.0")
        );
        Ok(())
    }
}
