//! The loop on a toy task: resuming, falling back, stopping.

use super::{
    engine::tests as toy,
    inputs::Inputs,
    shards::Shards,
    sizes::Sizes,
    tasks::{Fingerprint, Publisher, TaskSpec},
    *,
};
use crate::{
    config::{self, MatrixOptimizer, Spike, Train},
    data,
    dist::launch,
    error::bail,
    nn::params::Params,
    report,
};
use serde_json::{Value, json};

/// Three matrices on random inputs; remembers the sum of its losses.
pub(super) struct ToyTask {
    params: Params,
    chain: Vec<toy::Toy>,
    total: f64,
    /// What happens in a step on this rank.
    pub(super) event: Option<(u64, Event)>,
}

pub(super) enum Event {
    Stop(Stop),
    NotFinite,
    /// From this step on.
    NeverFinite,
    /// From this step to that one the loss is far out.
    Spike(u64),
    /// From this step on the loss has another term, which makes it larger.
    NewTerm,
    Error,
    Panic,
    /// Holds a thread of its pool for ever.
    Hang,
}

impl ToyTask {
    pub(super) fn new(config: &Config) -> Self {
        let (params, chain) = toy::chain(config.seed, 3);
        Self { params, chain, total: 0.0, event: None }
    }
}

impl Task for ToyTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        Ok(Fingerprint::from([("vocabulary".into(), "abc".into())]))
    }

    fn parameter_groups(&self) -> Vec<Vec<String>> {
        toy::parameter_groups(&self.chain)
    }

    fn gradients(&mut self, step: u64, loss_scale: f64, shards: &mut Shards) -> Result<StepMetrics> {
        // Other inputs on every rank.
        let mut inputs = toy::inputs(step + 100 * shards.group().rank() as u64);
        let mut far = 1.0;
        let now = |(at, event): &&(u64, Event)| match event {
            Event::Spike(last) => (*at..=*last).contains(&step),
            Event::NeverFinite | Event::NewTerm => step >= *at,
            _ => *at == step,
        };
        match self.event.as_ref().filter(now) {
            Some((_, Event::Stop(stop))) => stop.request(),
            Some((_, Event::NotFinite | Event::NeverFinite)) => inputs = (inputs * f64::INFINITY)?,
            Some((_, Event::Spike(_) | Event::NewTerm)) => far = 1e5,
            Some((_, Event::Error)) => bail!("the disk is on fire"),
            Some((_, Event::Panic)) => panic!("on purpose"),
            Some((_, Event::Hang)) => {
                report::note("hangs now");
                rayon::scope(|_| {
                    loop {
                        std::thread::park();
                    }
                })
            }
            None => {}
        }
        self.chain.iter_mut().for_each(|toy| toy.loss_scale = loss_scale);
        let loss = engine::accumulate(&toy::segments(&self.chain), &inputs, 0, shards)? / loss_scale;
        let loss = shards.group().sum(&[loss])?[0];
        self.total += loss;
        Ok(StepMetrics { losses: vec![("loss", loss * far)], figures: Vec::new(), amount: 3, unit: "rows", flops: 6e9 })
    }

    fn loss_changes_at(&self, step: u64) -> bool {
        matches!(self.event, Some((at, Event::NewTerm)) if at == step)
    }

    fn validate(&mut self, _step: u64, batch: u64, shards: &mut Shards) -> Result<StepMetrics> {
        let loss = engine::loss(&toy::segments(&self.chain), &toy::inputs(batch), shards)?;
        Ok(StepMetrics { losses: vec![("loss", loss)], figures: Vec::new(), amount: 3, unit: "rows", flops: 6e9 })
    }

    fn samples(&self) -> Vec<String> {
        vec!["a row".into()]
    }

    fn state(&self) -> Value {
        json!({ "total": self.total })
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        self.total = state["total"].as_f64().unwrap();
        Ok(())
    }

    fn publisher(&self) -> Publisher {
        Box::new(|_, _| Ok(()))
    }
}

/// What a new task must write: no other file knows it.
#[derive(Debug)]
struct ToySpec;

impl TaskSpec for ToySpec {
    fn start(&self, config: &Config, _group: &Group) -> Result<Box<dyn Task>> {
        Ok(Box::new(ToyTask::new(config)))
    }

    fn sample_kind(&self, _config: &Config, _inputs: &Inputs) -> data::Kind {
        data::Kind::Images(4)
    }

    fn batch_sizes(&self, train: &Train) -> Vec<(&'static str, usize)> {
        vec![("train.batch_size", train.batch_size)]
    }

    fn parameter_groups(&self, config: &Config, _inputs: &Inputs) -> Result<Vec<Params>> {
        Ok(toy::segments(&toy::chain(config.seed, 3).1).iter().map(|segment| segment.params().clone()).collect())
    }
}

#[test]
fn a_new_task_is_planned_and_trained_through_its_spec() {
    let (folder, mut config) = (tempfile::tempdir().unwrap(), config());
    config.train.batch_size = 4;
    config.data.sources = vec![config::Source { path: "no/such".into(), weight: 1.0 }];
    let sizes = Sizes::of_task(&ToySpec, &config).unwrap();
    assert_eq!(sizes.parts(), [("parameters", 3 * 16)]);
    let shares = sizes.shares(&config, 2);
    assert_eq!((shares.total(), shares.all_muons), (48, 48));
    assert_eq!(held::held(&config, &sizes, &shares, 3).between_steps(), 4 * (32 + 32 + 32 + 32));
    let (plan, missing) = plan_without(&config, &sizes).unwrap();
    assert_eq!((plan.samples_a_step, plan.steps, missing), (4, 9, vec!["no/such".to_owned()]));
    assert!(sizes::check_ranks(&ToySpec, &config, 8).is_err());
    for ranks in [1, 2] {
        let parent = folder.path().join(ranks.to_string());
        let (resume, ranks) = (Resume::Auto, Ranks::Threads(ranks));
        super::launch(&parent, &ToySpec, &config, &resume, &ranks, &Stop::default(), false).unwrap();
        let metrics = std::fs::read_to_string(parent.join("runs/toy/metrics.jsonl")).unwrap();
        assert_eq!(metrics.lines().count(), 9);
        assert!(parent.join("runs/toy/checkpoints/step-9/manifest.json").exists());
    }
}

pub(super) fn config() -> Config {
    let train = Train {
        steps: 9,
        warmup_steps: 2,
        matrix_optimizer: MatrixOptimizer::Muon,
        checkpoint_every: 3,
        keep_checkpoints: 2,
        ..Train::default()
    };
    Config { name: "toy".into(), seed: 5, train, ..Config::default() }
}

/// One process' life: trains in `parent`, with a signal during step `stop_at`.
fn live(parent: &Path, config: &Config, resume: &Resume, stop_at: Option<u64>) -> Result<Vec<String>> {
    let stop = Stop::default();
    let mut task = ToyTask::new(config);
    task.event = stop_at.map(|at| (at, Event::Stop(stop.clone())));
    train(&Group::alone(), config, &mut task, RunFolder::open(parent, config, true)?, resume, &stop)?;
    let metrics = std::fs::read_to_string(parent.join("runs/toy/metrics.jsonl"))?;
    let key = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        format!("{} {} {}", line["step"], line["loss"], line["gradient_norm"])
    };
    Ok(metrics.lines().map(key).collect())
}

fn state_bytes(parent: &Path, step: u64) -> Vec<Vec<u8>> {
    let folder = parent.join(format!("runs/toy/checkpoints/step-{step}"));
    ["state.safetensors", "state.json"].map(|name| std::fs::read(folder.join(name)).unwrap()).to_vec()
}

#[test]
fn stopped_and_resumed_equals_uninterrupted_bit_by_bit() {
    let (whole, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = config();
    let expected = live(whole.path(), &config, &Resume::Auto, None).unwrap();
    assert_eq!(expected.len(), 9);
    for stop_at in [2, 3, 7] {
        let error = live(cut.path(), &config, &Resume::Auto, Some(stop_at)).unwrap_err();
        assert_eq!(crate::error::exit_of(&error), crate::error::Exit::Requeue, "{error:#}");
    }
    assert_eq!(live(cut.path(), &config, &Resume::Auto, None).unwrap(), expected);
    assert_eq!(state_bytes(whole.path(), 9), state_bytes(cut.path(), 9));
    // Nothing is left to do, and nothing changes.
    assert_eq!(live(cut.path(), &config, &Resume::Auto, None).unwrap(), expected);
}

#[test]
fn falls_back_over_damaged_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let config = config();
    let expected = live(folder.path(), &config, &Resume::Auto, None).unwrap();
    let good = state_bytes(folder.path(), 9);
    let at = |step: u64, file: &str| folder.path().join(format!("runs/toy/checkpoints/step-{step}/{file}"));
    assert!(!at(3, "").exists(), "only the two newest are kept");
    let damages: [&dyn Fn(); 5] = [
        &|| std::fs::remove_file(at(9, "state.json")).unwrap(),
        &|| std::fs::write(at(9, "state.safetensors"), &good[0][..good[0].len() - 1]).unwrap(),
        &|| std::fs::write(at(9, "manifest.json"), "{\"format\": 2}").unwrap(),
        &|| std::fs::copy(at(6, "state.safetensors"), at(9, "state.safetensors")).map(drop).unwrap(),
        &|| {
            let mut flipped = good[0].clone();
            let last = flipped.len() - 1;
            flipped[last] ^= 1;
            std::fs::write(at(9, "state.safetensors"), flipped).unwrap();
        },
    ];
    for damage in damages {
        damage();
        assert!(checkpoint::load(&Group::alone(), &folder.path().join("runs/toy/checkpoints/step-9")).is_err());
        assert_eq!(live(folder.path(), &config, &Resume::Auto, None).unwrap(), expected);
        assert_eq!(state_bytes(folder.path(), 9), good);
    }
    for step in [6, 9] {
        std::fs::write(at(step, "manifest.json"), "").unwrap();
    }
    let error = live(folder.path(), &config, &Resume::Auto, None).unwrap_err();
    assert!(error.to_string().contains("none of the 2 checkpoints"), "{error:#}");
}

#[test]
fn a_crash_between_any_two_writes_leaves_a_whole_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let config = config();
    let expected = live(folder.path(), &config, &Resume::Auto, None).unwrap();
    let good = state_bytes(folder.path(), 9);
    let checkpoints = folder.path().join("runs/toy/checkpoints");
    let (path, tmp) = (checkpoints.join("step-9"), checkpoints.join("step-9.tmp"));
    let files = ["state.safetensors", "state.json", "config.json", "manifest.json"];
    let bytes = files.map(|name| std::fs::read(path.join(name)).unwrap());
    // Before the rename: the number of complete files, and the bytes of the next one.
    for whole in 0..files.len() {
        for share in [0, 1, 2] {
            std::fs::remove_dir_all(&path).unwrap();
            std::fs::create_dir(&tmp).unwrap();
            for (name, bytes) in files.iter().zip(&bytes).take(whole) {
                std::fs::write(tmp.join(name), bytes).unwrap();
            }
            std::fs::write(tmp.join(files[whole]), &bytes[whole][..bytes[whole].len() * share / 2]).unwrap();
            let newest = checkpoint::newest(&Group::alone(), &checkpoints).unwrap().unwrap();
            assert_eq!(newest.state.step, 6, "{whole} files and {share} halves");
            assert_eq!(live(folder.path(), &config, &Resume::Auto, None).unwrap(), expected);
            assert_eq!(state_bytes(folder.path(), 9), good);
            assert!(!tmp.exists(), "what was half written is deleted");
        }
    }
}

#[test]
fn refuses_another_configuration_by_field() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    live(folder.path(), &config, &Resume::Never, None).unwrap();
    assert!(live(folder.path(), &config, &Resume::Never, None).is_err());
    config.train.checkpoint_every = 4;
    config.train.steps = 10;
    assert_eq!(live(folder.path(), &config, &Resume::Auto, None).unwrap().len(), 10);
    config.train.betas = [0.9, 0.99];
    let error = live(folder.path(), &config, &Resume::Auto, None).unwrap_err();
    assert!(error.to_string().contains("train.betas"), "{error:#}");
}

#[test]
fn goes_back_to_a_named_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let config = config();
    let expected = live(folder.path(), &config, &Resume::Auto, None).unwrap();
    let path = folder.path().join("runs/toy/checkpoints/step-6");
    let error = live(folder.path(), &config, &Resume::From(path), Some(7)).unwrap_err();
    assert!(error.to_string().contains("after step 7"), "{error:#}");
    assert!(folder.path().join("runs/toy/checkpoints/step-9.old").exists());
    assert_eq!(live(folder.path(), &config, &Resume::Auto, None).unwrap(), expected);
}

#[test]
fn one_process_a_run_folder() {
    let folder = tempfile::tempdir().unwrap();
    let held = RunFolder::open(folder.path(), &config(), true).unwrap();
    assert!(RunFolder::open(folder.path(), &config(), true).is_err());
    drop(held);
    assert!(RunFolder::open(folder.path(), &config(), true).is_ok());
}

/// The toy task for 80 steps, with a checkpoint every third.
fn spiky(spike: Spike) -> Config {
    let mut config = config();
    (config.train.steps, config.train.checkpoint_every, config.train.spike) = (80, 3, spike);
    config
}

/// A run in which these steps' samples make a spike; returns the steps whose samples were left out.
fn with_spikes(parent: &Path, config: &Config, from: u64, to: u64) -> Result<u64> {
    with_event(parent, config, (from, Event::Spike(to)))
}

fn with_event(parent: &Path, config: &Config, event: (u64, Event)) -> Result<u64> {
    let mut task = ToyTask::new(config);
    task.event = Some(event);
    train(&Group::alone(), config, &mut task, RunFolder::open(parent, config, true)?, &Resume::Auto, &Stop::default())?;
    let state = std::fs::read(parent.join("runs/toy/checkpoints/step-80/state.json"))?;
    let state: Value = serde_json::from_slice(&state)?;
    Ok(state["passed_over"].as_u64().unwrap())
}

#[test]
fn a_spike_is_skipped_or_taken_back_and_both_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let weights = |parent: &Path, step| state_bytes(parent, step).swap_remove(0);
    assert_eq!(with_spikes(&at("ignored"), &spiky(Spike::Ignore), 70, 70).unwrap(), 0);

    let mut skip = spiky(Spike::Skip);
    // The last step is the spike: nothing changes in it.
    (skip.train.checkpoint_every, skip.train.decay_start) = (79, 1.0);
    assert_eq!(with_spikes(&at("skipped"), &skip, 80, 80).unwrap(), 0);
    assert!(weights(&at("skipped"), 79) == weights(&at("skipped"), 80));
    let error = with_spikes(&at("endless"), &spiky(Spike::Skip), 66, 80).unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("step 75: its loss or gradient is a spike, the 10th in a row") && text.contains("a row"),
        "{text}"
    );

    // Back from step 71 to 69: the samples of 70 and 71 are left out.
    assert_eq!(with_spikes(&at("back"), &spiky(Spike::RollBack), 71, 71).unwrap(), 2);
    let metrics = std::fs::read_to_string(at("back").join("runs/toy/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 80, "each step stands there once");
    let error = with_spikes(&at("lost"), &spiky(Spike::RollBack), 71, 1000).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("a spike, the 6th") && text.contains("a row"), "{text}");
}

#[test]
fn a_term_that_begins_is_no_spike() {
    let folder = tempfile::tempdir().unwrap();
    for (name, spike) in [("skip", Spike::Skip), ("back", Spike::RollBack)] {
        let event = (66, Event::NewTerm);
        assert_eq!(with_event(&folder.path().join(name), &spiky(spike), event).unwrap(), 0, "{name}");
    }
    let tokenizer = config::ImageTokenizer {
        perceptual_weight: 1.0,
        perceptual_start: 5,
        adversarial_start: 3,
        ..Default::default()
    };
    assert_eq!((1..9).filter(|step| tokenizer.loss_changes_at(*step)).collect::<Vec<_>>(), [6]);
}

#[test]
fn norm_signals_and_checkpoints_take_one_exchange_a_step() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    (config.train.checkpoint_every, config.train.sample_every, config.train.clip_norm) = (100, 0, 0.01);
    for stage in 0..=3 {
        config.train.zero_stage = stage;
        let mut agreements = |steps| {
            config.train.steps = steps;
            let parent = folder.path().join(format!("{stage} {steps}"));
            launch(2, Duration::from_secs(60), |group| {
                let folder = RunFolder::open(&parent, &config, group.leads())?;
                train(group, &config, &mut ToyTask::new(&config), folder, &Resume::Auto, &Stop::default())?;
                Ok(group.agreements.load(std::sync::atomic::Ordering::Relaxed))
            })
            .unwrap()
        };
        let (few, more) = (agreements(3), agreements(8));
        // One more in each step: the task sums its losses.
        assert_eq!(more, few.iter().map(|few| few + 5 * 2).collect::<Vec<_>>(), "stage {stage}");
    }
}
