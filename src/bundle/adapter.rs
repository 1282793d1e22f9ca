//! Low-rank adapters as folders: PEFT's adapter_config.json and adapter_model.safetensors, and base.json.
//!
//! base.json has a digest of the model that the adapter was trained for, its base: another model has weights that the
//! adapter was not made for. Folders that PEFT wrote have no such file.

use super::{
    ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ATTRIBUTION, Bundle, WEIGHTS, manifest, publish,
    write::write_weights,
};
use crate::{
    bounded_read,
    config::{Lora, LoraTarget},
    error::{Context, Hint, Result, ensure, failed, plain, usage},
    nn::{
        lora,
        weights::{self, Piece, Values},
    },
};
use candle_core::Tensor;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// What PEFT puts before the names of a model's modules.
const PREFIX: &str = "base_model.model.";
/// Version of base.json.
const FORMAT: u32 = 1;
const HINT: &str = "an adapter folder is what `vilg train` with lora.rank above 0 writes to runs/NAME/adapter";

/// The name of an adapter's folder in that of its training run.
pub const ADAPTER: &str = "adapter";

/// The keys of PEFT's configuration that change what an adapter computes.
#[derive(Debug, Deserialize)]
struct Stored {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    target_modules: Vec<LoraTarget>,
    /// All other keys by name.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// base.json: the model that an adapter was trained for.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Base {
    format: u32,
    /// The name in its configuration.
    name: String,
    /// [`Bundle::base_digest`].
    weights: String,
}

/// Keys of PEFT that must be off, as they are where they are absent; so must all that begin with `use_`.
const OFF: [&str; 6] =
    ["rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "target_parameters"];

/// An opened adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    folder: PathBuf,
    lora: Lora,
    /// `None` where PEFT itself wrote the folder.
    base: Option<Base>,
    /// A and B of each adapted layer, under the names of their parameters.
    tensors: HashMap<String, Tensor>,
}

impl Adapter {
    /// Opens the folder of an adapter, or of the training run that wrote it.
    ///
    /// # Errors
    /// There is no such folder, a file of it is missing or damaged, or it needs a variant of LoRA.
    pub fn open(folder: &Path) -> Result<Self> {
        let inside = folder.join(ADAPTER);
        let folder = if inside.is_dir() { inside } else { folder.to_owned() };
        ensure!(folder.is_dir(), usage(format_args!("there is no adapter folder {}", folder.display()), HINT));
        let path = folder.join(ADAPTER_CONFIG);
        ensure!(path.exists(), usage(format_args!("{} has no {ADAPTER_CONFIG}", folder.display()), HINT));
        let text = bounded_read::read(&path, bounded_read::TEXT)?;
        let stored: Stored =
            serde_json::from_slice(&text).map_err(plain).hint(format_args!("{} is damaged", path.display()), HINT)?;
        let lora = stored.checked().with_context(|| path.display().to_string())?;
        let base = Base::read(&folder.join(ADAPTER_BASE))?;
        let path = folder.join(ADAPTER_WEIGHTS);
        let origin = path.display().to_string();
        let renamed = |(name, tensor): (String, Tensor)| {
            let ours = name.strip_prefix(PREFIX).map(str::to_owned);
            Ok((ours.with_context(|| format!("{origin}: `{name}` does not begin with `{PREFIX}`"))?, tensor))
        };
        let tensors = weights::parse(&weights::map(&path)?, &origin)?.into_iter().map(renamed);
        Ok(Self { tensors: tensors.collect::<Result<_>>()?, folder, lora, base })
    }

    /// Checks that it was trained for a model with this digest, unless mismatches are allowed.
    fn check_base(&self, model: &str, digest: &str) -> Result<()> {
        let name = self.folder.display();
        let checked = match &self.base {
            Some(base) if base.weights == digest => Ok(()),
            Some(base) => Err(usage(
                format_args!("the adapter {name} was trained for another model than {model}: for `{}`", base.name),
                "give the model of train.init_from as --model; --allow-mismatch adapts this one all the same",
            )),
            None => Err(usage(
                format_args!("the adapter {name} does not say which model it was trained for"),
                "--allow-mismatch takes it for this one",
            )),
        };
        manifest::tolerate(checked).map(drop)
    }

    /// Checks that it holds A and B, of its rank and of the layer's size, for each target among these weights, and
    /// nothing else.
    fn check_shapes(&self, weights: &BTreeMap<String, Values>) -> Result<()> {
        let origin = self.folder.join(ADAPTER_WEIGHTS).display().to_string();
        let mut expected = 0;
        for (name, values) in weights {
            let Some(layer) = name.strip_suffix(".weight").filter(|layer| self.lora.adapts(layer)) else { continue };
            let [outputs, inputs] = values.shape[..] else { continue };
            let shapes = [[self.lora.rank, inputs], [outputs, self.lora.rank]];
            for (name, shape) in lora::names(layer).iter().zip(shapes) {
                let lacks = || format!("{origin} lacks `{PREFIX}{name}`");
                let tensor = self.tensors.get(name).hint(lacks(), HINT)?;
                let what = format!("{origin}: `{PREFIX}{name}` is {:?}, not {shape:?}", tensor.dims());
                ensure!(tensor.dims() == shape, failed(what, "the adapter is of another rank or another model"));
                expected += 1;
            }
        }
        let wanted = |name: &&String| {
            let layer = name.split(".lora_").next().unwrap_or_default();
            self.lora.adapts(layer) && weights.contains_key(&format!("{layer}.weight"))
        };
        let foreign = self.tensors.keys().filter(|name| !wanted(name)).min();
        let what = format!("{origin}: `{PREFIX}{}` has no place in the model", foreign.map_or("", String::as_str));
        ensure!(foreign.is_none() && expected == self.tensors.len(), failed(what, HINT));
        Ok(())
    }
}

impl Stored {
    fn checked(self) -> Result<Lora> {
        let ok = self.peft_type == "LORA";
        ensure!(ok, failed(format_args!("its peft_type is {}, not LORA", self.peft_type), HINT));
        let is_on = |(key, value): &(&String, &Value)| {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            !off && (key.starts_with("use_") || OFF.contains(&key.as_str()))
        };
        let variant = self.others.iter().find(is_on).map_or("", |(key, _)| key);
        ensure!(variant.is_empty(), failed(format_args!("it needs `{variant}`, which vilg does not have"), HINT));
        let bias = self.others.get("bias").and_then(Value::as_str).unwrap_or("none");
        ensure!(bias == "none", failed(format_args!("its bias is \"{bias}\", not \"none\""), HINT));
        let lora = Lora { rank: self.r, alpha: self.lora_alpha, targets: self.target_modules };
        let ok = (1..=4096).contains(&lora.rank) && lora.alpha.is_finite() && lora.alpha > 0.0;
        ensure!(ok, failed(format_args!("r = {}, lora_alpha = {} is no adapter", lora.rank, lora.alpha), HINT));
        Ok(lora)
    }
}

impl Base {
    fn read(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let name = path.display();
        let text = bounded_read::read(path, bounded_read::TEXT)?;
        let base: Self = serde_json::from_slice(&text).map_err(plain).hint(format_args!("{name} is damaged"), HINT)?;
        let what = format!("{name}: its format is {}, this program reads {FORMAT}", base.format);
        ensure!(base.format == FORMAT, failed(what, "use a newer version of vilg"));
        Ok(Some(base))
    }
}

impl Bundle {
    /// The digest of a generator's weights, which adapters belong to: blake3 of name, shape and f32 values of each
    /// tensor, in the order of names.
    ///
    /// # Errors
    /// The file of weights is damaged.
    pub fn base_digest(&self) -> Result<String> {
        digest(&weights::stored(&self.place.weights()?, &self.place.file(WEIGHTS), Dtype::F32)?)
    }

    /// The same model with a low-rank adapter merged into its weights; `folder` as in [`Adapter::open`].
    ///
    /// # Errors
    /// The adapter cannot be opened, or was trained for another model.
    pub fn with_adapter(self, folder: &Path) -> Result<Self> {
        let (task, name) = (self.config.task, self.place.name());
        let what = format!("{name} is {}; adapters are for generators of two-stage training", task.model());
        ensure!(task.has_adapters(), usage(what, "leave out --adapter"));
        let adapter = Adapter::open(folder)?;
        let bytes = self.place.weights()?;
        let stored = weights::stored(&bytes, &self.place.file(WEIGHTS), Dtype::F32)?;
        adapter.check_base(&name, &digest(&stored)?)?;
        adapter.check_shapes(&stored)?;
        drop(stored);
        Ok(Self { adapter: Some(adapter), ..self })
    }

    /// Digest of the bytes of the adapter's weights; `None`: there is no adapter.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn adapter_digest(&self) -> Result<Option<String>> {
        let digest = |adapter: &Adapter| -> Result<String> {
            Ok(blake3::hash(&weights::map(&adapter.folder.join(ADAPTER_WEIGHTS))?).to_hex().to_string())
        };
        self.adapter.as_ref().map(digest).transpose()
    }

    /// Where the adapter's training data came from and its licences.
    pub(super) fn adapter_attribution(&self) -> Option<String> {
        let path = self.adapter.as_ref()?.folder.join(ATTRIBUTION);
        bounded_read::read_text(&path, bounded_read::TEXT).ok()
    }

    /// Merges the adapter, if there is one, into all weights by name.
    pub(super) fn adapt(&self, weights: &mut HashMap<String, Tensor>) -> Result<()> {
        let Some(Adapter { lora, tensors, .. }) = &self.adapter else { return Ok(()) };
        weights.extend(tensors.clone());
        lora::merge_all(weights, lora.scale())
    }

    /// The same in weights to write.
    pub(super) fn adapt_stored(&self, weights: &mut BTreeMap<String, Values>) -> Result<()> {
        let Some(Adapter { lora, tensors, .. }) = &self.adapter else { return Ok(()) };
        for (name, values) in weights {
            let Some(layer) = name.strip_suffix(".weight").filter(|layer| lora.adapts(layer)) else { continue };
            let [a, b] = lora::names(layer);
            let (Some(a), Some(b)) = (tensors.get(&a), tensors.get(&b)) else { continue };
            let weight = Tensor::from_vec(values.floats()?, values.shape.as_slice(), a.device())?;
            let merged = lora::merge(&weight, a, b, lora.scale())?.flatten_all()?.to_vec1()?;
            values.pieces = vec![Piece::Floats(Cow::Owned(merged))];
        }
        Ok(())
    }
}

fn digest(weights: &BTreeMap<String, Values>) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    writeln!(hasher, "vilg base 1")?;
    for (name, values) in weights {
        writeln!(hasher, "{name} {:?}", values.shape)?;
        values.write(&mut hasher)?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Writes the folder of an adapter for the model with this name and digest; `weights` are A and B under the names of
/// their parameters. An older adapter in its place is replaced when the new one is complete.
///
/// # Errors
/// There is something else in its place, or it cannot be written.
pub fn write_adapter(
    folder: &Path,
    lora: &Lora,
    [name, digest]: [&str; 2],
    weights: BTreeMap<String, Values>,
    attribution: &str,
) -> Result<()> {
    let config = json!({
        "peft_type": "LORA", "base_model_name_or_path": name, "r": lora.rank, "lora_alpha": lora.alpha,
        "target_modules": lora.targets, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": false,
        "inference_mode": true,
    });
    let base = Base { format: FORMAT, name: name.to_owned(), weights: digest.to_owned() };
    let weights = weights.into_iter().map(|(name, values)| (format!("{PREFIX}{name}"), values)).collect();
    publish::folder(folder, false, |new| {
        fs::write(new.join(ADAPTER_CONFIG), serde_json::to_vec_pretty(&config)?)?;
        fs::write(new.join(ADAPTER_BASE), serde_json::to_vec_pretty(&base)?)?;
        if !attribution.is_empty() {
            fs::write(new.join(ATTRIBUTION), attribution)?;
        }
        write_weights(&new.join(ADAPTER_WEIGHTS), &weights)
    })
}

#[cfg(test)]
mod tests;
