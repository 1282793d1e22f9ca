//! The task `end-to-end` on tiny data.

use super::{
    ranks_tests::{distance, live, stages_equal_one_rank, whole},
    sizes::Sizes,
    task_tests::{generator_config, resumes_bit_by_bit, step_in_parts, unsharded},
    tasks::GeneratorTask,
    *,
};
use crate::{
    bundle::{Bundle, Changes},
    config::{self, HiddenState, ReconstructorInit},
    data::{self, CodesInfo, Encoder},
    dist::Group,
    error::hint_of,
    generate::{Models, Reconstructor},
    model::end_to_end::{RECONSTRUCTOR, SCOPE},
    nn::gradients::Gradients,
    ops::packed::Format,
};
use candle_core::Tensor;
use std::fs;

/// The generator of the other tests with a reconstructor, over images that are encoded as they are read.
pub(super) fn end_to_end_config(folder: &Path) -> Config {
    let mut config = generator_config(folder);
    (config.name, config.task) = ("end-to-end".into(), config::Task::EndToEnd);
    config.data.sources[0].path = folder.join("images").display().to_string();
    config
}

pub(super) fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The bits of each gradient.
pub(super) type Bits = Vec<(String, Vec<u32>)>;

fn all_bits(gradients: &Gradients) -> Bits {
    gradients.iter().map(|(name, gradient)| (name.clone(), bits(gradient))).collect()
}

/// Gradients and losses of the first step.
pub(super) fn first_step(config: &Config) -> (Bits, Vec<(&'static str, f64)>) {
    let (group, mut task) = (Group::alone(), tasks::spec(config.task).start(config, &Group::alone()).unwrap());
    let mut shards = unsharded(&group, task.as_ref());
    let measured = task.gradients(1, 1.0, &mut shards).unwrap();
    (all_bits(shards.reduced()), measured.losses)
}

#[test]
fn it_resumes_bit_by_bit_and_publishes_a_model_with_both_reconstructors() {
    let folder = tempfile::tempdir().unwrap();
    resumes_bit_by_bit(end_to_end_config(folder.path()), folder.path());
    let run = folder.path().join("whole/runs/end-to-end");
    let sheet = image::open(run.join("samples/step-0000005.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (2 * 8 + 4, 8));
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert!(metrics.lines().all(|line| line.contains("reconstruction") && line.contains("psnr")), "{metrics}");

    let bundle = Bundle::open(run.join("model").to_str().unwrap()).unwrap();
    let images = |bundle: &Bundle, by: Option<Reconstructor>| {
        let models = Models::load(bundle, Format::F32).unwrap();
        let prompt = models.text.encode("红苹果", 8).unwrap();
        let by = by.unwrap_or(models.reconstructor);
        models.images_by(by, &[&prompt], &[vec![3; 16]]).map(|images| images[0].as_raw().clone())
    };
    let [both, two_stage] = [None, Some(Reconstructor::TwoStage)].map(|by| images(&bundle, by).unwrap());
    assert_ne!(both, two_stage);
    let exported = folder.path().join("exported");
    let changes = Changes { two_stage: true, ..Changes::default() };
    bundle.export(&exported, safetensors::Dtype::F32, &changes, false).unwrap();
    let exported = Bundle::open(exported.to_str().unwrap()).unwrap();
    assert_eq!(exported.config.task, config::Task::Generator);
    assert!(exported.weights().unwrap().keys().all(|name| !name.starts_with(SCOPE)));
    assert_eq!(images(&exported, None).unwrap(), two_stage);
    assert!(images(&exported, Some(Reconstructor::EndToEnd)).is_err());
    let error = exported.export(&folder.path().join("twice"), safetensors::Dtype::F32, &changes, false).unwrap_err();
    assert!(hint_of(&error).is_some(), "{error:#}");
}

#[test]
fn parts_of_a_step_add_up_to_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = end_to_end_config(folder.path());
    for hidden in [HiddenState::Input, HiddenState::Predict] {
        config.end_to_end.hidden = hidden;
        step_in_parts(config.clone(), |c| Box::new(GeneratorTask::new(c, &Group::alone()).unwrap()));
    }
}

#[test]
fn every_stage_trains_as_one_rank_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = end_to_end_config(folder.path());
    (config.train.batch_size, config.train.caption_batch_size) = (7, 6);
    // The first step is equal to 1e-7; group norms of an untrained decoder amplify rounding in the next nine. A gradient that
    // is lost or counted twice shows at 1e-2.
    stages_equal_one_rank(&config, &[0, 1, 2, 3], 1e-4, folder.path());
}

/// With a weight of 0 the first step is that of the generator's own training, bit by bit.
#[test]
fn without_a_reconstruction_weight_it_is_the_training_of_a_generator() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = end_to_end_config(folder.path());
    let codes = encoded(folder.path(), &config, true);
    config.data.sources[0].path = codes;
    config.end_to_end.reconstruction_weight = 0.0;
    let without = first_step(&config);
    config.task = config::Task::Generator;
    assert!(without == first_step(&config));
    assert!(without.0.iter().all(|(name, _)| !name.starts_with(SCOPE)));
}

/// Encodes the images of a configuration as a user does; the folder of the codes.
fn encoded(folder: &Path, config: &Config, keep_images: bool) -> String {
    let output = folder.join(format!("encoded-{keep_images}"));
    let model = Bundle::open(&config.image_tokenizer.path).unwrap();
    let tokenizer = model.image_tokenizer().unwrap();
    let info = CodesInfo { tokenizer: model.digest().unwrap(), grid: [4, 4], codebook_size: 12 };
    let encoder = Encoder {
        tokenizer: &tokenizer,
        info,
        output: output.clone(),
        keep_images,
        batch_size: 4,
        max_bad_ratio: 0.0,
        rank: 0,
        world_size: 1,
    };
    let source = data::Source::open(folder.join("images").to_str().unwrap(), 1.0).unwrap();
    assert_eq!(encoder.run(&[source], |_| ()).unwrap().samples, 10);
    output.display().to_string()
}

#[test]
fn shards_of_codes_and_images_equal_images_that_are_encoded_as_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = end_to_end_config(folder.path());
    let read = first_step(&config);
    config.data.sources[0].path = encoded(folder.path(), &config, true);
    assert!(read == first_step(&config));

    config.data.sources[0].path = encoded(folder.path(), &config, false);
    let error = GeneratorTask::new(&config, &Group::alone()).err().unwrap();
    assert!(hint_of(&error).is_some_and(|hint| hint.contains("--keep-images")), "{error:#}");
}

#[test]
fn it_starts_from_a_generator_of_two_stage_training_and_from_the_tokenizer_s_decoder() {
    let folder = tempfile::tempdir().unwrap();
    let two_stage = generator_config(folder.path());
    let first = folder.path().join("first");
    fs::create_dir_all(&first).unwrap();
    run_below(&first, &two_stage, &Resume::Auto, &Ranks::Threads(1), &Stop::default()).unwrap();
    let model = first.join("runs/generator/model").display().to_string();
    let mut config = end_to_end_config(folder.path());
    config.train.init_from = model.clone();
    let task = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).unwrap().0;
    let (generator, tokenizer) = (
        Bundle::open(&model).unwrap().weights().unwrap(),
        Bundle::open(&config.image_tokenizer.path).unwrap().weights().unwrap(),
    );
    for (name, var) in task.params() {
        let theirs = match name.strip_prefix(&format!("{RECONSTRUCTOR}.")) {
            Some(rest) => tokenizer.get(rest),
            None => generator.get(name),
        };
        match theirs {
            Some(theirs) => assert_eq!(bits(var), bits(theirs), "{name}"),
            None => assert!(name.starts_with("end_to_end.map."), "{name}"),
        }
    }

    config.train.init_from.clear();
    config.end_to_end.reconstructor_init = ReconstructorInit::Random;
    let task = GeneratorTask::new(&config, &Group::alone()).unwrap();
    let name = "decoder.conv_in.weight";
    assert_ne!(bits(&task.params()[&format!("{RECONSTRUCTOR}.{name}")]), bits(&tokenizer[name]));

    // The other way round there would be weights without a place.
    let parent = folder.path().join("second");
    fs::create_dir_all(&parent).unwrap();
    run_below(&parent, &config, &Resume::Auto, &Ranks::Threads(1), &Stop::default()).unwrap();
    let back = Config {
        train: config::Train {
            init_from: parent.join("runs/end-to-end/model").display().to_string(),
            ..two_stage.train.clone()
        },
        ..two_stage
    };
    let error = prepare_task(folder.path(), &back, &Resume::Auto, &Group::alone()).err().unwrap();
    assert!(format!("{error:#} {:?}", hint_of(&error)).contains("--two-stage"), "{error:#}");
}

/// With a discriminator that joins on the way and a gradient for the generator that is warmed up.
fn adversarial_config(folder: &Path) -> Config {
    let mut config = end_to_end_config(folder);
    let settings = &mut config.image_tokenizer;
    (settings.adversarial_weight, settings.adversarial_start, settings.lecam_weight) = (0.5, 1, 0.1);
    (settings.discriminator_channels, settings.discriminator_layers) = (4, 1);
    settings.discriminator_ceiling = 0.6;
    (config.end_to_end.generator_gradient_scale, config.end_to_end.generator_gradient_warmup) = (0.5, 3);
    config
}

#[test]
fn with_a_discriminator_it_resumes_bit_by_bit_and_publishes_none() {
    let folder = tempfile::tempdir().unwrap();
    resumes_bit_by_bit(adversarial_config(folder.path()), folder.path());
    let run = folder.path().join("whole/runs/end-to-end");
    let checkpoint = whole(&run.join("checkpoints/step-4"));
    let kept = checkpoint.keys().filter(|name| name.contains("reconstructor.discriminator.main.0.weight")).count();
    assert!(kept >= 3, "weight and moments of the discriminator in the checkpoint: {kept}");
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let told: Vec<bool> = metrics.lines().map(|line| line.contains("discriminator_accuracy")).collect();
    assert_eq!(told, [false, true, true, true, true]);
    let model = run.join("model").display().to_string();
    let bundle = Bundle::open(&model).unwrap();
    bundle.generator().unwrap();
    assert!(bundle.weights().unwrap().keys().all(|name| !name.contains("discriminator")));

    // A run from the published model begins with a discriminator of its own.
    let mut config = adversarial_config(folder.path());
    config.train.init_from = model;
    let task = prepare_task(folder.path(), &config, &Resume::Auto, &Group::alone()).unwrap().0;
    let weights = bundle.weights().unwrap();
    let anew = task
        .params()
        .iter()
        .filter(|(name, var)| weights.get(name.as_str()).is_none_or(|theirs| bits(theirs) != bits(var)));
    let anew: Vec<&String> = anew.map(|(name, _)| name).collect();
    assert!(!anew.is_empty() && anew.iter().all(|name| name.contains("reconstructor.discriminator.")), "{anew:?}");
}

/// The configuration says nothing of the image tokenizer but its folder and the discriminator.
#[test]
fn it_is_planned_with_the_sizes_in_the_tokenizer_s_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = adversarial_config(folder.path());
    let of_run = config.image_tokenizer.clone();
    config.image_tokenizer =
        config::ImageTokenizer { path: of_run.path.clone(), ..Default::default() }.with_losses_of(&of_run);
    let sizes = Sizes::of(&config).unwrap();
    let planned: u64 = sizes.parts().iter().map(|(_, count)| count).sum();
    let task = GeneratorTask::new(&config, &Group::alone()).unwrap();
    let trained: usize = task.params().values().map(|param| param.elem_count()).sum();
    assert_eq!(planned, trained as u64);
}

/// Norms and adaptive weight are those of a micro-batch: two ranks equal one rank with two micro-batches.
#[test]
fn a_discriminator_is_the_same_at_every_stage() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = adversarial_config(folder.path());
    (config.train.batch_size, config.train.accumulation, config.train.zero_stage) = (6, 2, 0);
    let alone = live(&folder.path().join("alone"), &config, 1).unwrap();
    config.train.accumulation = 1;
    for stage in 0..4 {
        config.train.zero_stage = stage;
        let ranks = live(&folder.path().join(stage.to_string()), &config, 2).unwrap();
        let distance = distance(&alone, &ranks);
        // As without a discriminator: rounding is amplified, a lost gradient shows at 1e-2.
        assert!(distance < 1e-3, "stage {stage}: {distance:e}");
    }
}
