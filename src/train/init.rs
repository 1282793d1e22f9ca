//! A fresh run that starts from a model's weights instead of random ones: fine-tuning (paper §4).
//!
//! Only weights are taken over. Steps, learning rate, optimizer state and moving average begin anew.

use super::tasks::{Task, TaskSpec};
use crate::{
    bundle::{self, Bundle},
    config::{Config, values},
    error::{Context, Result, ensure, usage},
    tokenizer,
};

/// Sets the task's parameters to the weights of the model folder that `train.init_from` names, if any.
///
/// # Errors
/// There is no such model; its weights mean something else (heads; vocabulary or image tokenizer, unless mismatches are
/// allowed); a
/// parameter is missing, left over or of another shape. The parameters are then as they were.
pub fn take_weights(spec: &dyn TaskSpec, config: &Config, task: &dyn Task) -> Result<()> {
    let model = &config.train.init_from;
    if model.is_empty() {
        return Ok(());
    }
    let bundle = Bundle::open(model).context("train.init_from")?;
    let bundle = spec.initial_model(bundle).context("train.init_from")?;
    check_meaning(spec, config, task, &bundle)?;

    let weights = bundle.weights()?;
    let hint = format!("give the run the sizes in the config.toml of `{model}`, or leave train.init_from empty");
    let mismatch =
        |what: String| usage(format!("the weights of `{model}` (train.init_from) do not fit: {what}"), &hint);
    // A model folder holds neither the discriminator nor the statistics of an EMA codebook: both start anew.
    let anew = |name: &str| tokenizer::is_of_training(name) || spec.starts_anew(name, &bundle);
    let wanted = || task.params().iter().filter(|(name, _)| !anew(name));
    for (name, var) in wanted() {
        let Some(tensor) = weights.get(name) else { return Err(mismatch(format!("they lack `{name}`"))) };
        let (theirs, ours) = (tensor.dims(), var.dims());
        ensure!(theirs == ours, mismatch(format!("`{name}` is {theirs:?} there and {ours:?} here")));
    }
    let unknown = weights.keys().filter(|name| !task.params().contains_key(*name)).min();
    ensure!(unknown.is_none(), mismatch(format!("`{}` has no place here", unknown.map_or("", String::as_str))));
    for (name, var) in wanted() {
        var.set(&weights[name].to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}

/// Checks what the shapes of the weights do not show.
fn check_meaning(spec: &dyn TaskSpec, config: &Config, task: &dyn Task, bundle: &Bundle) -> Result<()> {
    let model = &config.train.init_from;
    let theirs = spec.fingerprint_of(config, bundle)?;
    let hint = format!(
        "take text.vocab and image_tokenizer.path from `{model}`, or leave train.init_from empty; if the other one is only \
        trained further, --allow-mismatch starts from the weights all the same"
    );
    for (name, ours) in &task.fingerprint()? {
        let what = format!("the model in train.init_from, `{model}`, was made with another {name}");
        let fits = theirs.get(name) == Some(ours);
        bundle::tolerate(if fits { Ok(()) } else { Err(usage(what, &hint)) })?;
    }
    for key in spec.meaning_keys(config) {
        let of = |config: &Config| -> Result<Option<toml::Value>> {
            Ok(values(config)?.into_iter().find(|(name, _)| name == *key).map(|(_, value)| value))
        };
        let (Some(theirs), Some(ours)) = (of(&bundle.config)?, of(config)?) else { continue };
        let what = format!("the model in train.init_from, `{model}`, has {key} = {theirs}, not {ours}");
        ensure!(theirs == ours, usage(what, format!("set {key} to the same value")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::AttentionKind,
        dist::{Group, Ranks},
        error::{Exit, exit_of},
        nn::params::Params,
        train::{Resume, Stop, prepare_task, run_below, task_tests::generator_config, tasks},
    };
    use std::{fs, path::Path};

    /// A model folder, and the configuration of a run that starts from it under another seed.
    fn model(folder: &Path) -> Config {
        let mut config = generator_config(folder);
        live(&folder.join("first"), &config).unwrap();
        config.seed += 1;
        config.train.init_from = folder.join("first/runs/generator/model").display().to_string();
        config
    }

    fn live(parent: &Path, config: &Config) -> crate::error::Result<()> {
        run_below(parent, config, &Resume::Auto, &Ranks::Threads(1), &Stop::default())
    }

    fn values(params: &Params) -> Vec<Vec<f32>> {
        params.values().map(|var| var.flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    #[test]
    fn a_fresh_run_starts_with_the_model_s_weights_and_a_resumed_one_with_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = model(folder.path());
        let (task, _) = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).unwrap();
        let stored = Bundle::open(&config.train.init_from).unwrap().weights().unwrap();
        for (name, var) in task.params() {
            let bits = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(var), bits(&stored[name]), "{name}");
        }

        let whole = folder.path().join("whole");
        config.train.decay_start = 1.0;
        live(&whole, &config).unwrap();
        let parts = folder.path().join("parts");
        live(&parts, &Config { train: crate::config::Train { steps: 2, ..config.train.clone() }, ..config.clone() })
            .unwrap();
        // Nothing is read from the model again: it may be gone by now.
        fs::remove_dir_all(&config.train.init_from).unwrap();
        live(&parts, &config).unwrap();
        let last =
            |parent: &Path| fs::read(parent.join("runs/generator/checkpoints/step-5/state.safetensors")).unwrap();
        assert!(last(&whole) == last(&parts), "a resumed run differs");
        let published = fs::read_to_string(whole.join("runs/generator/model/config.toml")).unwrap();
        assert!(!published.contains("first/runs"), "a path of this machine");
    }

    #[test]
    fn an_image_tokenizer_starts_from_the_one_inside_a_generator_s_folder() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Bundle::open("demo").unwrap().image_tokenizer_folder().unwrap().config;
        // Pixel losses only: the perceptual network is not available here.
        let settings = &mut config.image_tokenizer;
        (settings.image_size, settings.perceptual_weight, settings.adversarial_weight) = (8, 0.0, 0.0);
        config.data = generator_config(folder.path()).data;
        config.data.sources[0].path = folder.path().join("images").display().to_string();
        config.train.init_from = "demo".into();
        let (task, _) = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).unwrap();
        let stored = Bundle::open("demo").unwrap().image_tokenizer_folder().unwrap().weights().unwrap();
        let name = "decoder.conv_out.weight";
        let gap = (task.params()[name].as_tensor() - &stored[name]).unwrap().sqr().unwrap().sum_all().unwrap();
        assert_eq!(gap.to_scalar::<f32>().unwrap(), 0.0);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let config = model(folder.path());
        let refusal = |change: &dyn Fn(&mut Config)| {
            let mut config = config.clone();
            change(&mut config);
            let before = tasks::spec(config.task).start(&config, &Group::alone()).unwrap();
            let task = tasks::spec(config.task).start(&config, &Group::alone()).unwrap();
            assert!(take_weights(tasks::spec(config.task), &config, task.as_ref()).is_err());
            assert_eq!(values(before.params()), values(task.params()), "half taken over");
            let error =
                prepare_task(&folder.path().join("refused"), &config, &Resume::Auto, &Group::alone()).err().unwrap();
            assert_eq!(exit_of(&error), Exit::Usage);
            assert!(!folder.path().join("refused").exists());
            format!("{error:#}")
        };
        for (part, change) in [
            ("no model folder", &(|c: &mut Config| c.train.init_from = "no/such".into()) as &dyn Fn(&mut Config)),
            ("is an image tokenizer", &|c| c.train.init_from = c.image_tokenizer.path.clone()),
            ("another image tokenizer", &|c| c.train.init_from = "demo".into()),
            ("is [16] there and [32] here", &|c| c.model.hidden = 32),
            ("they lack `blocks.3.", &|c| c.model.layers = 4),
            ("`blocks.2.", &|c| c.model.layers = 2),
            ("model.heads = 2, not 4", &|c| c.model.heads = 4),
            ("model.attention = \"sparse\", not \"dense\"", &|c| c.model.attention = AttentionKind::Dense),
            ("model.conv_size = 3, not 5", &|c| c.model.conv_size = 5),
            ("model.row_extent = \"window\"", &|c| c.model.row_extent = crate::config::RowExtent::SameRow),
            ("model.conv_border = \"clip\"", &|c| c.model.conv_border = crate::config::ConvBorder::RasterWrap),
            ("_norm.", &|c| c.model.qk_norm = true),
            ("is [8, 16] there and [9, 16] here", &|c| c.text.max_tokens = 9),
            ("another vocabulary", &|c| {
                let vocab = fs::read_to_string(&c.text.vocab).unwrap();
                c.text.vocab += ".other";
                fs::write(&c.text.vocab, format!("{vocab}龘\n")).unwrap();
            }),
        ] {
            let message = refusal(change);
            assert!(message.contains(part), "{part}: {message}");
        }
    }
}
