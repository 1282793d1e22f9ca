//! DALL-E's dVAE. It was published as two pickled modules, whose classes a reader would have to run: what is read here are
//! their state dicts.

use super::{Candidate, take};
use crate::{
    bundle::{Parts, write::write_as},
    config::{Architecture, Config, ImageTokenizer, QuantizerKind, Task},
    error::{Context, Hint, Result, ensure, failed},
    nn::{checkpoint_file::CheckpointFile, params::Scope, weights},
    tokenizer,
};
use candle_core::Device;
use safetensors::Dtype;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const HINT: &str = "put encoder.pt and decoder.pt into a folder: torch.save(torch.load(\"encoder.pkl\").state_dict(), \"encoder.pt\"), \
    or one file with the prefixes encoder. and decoder.";

/// Writes the model folder of a dVAE. `source` is a folder with a file for the encoder and one for the decoder, or a file
/// with both.
///
/// # Errors
/// A tensor is missing, left over or misshapen.
pub fn dvae(source: &Path, folder: &Path, force: bool) -> Result<()> {
    let files = files(source)?;
    let shape = |name: &str| {
        let found = files.iter().find_map(|(prefix, file)| file.shape(name.strip_prefix(prefix)?));
        found.with_context(|| format!("it lacks `{name}`"))
    };
    let settings = settings(shape).hint(format!("{} is not DALL-E's dVAE", source.display()), HINT)?;
    let name = folder.file_name().map_or("dvae".to_owned(), |name| name.to_string_lossy().into_owned());
    let config = Config { name, task: Task::ImageTokenizer, image_tokenizer: settings, ..Config::default() };
    config.validate().with_context(|| format!("{}: its sizes", source.display()))?;
    let scope = Scope::empty_from_seed(0, &Device::Cpu);
    tokenizer::ImageTokenizer::new(&scope, &config.image_tokenizer)?;
    let mut all = BTreeMap::new();
    for (prefix, file) in &files {
        let mut wanted = scope.params();
        wanted.retain(|name, _| name.starts_with(prefix));
        let extra = |name: &String| {
            ["encoder.", "decoder."].iter().any(|half| name.starts_with(half)) && !wanted.contains_key(name)
        };
        let left = file.names().map(|theirs| format!("{prefix}{theirs}")).find(extra);
        let what = || format!("{} holds `{}`", source.display(), left.as_deref().unwrap_or_default());
        ensure!(left.is_none(), failed(what(), "a dVAE of these sizes has no such tensor"));
        let there = |name: &str| vec![Candidate::new(name.strip_prefix(prefix).unwrap_or(name).to_owned())];
        for (name, tensor) in take(file, source, &wanted, there)? {
            all.insert(name, weights::of_tensor(&tensor)?);
        }
    }
    let attribution = String::new();
    let parts = Parts { config: &config, weights: all, vocab: None, attribution, image_tokenizer: None };
    write_as(folder, &parts, Dtype::F32, None, force)
}

/// What the names in each file lack in front.
fn files(source: &Path) -> Result<Vec<(&'static str, CheckpointFile)>> {
    if !source.is_dir() {
        return Ok(vec![("", CheckpointFile::open(source)?)]);
    }
    let named = |stem: &str| -> Result<PathBuf> {
        let paths =
            fs::read_dir(source)?.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()?;
        let found = paths.into_iter().find(|path| path.file_stem().is_some_and(|name| name == stem));
        found.hint(format!("{} has no file `{stem}`", source.display()), HINT)
    };
    if named("encoder").is_err() {
        return Ok(vec![("", CheckpointFile::open(source)?)]);
    }
    let open = |stem| CheckpointFile::open(&named(stem)?);
    Ok(vec![("encoder.", open("encoder")?), ("decoder.", open("decoder")?)])
}

/// The sizes of a dVAE by the shapes of its weights.
fn settings<'a>(shape: impl Fn(&str) -> Result<&'a [usize]>) -> Result<ImageTokenizer> {
    let size = |name: &str, dimension: usize| -> Result<usize> {
        let shape = shape(name)?;
        shape.get(dimension).copied().with_context(|| format!("`{name}` has shape {shape:?}"))
    };
    let channels = size("encoder.blocks.input.w", 0)?;
    let block = |group: usize, block: usize| format!("encoder.blocks.group_{group}.block_{block}.res_path.conv_4.w");
    let levels = (1..64).take_while(|group| shape(&block(*group, 1)).is_ok()).count();
    let width = |level: usize| size(&block(level + 1, 1), 0).map(|width| width / channels.max(1));
    Ok(ImageTokenizer {
        architecture: Architecture::Dvae,
        quantizer: QuantizerKind::Gumbel,
        image_size: 256,
        channels,
        channel_multipliers: (0..levels).map(width).collect::<Result<_>>()?,
        residual_blocks: (1..64).take_while(|i| shape(&block(1, *i)).is_ok()).count(),
        attention_sides: Vec::new(),
        codebook_size: size("encoder.blocks.output.conv.w", 0)?,
        code_dim: size("decoder.blocks.input.w", 0)?,
        l1_weight: 0.0,
        l2_weight: 0.0,
        ..ImageTokenizer::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;

    #[test]
    fn one_file_or_two_are_the_same_tokenizer() -> Result<()> {
        let place = tempfile::tempdir()?;
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dalle_dvae.safetensors");
        let (whole, two) = (place.path().join("whole"), place.path().join("two"));
        dvae(&golden, &whole, false)?;
        let (file, halves) = (CheckpointFile::open(&golden)?, place.path().join("halves"));
        fs::create_dir(&halves)?;
        for half in ["encoder", "decoder"] {
            let ours = file.names().filter_map(|name| Some((name, name.strip_prefix(half)?.strip_prefix('.')?)));
            let values = ours.map(|(name, short)| Ok((short.to_owned(), weights::of_tensor(&file.tensor(name)?)?)));
            let values = values.collect::<Result<BTreeMap<_, _>>>()?;
            weights::write(&mut fs::File::create(halves.join(format!("{half}.safetensors")))?, &values)?;
        }
        dvae(&halves, &two, false)?;
        let open = |folder: &Path| Bundle::open(&folder.display().to_string());
        assert_eq!(open(&whole)?.digest()?, open(&two)?.digest()?.as_str());
        let settings = open(&whole)?.config.image_tokenizer;
        assert_eq!((settings.channels, settings.channel_multipliers.as_slice()), (8, &[1, 2, 4, 8][..]));
        assert_eq!((settings.residual_blocks, settings.codebook_size, settings.code_dim), (1, 32, 12));
        let lpips = golden.with_file_name("lpips.safetensors");
        assert!(format!("{:#}", dvae(&lpips, &two, false).unwrap_err()).contains("lacks `encoder.blocks.input.w`"));
        Ok(())
    }
}
