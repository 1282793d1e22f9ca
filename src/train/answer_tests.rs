//! A generator that also learns to answer questions, on tiny data.

use super::{
    ranks_tests::stages_equal_one_rank,
    task_tests::{ANSWERS, generator_config, resumes_bit_by_bit, step_in_parts},
    tasks::GeneratorTask,
    *,
};
use crate::{
    bundle::Bundle,
    config,
    data::{self, Kind},
    dist::Group,
    error::hint_of,
    generate::{Decoding, Models, Sampling},
    ops::packed::Format,
};
use std::fs;

pub(super) fn answering_config(folder: &Path) -> Config {
    let mut config = generator_config(folder);
    (config.train.vqa_batch_size, config.train.answer_loss_weight) = (5, 0.7);
    config
}

#[test]
fn answers_resume_bit_by_bit_and_add_up_over_parts_and_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = answering_config(folder.path());
    resumes_bit_by_bit(config.clone(), folder.path());
    let metrics = fs::read_to_string(folder.path().join("whole/runs/generator/metrics.jsonl")).unwrap();
    assert!(metrics.lines().all(|line| line.contains("\"answer\"")), "{metrics}");
    step_in_parts(config.clone(), |c| Box::new(GeneratorTask::new(c, &Group::alone()).unwrap()));
    (config.train.batch_size, config.train.caption_batch_size, config.train.vqa_batch_size) = (7, 6, 8);
    stages_equal_one_rank(&config, &[0, 3], 1e-6, &folder.path().join("ranks"));
}

/// A model that learns nothing but questions gives the right answers to what it learnt.
#[test]
fn answers_alone_can_be_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = answering_config(folder.path());
    let train = &mut config.train;
    (train.batch_size, train.caption_batch_size, train.vqa_batch_size) = (0, 0, 20);
    (train.steps, train.sample_every, train.checkpoint_every, train.ema_decay) = (120, 0, 120, 0.0);
    (train.learning_rate, train.muon_learning_rate, train.accumulation) = (1e-2, 0.05, 1);
    run_below(folder.path(), &config, &Resume::Auto, &Ranks::Threads(1), &Stop::default()).unwrap();
    let bundle = Bundle::open(folder.path().join("runs/generator/model").to_str().unwrap()).unwrap();
    let models = Models::load(&bundle, Format::F32).unwrap();
    let source = config::Data { sources: config.data.sources, ..Default::default() };
    let records: Vec<_> = data::Dataset::open(&source, Kind::Codes).unwrap().records(1).flatten().collect();
    let (mut codes, mut questions, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for (record, answers) in records.iter().zip(ANSWERS.iter().cycle()) {
        for (question, answer) in ["这是什么？", "它是红的吗？"].into_iter().zip(answers) {
            codes.push(record.codes.as_ref().unwrap().iter().map(|&code| u32::from(code)).collect());
            questions.push(question);
            expected.push(*answer);
        }
    }
    let greedy = Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 };
    let said = |decoding| -> Vec<String> {
        let answers = models.answer(&codes, &questions, &decoding, 1).unwrap();
        answers.into_iter().map(|answers| answers[0].text.clone()).collect()
    };
    assert_eq!(said(greedy), expected);
    assert_eq!(said(Decoding::Beam { width: 2, length_penalty: 1.0 }), expected);
    // Each answer is that of its question alone.
    let alone = models.answer(&codes[3..4], &questions[3..4], &greedy, 1).unwrap();
    assert_eq!(alone[0][0].text, expected[3]);
    assert!(models.answer(&codes, &questions[1..], &greedy, 1).is_err());
}

#[test]
fn data_without_questions_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = answering_config(folder.path());
    let shard = folder.path().join("codes/00000.tar");
    let bytes = fs::read(&shard).unwrap();
    // Same length, so that the archive stays whole.
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(text.contains("\"questions\""));
    let mut changed = bytes;
    let key = b"\"questions\"";
    let places: Vec<usize> = (0..changed.len() - key.len()).filter(|&i| changed[i..].starts_with(key)).collect();
    places.into_iter().for_each(|i| changed[i..i + key.len()].copy_from_slice(b"\"asnoitseq\""));
    fs::write(&shard, changed).unwrap();
    (config.train.sample_every, config.train.steps) = (0, 200);
    let error = run_below(folder.path(), &config, &Resume::Auto, &Ranks::Threads(1), &Stop::default()).unwrap_err();
    assert!(
        format!("{error:#}").contains("no sample of 100 steps has a text to predict for the loss `answer`")
            && hint_of(&error).is_some(),
        "{error:#}"
    );
}
