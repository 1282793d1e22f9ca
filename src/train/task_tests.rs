//! Both tasks on tiny data: stopped and resumed ≡ uninterrupted, parts of a step ≡ the whole step.

use super::{
    shards::{Handling, Shards},
    tasks::{GeneratorTask, ImageTokenizerTask},
    *,
};
use crate::{
    bundle::Bundle,
    config::{self, MatrixOptimizer, Model, Source, Text},
    data::{CODES_FILE, CodesInfo, npy},
    nn::{
        gradients,
        params::{Attributes, Param},
    },
    ops::Store,
    random::Random,
    tokenizer,
};
use candle_core::Tensor;
use serde_json::Value;
use std::{collections::BTreeMap, fs};

/// What differs between two runs with the same results.
pub(super) const TIMING: [&str; 7] =
    ["time", "seconds", "per_second", "tflops", "data_wait", "communication_wait", "peak_memory_bytes"];

const CAPTIONS: [&str; 4] = ["红苹果", "一轮弯月，扁平风格", "小狗", "消防车与小狗"];

/// What the images are and whether they are red: answers to two questions about each.
pub(super) const ANSWERS: [[&str; 2]; 4] = [["苹果", "是"], ["弯月", "不"], ["小狗", "不"], ["消防车", "是"]];

/// Ten noisy images with captions.
fn images(folder: &Path) -> Source {
    fs::create_dir_all(folder).unwrap();
    for i in 0..10 {
        let mut random = Random::keyed(1, "picture", i, 0);
        let image = image::RgbImage::from_fn(8, 8, |_, _| image::Rgb(std::array::from_fn(|_| random.bits() as u8)));
        image.save(folder.join(format!("{i}.png"))).unwrap();
        fs::write(folder.join(format!("{i}.txt")), CAPTIONS[i as usize % 4]).unwrap();
    }
    fs::write(folder.join("ATTRIBUTION.md"), "Drawn by chance.\n").unwrap();
    Source { path: folder.display().to_string(), weight: 1.0 }
}

pub(super) fn tokenizer_config(folder: &Path) -> Config {
    Config {
        name: "tokenizer".into(),
        task: config::Task::ImageTokenizer,
        seed: 3,
        data: config::Data { sources: vec![images(&folder.join("images"))], ..Default::default() },
        image_tokenizer: config::ImageTokenizer {
            image_size: 8,
            channels: 32,
            channel_multipliers: vec![1, 1],
            residual_blocks: 1,
            attention_sides: vec![4],
            latent_channels: 8,
            codebook_size: 12,
            code_dim: 4,
            l2_normalize: true,
            l1_weight: 1.0,
            restart_after: 2,
            channel_permutation: 0.5,
            ..Default::default()
        },
        train: config::Train {
            steps: 5,
            batch_size: 3,
            accumulation: 2,
            warmup_steps: 1,
            checkpoint_every: 2,
            sample_every: 5,
            rank_timeout: 60,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// A shard of ten samples with codes of the tokenizer in `model`.
fn codes(folder: &Path, model: &Path) -> Source {
    fs::create_dir_all(folder).unwrap();
    let mut shard = tar::Builder::new(fs::File::create(folder.join("00000.tar")).unwrap());
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        shard.append_data(&mut header, name, bytes).unwrap();
    };
    for i in 0..10 {
        let mut random = Random::keyed(2, "codes", i, 0);
        let codes: Vec<u16> = (0..16).map(|_| random.below(12) as u16).collect();
        add(format!("{i}.npy"), &npy([4, 4], &codes));
        add(format!("{i}.txt"), CAPTIONS[i as usize % 4].as_bytes());
        let [what, red] = ANSWERS[i as usize % 4];
        let questions = serde_json::json!([
            { "question": "这是什么？", "answer": what, "type": "thing" },
            { "question": "它是红的吗？", "answer": red, "type": "colour" },
        ]);
        add(format!("{i}.json"), serde_json::json!({ "questions": questions }).to_string().as_bytes());
    }
    shard.finish().unwrap();
    let tokenizer = Bundle::open(model.to_str().unwrap()).unwrap().digest().unwrap();
    let info = CodesInfo { tokenizer, grid: [4, 4], codebook_size: 12 };
    fs::write(folder.join(CODES_FILE), serde_json::to_vec(&info).unwrap()).unwrap();
    Source { path: folder.display().to_string(), weight: 1.0 }
}

/// A generator's configuration over a tokenizer that was not trained at all.
pub(crate) fn generator_config(folder: &Path) -> Config {
    let tokenizer = tokenizer_config(folder);
    let task = ImageTokenizerTask::new(&tokenizer, &Group::alone()).unwrap();
    let model = folder.join("tokenizer-model");
    task.publisher()(crate::nn::weights::of_params(task.params()).unwrap(), &model).unwrap();
    let vocab = folder.join("vocab.txt");
    let texts = CAPTIONS.into_iter().chain(ANSWERS.into_iter().flatten()).chain(["这是什么？", "它是红的吗？"]);
    fs::write(&vocab, crate::text::train(texts, 40).unwrap()).unwrap();
    Config {
        name: "generator".into(),
        task: config::Task::Generator,
        seed: 4,
        data: config::Data { sources: vec![codes(&folder.join("codes"), &model)], ..Default::default() },
        text: Text { vocab: vocab.display().to_string(), max_tokens: 8, ..Default::default() },
        image_tokenizer: config::ImageTokenizer { path: model.display().to_string(), ..tokenizer.image_tokenizer },
        model: Model { layers: 3, hidden: 16, heads: 2, conv_size: 3, ..Default::default() },
        train: config::Train {
            caption_batch_size: 4,
            condition_dropout: 0.3,
            text_loss_weight: 0.5,
            matrix_optimizer: MatrixOptimizer::Muon,
            ..tokenizer.train
        },
        sample: config::Sample { prompts: vec!["红苹果".into(), "小狗".into()], ..Default::default() },
        ..Default::default()
    }
}

/// Trains on one rank from the newest checkpoint on.
fn live(parent: &Path, config: &Config) -> Result<()> {
    run_below(parent, config, &Resume::Auto, &Ranks::Threads(1), &Stop::default())
}

/// Trains to the end with a stop after each step of `stops`; gives metrics and the last checkpoint.
pub(super) fn lives(parent: &Path, config: &Config, stops: &[u64]) -> (Vec<Value>, Vec<u8>, Vec<u8>) {
    fs::create_dir_all(parent).unwrap();
    for stop_at in stops.iter().map(Some).chain([None]) {
        let mut config = config.clone();
        if let Some(stop_at) = stop_at {
            // Ending at a smaller `steps` would bend the schedule: decay_start keeps it flat.
            config.train.steps = *stop_at;
        }
        live(parent, &config).unwrap();
    }
    let run = parent.join("runs").join(&config.name);
    let last = run.join(format!("checkpoints/step-{}", config.train.steps));
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        for timing in TIMING {
            line.as_object_mut().unwrap().remove(timing);
        }
        line
    };
    let read = |name: &str| fs::read(last.join(name)).unwrap();
    (metrics.lines().map(line).collect(), read("state.safetensors"), read("state.json"))
}

pub(super) fn resumes_bit_by_bit(mut config: Config, folder: &Path) {
    config.train.decay_start = 1.0;
    let whole = lives(&folder.join("whole"), &config, &[]);
    let again = lives(&folder.join("again"), &config, &[]);
    let parts = lives(&folder.join("parts"), &config, &[1, 3]);
    assert_eq!(whole.0.len(), 5);
    assert!(whole == again, "two runs with one seed differ: {:#?} {:#?}", whole.0, again.0);
    assert!(whole == parts, "a resumed run differs: {:#?} {:#?}", whole.0, parts.0);
    let other = lives(&folder.join("other"), &Config { seed: config.seed + 1, ..config }, &[]);
    assert!(whole.1 != other.1, "the seed changes nothing");
}

#[test]
fn the_image_tokenizer_resumes_bit_by_bit() {
    let folder = tempfile::tempdir().unwrap();
    resumes_bit_by_bit(tokenizer_config(folder.path()), folder.path());
    let run = folder.path().join("whole/runs/tokenizer");
    let sheet = image::open(run.join("samples/step-0000005.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (8 * 8 + 7 * 4, 4 * 8 + 3 * 4));
    let model = Bundle::open(run.join("model").to_str().unwrap()).unwrap();
    assert_eq!(model.attribution(), "Drawn by chance.\n");
    assert_eq!(model.image_tokenizer().unwrap().grid(), (4, 4));
}

/// The same with a discriminator that joins on the way.
pub(super) fn adversarial_config(folder: &Path) -> Config {
    let mut config = tokenizer_config(folder);
    let tokenizer = &mut config.image_tokenizer;
    (tokenizer.adversarial_weight, tokenizer.adversarial_start, tokenizer.lecam_weight) = (0.5, 1, 0.1);
    (tokenizer.discriminator_channels, tokenizer.discriminator_layers) = (4, 1);
    tokenizer.discriminator_ceiling = 0.6;
    config
}

#[test]
fn an_adversary_resumes_bit_by_bit_and_is_no_part_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let config = adversarial_config(folder.path());
    resumes_bit_by_bit(config, folder.path());
    let run = folder.path().join("whole/runs/tokenizer");
    let model = Bundle::open(run.join("model").to_str().unwrap()).unwrap();
    model.image_tokenizer().unwrap();
    assert!(model.weights().unwrap().keys().all(|name| !name.starts_with("discriminator.")));
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let told: Vec<bool> = metrics.lines().map(|line| line.contains("discriminator_accuracy")).collect();
    assert_eq!(told, [false, true, true, true, true]);
}

/// What a run of 5 steps on two ranks publishes, and how far each parameter of it went.
pub(super) fn ways(parent: &Path, config: &Config, task: &dyn Task) -> BTreeMap<String, f32> {
    fs::create_dir_all(parent).unwrap();
    let config = &Config { train: config::Train { batch_size: 4, ..config.train.clone() }, ..config.clone() };
    run_below(parent, config, &Resume::Auto, &Ranks::Threads(2), &Stop::default()).unwrap();
    let model = parent.join("runs").join(&config.name).join("model");
    let trained = Bundle::open(model.to_str().unwrap()).unwrap().weights().unwrap();
    let way = |(name, fresh): (&String, &Param)| {
        let way = (trained.get(name)? - fresh.as_tensor()).unwrap().abs().unwrap().max_all().unwrap();
        Some((name.clone(), way.to_scalar().unwrap()))
    };
    task.params().iter().filter_map(way).collect()
}

#[test]
fn what_is_frozen_stays_and_the_rest_trains() {
    let folder = tempfile::tempdir().unwrap();
    let check = |name: &str, make: fn(&Path) -> Config, freeze: &[&str], stage: u8| {
        let folder = folder.path().join(name);
        let mut config = make(&folder);
        config.train.freeze = freeze.iter().map(|part| part.to_string()).collect();
        (config.train.ema_decay, config.train.zero_stage, config.train.activation_checkpointing) = (0.0, stage, 1);
        let group = Group::alone();
        let task = tasks::spec(config.task).start(&config, &group).unwrap();
        let ways = ways(&folder, &config, task.as_ref());
        assert_eq!(ways.len(), task.params().len());
        for (name, way) in ways {
            let frozen = freeze.iter().any(|part| name == *part || name.starts_with(&format!("{part}.")));
            assert_eq!(way == 0.0, frozen, "{name} went {way}");
        }
        config.train.freeze.push("block".into());
        let error = live(&folder.join("unknown"), &config).unwrap_err();
        assert!(error.to_string().contains("`block`"), "{error:#}");
    };
    check("decoder", tokenizer_config, &["encoder", "quant_conv", "quantize"], 2);
    // From within, with segments before and after it that train; then from the beginning of the chain.
    check("within", generator_config, &["blocks.1", "norm.bias"], 3);
    let first = ["text_embedding", "text_position", "image_embedding", "image_row", "image_column", "image_start"];
    check("first", generator_config, &[&first[..], &["blocks.0"]].concat(), 0);
    check("first, sharded", generator_config, &[&first[..], &["blocks.0"]].concat(), 3);
}

/// The codebook moves where nothing else does.
#[test]
fn a_codebook_of_means_resumes_bit_by_bit_and_needs_no_gradients() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tokenizer_config(folder.path());
    (config.image_tokenizer.codebook_decay, config.image_tokenizer.restart_after) = (0.5, 0);
    resumes_bit_by_bit(config.clone(), folder.path());
    let model = Bundle::open(folder.path().join("whole/runs/tokenizer/model").to_str().unwrap()).unwrap();
    model.image_tokenizer().unwrap();
    assert!(model.weights().unwrap().keys().all(|name| !tokenizer::is_of_training(name)));

    (config.train.learning_rate, config.train.ema_decay, config.train.sample_every) = (1e-12, 0.0, 0);
    let task = ImageTokenizerTask::new(&config, &Group::alone()).unwrap();
    let ways = ways(&folder.path().join("still"), &config, &task);
    let (codebook, rest) = (ways["quantize.embedding.weight"], ways["quant_conv.weight"]);
    assert!(codebook > 0.1 && rest < 1e-6, "{codebook} {rest}");
}

#[test]
fn drawn_and_rounded_codes_resume_bit_by_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tokenizer_config(folder.path());
    config.image_tokenizer.quantizer = config::QuantizerKind::Gumbel;
    config.image_tokenizer.temperature_steps = 3;
    resumes_bit_by_bit(config.clone(), &folder.path().join("gumbel"));
    let mut dvae = config.clone();
    dvae.image_tokenizer.architecture = config::Architecture::Dvae;
    (dvae.image_tokenizer.channels, dvae.image_tokenizer.l2_weight) = (8, 0.0);
    resumes_bit_by_bit(dvae, &folder.path().join("dvae"));
    (config.image_tokenizer.quantizer, config.image_tokenizer.fsq_levels) = (config::QuantizerKind::Fsq, vec![3, 4]);
    config.image_tokenizer.code_dim = 2;
    resumes_bit_by_bit(config, &folder.path().join("fsq"));
}

#[test]
fn the_generator_resumes_bit_by_bit() {
    let folder = tempfile::tempdir().unwrap();
    resumes_bit_by_bit(generator_config(folder.path()), folder.path());
    let sheet = image::open(folder.path().join("whole/runs/generator/samples/step-0000005.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (2 * 8 + 4, 8));
    let model = Bundle::open(folder.path().join("whole/runs/generator/model").to_str().unwrap()).unwrap();
    assert_eq!(model.generator().unwrap().max_text(), 8);
    assert_eq!(model.image_tokenizer().unwrap().grid(), (4, 4));
}

/// Gradients by name.
type Copies = BTreeMap<String, Tensor>;

fn copies(gradients: &gradients::Gradients) -> Copies {
    gradients.iter().map(|(name, gradient)| (name.clone(), gradient.copy().unwrap())).collect()
}

/// Largest difference of two steps' gradients, and the largest gradient.
fn difference(a: &Copies, b: &Copies) -> (f32, f32) {
    let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let pairs = a.iter().map(|(name, a)| (largest(&(a - &b[name]).unwrap()), largest(a)));
    pairs.fold((0.0, 0.0), |(d, l), (x, y)| (d.max(x), l.max(y)))
}

/// All of a task's parameters on one rank.
pub(super) fn unsharded<'g>(group: &'g Group, task: &dyn Task) -> Shards<'g> {
    let handling = |_: &str, _: Attributes| Handling::default();
    Shards::new(group, 0, Store::Memory, task.params(), &task.parameter_groups(), handling, |_| Ok(None)).unwrap()
}

pub(super) fn step_in_parts(mut config: Config, make: impl Fn(&Config) -> Box<dyn Task>) {
    let mut of = |accumulation, activation_checkpointing| {
        config.train.accumulation = accumulation;
        config.train.activation_checkpointing = activation_checkpointing;
        let (group, mut task) = (Group::alone(), make(&config));
        let mut shards = unsharded(&group, task.as_ref());
        let measured = task.gradients(1, 1.0, &mut shards).unwrap();
        (copies(shards.reduced()), measured.losses)
    };
    let (whole, losses) = of(1, 0);
    for parts in [2, 3] {
        let (gradients, part_losses) = of(parts, 0);
        let (difference, largest) = difference(&whole, &gradients);
        assert!(difference < 1e-5 * largest, "{parts} parts: {difference} of {largest}");
        for ((name, a), (_, b)) in losses.iter().zip(part_losses) {
            assert!((a - b).abs() < 1e-4 * a.abs(), "{name}: {a} {b}");
        }
    }
    assert_eq!(difference(&whole, &of(1, 1).0).0, 0.0, "recomputation changes the gradients");
}

#[test]
fn parts_of_a_step_add_up_to_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    step_in_parts(tokenizer_config(folder.path()), |c| Box::new(ImageTokenizerTask::new(c, &Group::alone()).unwrap()));
    step_in_parts(generator_config(folder.path()), |c| Box::new(GeneratorTask::new(c, &Group::alone()).unwrap()));
}

#[test]
fn one_direction_alone_passes_the_gate() {
    let folder = tempfile::tempdir().unwrap();
    for (image, text) in [(1.0, 0.0), (0.0, 1.0)] {
        let mut config = generator_config(folder.path());
        config.train.image_loss_weight = image;
        config.train.text_loss_weight = text;
        let group = Group::alone();
        let mut task = GeneratorTask::new(&config, &group).unwrap();
        let mut shards = unsharded(&group, &task);
        let measured = task.gradients(1, 1.0, &mut shards).unwrap();
        assert_eq!(measured.losses.len(), 1);
        let complete = |names: &[&String]| gradients::check_complete(names, &shards.sizes(names).unwrap());
        let all: Vec<&String> = task.params().keys().collect();
        let busy: Vec<&String> = all.iter().copied().filter(|name| task.gets_gradient(name)).collect();
        complete(&busy).unwrap();
        assert!(complete(&all).is_err());
    }
}

#[test]
fn codes_of_another_tokenizer_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = generator_config(folder.path());
    let file = folder.path().join("codes").join(CODES_FILE);
    let mut info: CodesInfo = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    info.tokenizer = "another".into();
    fs::write(&file, serde_json::to_vec(&info).unwrap()).unwrap();
    let error = GeneratorTask::new(&config, &Group::alone()).err().unwrap();
    assert!(error.to_string().contains("not of the tokenizer"), "{error:#}");
}

#[test]
fn another_vocabulary_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = generator_config(folder.path());
    let run = |config: &Config| live(folder.path(), config);
    run(&config).unwrap();
    let vocab = fs::read_to_string(&config.text.vocab).unwrap();
    let (last, rest) = vocab.trim_end().rsplit_once('\n').map(|(a, b)| (b, a)).unwrap();
    fs::write(&config.text.vocab, format!("{rest}\n{last}龘\n")).unwrap();
    let error = run(&config).unwrap_err();
    assert!(error.to_string().contains("another vocabulary"), "{error:#}");
}
