//! Low-rank adapters: the base stays as it is, ranks and stages agree, a resumed run equals an uninterrupted one, and an
//! adapter fits its base only.

use super::{
    optimizer::{self, GradientScale, Optimizer},
    ranks_tests::{distance, metrics, whole},
    shards::Shards,
    task_tests::{generator_config, lives},
    *,
};
use crate::{
    bundle::{Bundle, Changes},
    config::{Lora, Train},
    error::{Exit, exit_of, hint_of},
    nn::{lora, params::Params},
    ops::Store,
};
use safetensors::Dtype;
use std::{collections::BTreeMap, fs};

/// A trained model, and the configuration of a run that adapts it.
fn adapted(folder: &Path) -> Config {
    let mut config = generator_config(folder);
    (config.train.steps, config.train.sample_every) = (1, 0);
    live(&folder.join("base"), &config, 1).unwrap();
    config.seed += 1;
    config.train.init_from = folder.join("base/runs/generator/model").display().to_string();
    config.lora = Lora { rank: 2, alpha: 3.0, ..Lora::default() };
    config.train = Train { steps: 5, learning_rate: 1e-2, sample_every: 5, ..config.train };
    config
}

fn live(parent: &Path, config: &Config, ranks: usize) -> Result<()> {
    run_below(parent, config, &Resume::Auto, &Ranks::Threads(ranks), &Stop::default())
}

fn bits(params: &Params, base: bool) -> BTreeMap<String, Vec<u32>> {
    let of = params.iter().filter(|(_, param)| param.attributes.base == base);
    let bits =
        |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits);
    of.map(|(name, param)| (name.clone(), bits(param).collect())).collect()
}

#[test]
fn training_changes_all_adapters_and_no_bit_of_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let config = adapted(folder.path());
    let group = Group::alone();
    let (mut task, _folder) = prepare_task(folder.path(), &config, &Resume::Auto, &group).unwrap();
    let (params, groups) = (task.params().clone(), task.parameter_groups());
    let handling = |name: &str, attributes| optimizer::handling(&config.train, false, name, attributes);
    let mut shards = Shards::new(&group, 0, Store::Memory, &params, &groups, handling, |_| Ok(None)).unwrap();
    let mut optimizer = Optimizer::new(&shards, &config.train).unwrap();
    assert!(optimizer.moments.keys().all(|name| lora::is_adapter(name)));
    let before = [true, false].map(|base| bits(&params, base));
    // Four layers of three blocks.
    assert_eq!(before[1].len(), 2 * 4 * 3);
    let stored = Bundle::open(&config.train.init_from).unwrap().weights().unwrap();
    assert_eq!(stored.len(), before[0].len());
    for step in 1..=3 {
        shards.begin(step);
        task.gradients(step, 1.0, &mut shards).unwrap();
        shards.finish().unwrap();
        assert!(shards.reduced().iter().all(|(name, _)| lora::is_adapter(name)), "gradients of the base are kept");
        optimizer.step(&mut shards, &config.train, step, 1.0, GradientScale::new(1.0, 0.0, 1.0)).unwrap();
        shards.refresh().unwrap();
    }
    let after = [true, false].map(|base| bits(&params, base));
    assert!(before[0] == after[0], "the base changed");
    for (name, before) in &before[1] {
        assert!(after[1][name] != *before, "{name} learned nothing");
    }
}

#[test]
fn the_first_step_has_the_losses_of_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = adapted(folder.path());
    (config.train.steps, config.train.sample_every) = (1, 0);
    let first = |config: &Config, name: &str| {
        live(&folder.path().join(name), config, 1).unwrap();
        let text = fs::read_to_string(folder.path().join(name).join("runs/generator/metrics.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        ["image", "text"].map(|name| line[name].as_f64().unwrap().to_bits())
    };
    let with = first(&config, "with");
    assert_eq!(with, first(&Config { lora: Lora::default(), ..config }, "without"));
}

#[test]
fn ranks_and_stages_train_the_same_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = adapted(folder.path());
    (config.train.batch_size, config.train.caption_batch_size) = (5, 4);
    config.train.activation_checkpointing = 2;
    let mut run = |ranks: usize, stage: u8| {
        config.train.zero_stage = stage;
        let parent = folder.path().join(format!("{ranks}-{stage}"));
        live(&parent, &config, ranks).unwrap();
        let run = parent.join("runs/generator");
        assert!(run.join("samples/step-0000005.png").exists());
        assert!(run.join("adapter/adapter_model.safetensors").exists() && !run.join("model").exists());
        (metrics(&run).unwrap(), whole(&run.join("checkpoints/step-5")))
    };
    let alone = run(1, 0);
    // Weights, two moments and the average of each matrix.
    assert_eq!(alone.1.len(), 4 * 2 * 4 * 3);
    assert!(alone.1.keys().all(|name| lora::is_adapter(name)), "the base is in a checkpoint");
    assert_eq!(alone.1, run(1, 3).1);
    for stage in 0..=3 {
        let (metrics, state) = run(2, stage);
        let distance = distance(&alone.0, &metrics);
        assert!(distance < 1e-6, "stage {stage}: {distance:e}");
        assert!(state.keys().eq(alone.1.keys()), "stage {stage}");
    }
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_and_needs_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = adapted(folder.path());
    config.train.decay_start = 1.0;
    let parts = folder.path().join("parts");
    assert!(lives(&folder.path().join("whole"), &config, &[]) == lives(&parts, &config, &[1, 3]), "they differ");
    // Another model in the base's place.
    let mut other = generator_config(folder.path());
    (other.seed, other.train.steps, other.train.sample_every) = (77, 1, 0);
    live(&folder.path().join("other"), &other, 1).unwrap();
    let base = folder.path().join("base/runs/generator/model");
    fs::remove_dir_all(&base).unwrap();
    fs::rename(folder.path().join("other/runs/generator/model"), &base).unwrap();
    config.train.steps = 6;
    let error = live(&parts, &config, 1).unwrap_err();
    assert!(format!("{error:#}").contains("was made with another base model"), "{error:#}");
}

#[test]
fn an_adapter_at_inference_is_the_merged_export_and_fits_its_base_only() {
    let folder = tempfile::tempdir().unwrap();
    let config = adapted(folder.path());
    live(folder.path(), &config, 1).unwrap();
    let run = folder.path().join("runs/generator");
    let open = |base: &str| Bundle::open(base).unwrap();
    let with = open(&config.train.init_from).with_adapter(&run).unwrap();
    let merged = folder.path().join("merged");
    with.export(&merged, Dtype::F32, &Changes::default(), false).unwrap();
    let merged = open(merged.to_str().unwrap());
    let weights = |bundle: &Bundle| -> BTreeMap<String, Vec<f32>> {
        let values = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        bundle.weights().unwrap().into_iter().map(|(name, tensor)| (name, values(tensor))).collect()
    };
    assert!(weights(&with) == weights(&merged));
    let base = weights(&open(&config.train.init_from));
    for (name, values) in weights(&merged) {
        let adapts = config.lora.adapts(name.strip_suffix(".weight").unwrap_or_default());
        assert_eq!(values != base[&name], adapts, "{name}");
    }
    with.generator().unwrap();
    merged.generator().unwrap();

    // The merged model is another base, and a run of an adapter is no model.
    let error = merged.with_adapter(&run).unwrap_err();
    assert!(format!("{error:#}").contains("was trained for another model"), "{error:#}");
    assert_eq!(exit_of(&error), Exit::Usage);
    let error = Bundle::open(run.to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("trained an adapter") && hint_of(&error).is_some(), "{error:#}");
    let error = open(&config.train.init_from).with_adapter(&folder.path().join("codes")).unwrap_err();
    assert!(error.to_string().contains("has no adapter_config.json"), "{error:#}");
    let tokenizer = Bundle::open(&config.image_tokenizer.path).unwrap();
    assert_eq!(exit_of(&tokenizer.with_adapter(&run).unwrap_err()), Exit::Usage);
}

#[test]
fn damaged_adapters_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = adapted(folder.path());
    live(folder.path(), &config, 1).unwrap();
    let adapter = folder.path().join("runs/generator/adapter");
    let file = adapter.join("adapter_model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    type Tensors = std::collections::HashMap<String, candle_core::Tensor>;
    let refusal = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &file).unwrap();
        format!("{:#}", Bundle::open(&config.train.init_from).unwrap().with_adapter(&adapter).unwrap_err())
    };
    let name = "base_model.model.blocks.1.mlp.fc1.lora_A.weight";
    for (what, change) in [
        (
            "lacks `base_model.model.blocks.1.mlp.fc1.lora_A.weight`",
            &(|t: &mut Tensors| drop(t.remove(name))) as &dyn Fn(&mut Tensors),
        ),
        ("holds numbers that are not finite", &|t| drop(t.insert(name.into(), (&t[name] * f64::NAN).unwrap()))),
        ("is [1, 16], not [2, 16]", &|t| drop(t.insert(name.into(), t[name].narrow(0, 0, 1).unwrap()))),
        ("does not begin with `base_model.model.`", &|t| drop(t.insert("x".into(), t[name].clone()))),
        ("`base_model.model.blocks.9.mlp.fc1.lora_A.weight` has no place", &|t| {
            t.insert(name.replace(".1.", ".9."), t[name].clone());
        }),
    ] {
        let message = refusal(change);
        assert!(message.contains(what), "{what}: {message}");
    }
    candle_core::safetensors::save(&tensors, &file).unwrap();
    Bundle::open(&config.train.init_from).unwrap().with_adapter(&adapter).unwrap();
    let text = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    fs::write(adapter.join("adapter_config.json"), text.replace("\"r\": 2", "\"r\": 3")).unwrap();
    let message = refusal(&|_| {});
    assert!(message.contains("is [2, 16], not [3, 16]"), "{message}");
}
