//! Decoding with a small random model.

use super::*;
use crate::{
    config::{Config, Schedule},
    model::{Batch, Source, Tokens},
    nn::params::Scope,
    runtime,
};
use candle_core::{DType, Tensor};

const VOCAB: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n一\n弯\n月\n星\n，\n##d\n";

/// A model with 3 × 3 codes whose distributions are far from uniform.
pub(crate) fn tiny() -> Models {
    let mut config = Config::default();
    config.text.max_tokens = 6;
    config.model.layers = 3;
    config.model.hidden = 8;
    config.model.heads = 2;
    config.model.conv_size = 3;
    let tokenizer = &mut config.image_tokenizer;
    tokenizer.image_size = 12;
    tokenizer.channels = 32;
    tokenizer.channel_multipliers = vec![1, 1, 1];
    tokenizer.residual_blocks = 1;
    tokenizer.attention_sides = vec![];
    tokenizer.latent_channels = 4;
    tokenizer.codebook_size = 17;
    tokenizer.code_dim = 4;
    let text = WordPiece::parse(VOCAB).unwrap();
    let scope = Scope::from_seed(5, DType::F32, &runtime::device().unwrap());
    let generator = Generator::new(&scope, &config, text.vocab_size(), 17, (3, 3)).unwrap();
    for (name, var) in scope.params() {
        if !name.contains("norm") {
            var.set(&(var.as_tensor() * 25.0).unwrap()).unwrap();
        }
    }
    let scope = Scope::from_seed(6, DType::F32, &runtime::device().unwrap());
    let image_tokenizer = ImageTokenizer::new(&scope, &config.image_tokenizer).unwrap();
    Models::new(generator, Format::F32, image_tokenizer, text)
}

fn requests(prompts: &[&str], seed: u64) -> Vec<Request> {
    prompts.iter().zip(seed..).map(|(prompt, seed)| Request::new(*prompt, seed)).collect()
}

const SAMPLING: Sampling = Sampling { temperature: 0.8, top_k: 9, top_p: 0.95, guidance: 1.5, ..Sampling::GREEDY };

#[test]
fn an_image_depends_only_on_its_own_prompt_and_seed() {
    let models = tiny();
    let prompts = ["一弯月", "月", "星，一弯月星月", "", "月"];
    let generate = |requests: &[Request], best_of, sampling: Sampling| {
        models.generate_images(requests, &sampling, &BestOf::own(best_of), |_| {}).unwrap()
    };
    let scheduled =
        Sampling { guidance_schedule: Schedule::Linear, temperature_schedule: Schedule::Cosine, ..SAMPLING };
    for (best_of, sampling) in [(1, SAMPLING), (3, SAMPLING), (1, scheduled)] {
        let together = generate(&requests(&prompts, 3), best_of, sampling);
        for (i, request) in requests(&prompts, 3).into_iter().enumerate() {
            let alone = generate(&[request], best_of, sampling).remove(0);
            assert_eq!((&alone.codes, &alone.image), (&together[i].codes, &together[i].image), "{i} {best_of}");
            assert!((alone.score() - together[i].score()).abs() < 1e-4);
        }
        assert!(together[1].codes != together[4].codes, "another seed is another image");
    }
    assert!(models.generate_images(&[], &SAMPLING, &BestOf::ONE, |_| {}).unwrap().is_empty());
}

#[test]
fn more_images_than_fit_in_a_batch() {
    let (models, mut codes) = (tiny(), 0);
    let many = requests(&["月"; 70], 0);
    let generated = models.generate_images(&many, &SAMPLING, &BestOf::own(2), |n| codes += n).unwrap();
    assert_eq!((generated.len(), codes), (70, 70 * 2 * 9));
    assert_eq!(
        generated[69].codes,
        models.generate_images(&many[69..], &SAMPLING, &BestOf::own(2), |_| {}).unwrap()[0].codes
    );
}

/// Cached, guided, greedy decoding against full forward passes, with a guidance that changes from code to code.
#[test]
fn greedy_guided_generation_follows_the_logits() {
    let schedule = |guidance_schedule, guidance_start| Sampling {
        guidance: 2.0,
        guidance_schedule,
        guidance_start,
        ..Sampling::GREEDY
    };
    follows_the_logits(schedule(Schedule::Constant, 1.0), |_| 2.0);
    follows_the_logits(schedule(Schedule::Linear, 10.0), |position| 10.0 - f64::from(position));
    // The first code is drawn without guidance.
    follows_the_logits(schedule(Schedule::Linear, 1.0), |position| 1.0 + f64::from(position) / 8.0);
}

fn follows_the_logits(sampling: Sampling, guidance: impl Fn(u32) -> f64) {
    let models = tiny();
    let generated = models.generate_images(&requests(&["弯月"], 0), &sampling, &BestOf::ONE, |_| {}).unwrap().remove(0);
    let logits = |prompt: &str| -> Vec<Vec<f32>> {
        let text = models.text.encode(prompt, 6).unwrap();
        let device = &runtime::device().unwrap();
        let text = Tokens::whole(Tensor::new(vec![text], device).unwrap()).unwrap();
        let codes = Tensor::new(vec![generated.codes.clone()], device).unwrap();
        let batch = Batch::text_to_image(text, codes).unwrap();
        models.generator.logits(&batch).unwrap().squeeze(0).unwrap().to_vec2().unwrap()
    };
    for (position, (mut row, without)) in (0..).zip(logits("弯月").into_iter().zip(logits(""))) {
        sampling::guide(&mut row, &without, guidance(position));
        let code = generated.codes[position as usize];
        assert_eq!(Sampling::GREEDY.draw(&row, 0.0).unwrap(), code, "position {position}");
    }
}

#[test]
fn given_codes_are_kept_and_continued() {
    let models = tiny();
    let generate = |requests: &[Request]| -> Vec<Vec<u32>> {
        let generated = models.generate_images(requests, &Sampling::GREEDY, &BestOf::own(1), |_| {}).unwrap();
        generated.into_iter().map(|generated| generated.codes).collect()
    };
    let free = requests(&["一弯月", "红月"], 0);
    let own = generate(&free);
    let given = |given: &[u32]| -> Vec<Request> {
        free.iter().map(|request| Request { given: given.to_vec(), ..request.clone() }).collect()
    };
    let [first, second] = [&own[0], &own[1]].map(|codes| generate(&given(&codes[..3])));
    assert_eq!((&first[0], &second[1]), (&own[0], &own[1]), "its own codes change nothing");
    let other: Vec<u32> = own[0][..3].iter().map(|code| (code + 1) % 17).collect();
    let completed = generate(&given(&other));
    assert!(completed.iter().all(|codes| codes[..3] == other[..] && codes.len() == own[0].len()));
    assert_ne!(completed[0][3..], own[0][3..], "the rest must depend on what is given");
}

/// Guidance away from the prompt itself leads nowhere: the logits are those of the prompt.
#[test]
fn a_negative_prompt_replaces_the_empty_one() {
    let models = tiny();
    let generate = |prompts: &[&str], negatives: &[&str], guidance: f64| -> Vec<Vec<u32>> {
        let requests = requests(prompts, 3).into_iter().zip(negatives);
        let requests: Vec<Request> =
            requests.map(|(request, negative)| Request { negative: negative.to_string(), ..request }).collect();
        let sampling = Sampling { temperature: 1.0, guidance, ..Sampling::GREEDY };
        models.generate_codes(&requests, &sampling, |_| {}).unwrap()
    };
    let (prompts, plain) = (["一弯月", "红月", "星"], ["", "", ""]);
    assert_eq!(generate(&prompts, &prompts, 4.0), generate(&prompts, &plain, 1.0));
    let mixed = generate(&prompts, &["", "红月", "月"], 4.0);
    assert_eq!(mixed[0], generate(&prompts, &plain, 4.0)[0]);
    assert_eq!(mixed[1], generate(&prompts, &plain, 1.0)[1]);
    assert_ne!(mixed[2], generate(&prompts, &plain, 4.0)[2]);
}

#[test]
fn best_of_keeps_the_highest_score() {
    let models = tiny();
    let requests = requests(&["一弯月", "星", "月，一"], 9);
    let scores = |best_of| -> Vec<f64> {
        models
            .generate_images(&requests, &SAMPLING, &BestOf::own(best_of), |_| {})
            .unwrap()
            .iter()
            .map(|generated| generated.score())
            .collect()
    };
    let (one, two, twenty) = (scores(1), scores(2), scores(20));
    assert!((0..3).all(|i| one[i] <= two[i] + 1e-5 && two[i] <= twenty[i] + 1e-5), "{one:?} {two:?} {twenty:?}");
    assert!((0..3).any(|i| one[i] < twenty[i] - 0.01), "{one:?} {twenty:?}");
}

fn images(models: &Models) -> Vec<Vec<u32>> {
    models
        .generate_images(&requests(&["一", "月星", "弯"], 1), &SAMPLING, &BestOf::ONE, |_| {})
        .unwrap()
        .into_iter()
        .map(|p| p.codes)
        .collect()
}

fn beam(width: usize) -> Decoding {
    Decoding::Beam { width, length_penalty: 1.0 }
}

/// Every caption that a model can generate: one to four tokens out of six.
fn every_caption() -> Vec<Vec<u32>> {
    let mut shorter = vec![vec![2]];
    let mut all = Vec::new();
    for _ in 0..4 {
        shorter = shorter.iter().flat_map(|c| (5..11).map(|word| [c.as_slice(), &[word]].concat())).collect();
        all.extend(shorter.iter().map(|c| [c.as_slice(), &[3]].concat()));
    }
    all
}

#[test]
fn an_unpruned_beam_finds_the_best_of_all_captions() {
    let models = tiny();
    let (codes, all) = (images(&models).remove(1), every_caption());
    let texts: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
    let means = models.score(&vec![codes.clone(); all.len()], &texts).unwrap();
    for length_penalty in [0.0, 1.0, 3.0] {
        let decoding = Decoding::Beam { width: 1296 * 7, length_penalty };
        let found = models.caption(std::slice::from_ref(&codes), &decoding, all.len()).unwrap().remove(0);
        assert_eq!(found.len(), all.len());
        let penalized = |mean: f64, tokens: usize| mean * ((tokens - 1) as f64).powf(1.0 - length_penalty);
        let mut scores: Vec<f64> = means.iter().zip(&all).map(|(&mean, c)| penalized(mean, c.len())).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        for (caption, score) in found.iter().zip(scores) {
            assert!((penalized(caption.score, caption.tokens.len()) - score).abs() < 1e-3, "{caption:?} {score}");
        }
    }
}

#[test]
fn captions_have_no_special_tokens_and_their_scores_come_from_the_model() {
    let models = tiny();
    let codes = images(&models);
    let hot = Sampling { temperature: 5.0, ..Sampling::GREEDY };
    for decoding in [
        Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 },
        Decoding::Sample { sampling: hot, seed: 4 },
        beam(1),
        beam(5),
    ] {
        let captions = models.caption(&codes, &decoding, 5).unwrap();
        assert_eq!(captions.len(), 3);
        for (codes, captions) in codes.iter().zip(captions) {
            assert_eq!(captions.len(), if decoding == beam(1) { 1 } else { 5 });
            assert!(captions.windows(2).all(|pair| pair[0].score >= pair[1].score), "best first");
            for caption in captions {
                let (first, rest) = (caption.tokens[0], &caption.tokens[1..]);
                assert!(first == 2 && rest.last() == Some(&3) && caption.tokens.len() <= 6, "{caption:?}");
                assert!(rest.len() > 1 && rest[..rest.len() - 1].iter().all(|&token| token > 4), "{caption:?}");
                assert_eq!(caption.text, models.text.decode(&caption.tokens));
                let score = models.score(std::slice::from_ref(codes), &[&caption.tokens]).unwrap()[0];
                assert!((score - caption.score).abs() < 1e-4, "{decoding:?}: {score} {caption:?}");
            }
        }
    }
}

#[test]
fn captions_depend_only_on_their_own_image() {
    let models = tiny();
    let codes = images(&models);
    let hot = Sampling { temperature: 3.0, ..Sampling::GREEDY };
    for decoding in [Decoding::Sample { sampling: hot, seed: 4 }, beam(3)] {
        let together = models.caption(&codes, &decoding, 3).unwrap();
        for (codes, captions) in codes.iter().zip(together) {
            let alone = models.caption(std::slice::from_ref(codes), &decoding, 3).unwrap().remove(0);
            let tokens = |captions: Vec<Caption>| captions.into_iter().map(|c| c.tokens).collect::<Vec<_>>();
            assert_eq!(tokens(alone), tokens(captions));
        }
    }
}

#[test]
fn greedy_decoding_is_a_beam_of_one_and_follows_the_logits() {
    let models = tiny();
    for codes in images(&models) {
        let greedy_tokens =
            |decoding| models.caption(std::slice::from_ref(&codes), &decoding, 1).unwrap()[0][0].tokens.clone();
        let greedy = greedy_tokens(Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 });
        assert_eq!(greedy_tokens(beam(1)), greedy);
        let source = Source::image_to_text(std::slice::from_ref(&codes), 2);
        let (mut state, mut logits) = models.decoder.start(&source).unwrap();
        for (i, &token) in greedy[1..].iter().enumerate() {
            let mut row = logits.clone();
            let closed: &[usize] = if i == 0 { &[0, 1, 2, 3, 4] } else { &[0, 1, 2, 4] };
            closed.iter().for_each(|&t| row[t] = f32::NEG_INFINITY);
            if i + 1 < 5 {
                assert_eq!(Sampling::GREEDY.draw(&row, 0.0).unwrap(), token);
                logits = state.logits_next(&[token]).unwrap().to_vec();
            }
        }
    }
}

#[test]
fn scores_do_not_depend_on_padding() {
    let models = tiny();
    let codes = images(&models);
    let texts: Vec<Vec<u32>> =
        ["月", "一弯月，星", ""].iter().map(|text| models.text.encode(text, 6).unwrap()).collect();
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let together = models.score(&codes, &texts).unwrap();
    for i in 0..3 {
        let alone = models.score(&codes[i..=i], &texts[i..=i]).unwrap()[0];
        assert!((alone - together[i]).abs() < 1e-5 && alone < 0.0, "{alone} {}", together[i]);
    }
}

#[test]
fn a_damaged_model_is_an_error() {
    let models = tiny();
    let codes = vec![vec![0; 9]];
    for param in models.generator.segments().last().unwrap().params().values() {
        param.set(&(param.as_tensor() * f64::NAN).unwrap()).unwrap();
    }
    let error = models.generate_images(&requests(&["月"], 0), &SAMPLING, &BestOf::ONE, |_| {}).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    for decoding in [Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 }, beam(2)] {
        assert!(models.caption(&codes, &decoding, 1).unwrap_err().to_string().contains("damaged"));
    }
}

/// How much each weight format changes the demo's output: the error of the logits in standard deviations,
/// and how often the most likely token and whole greedy captions are the same as in f32.
#[test]
fn the_demo_gives_the_same_captions_in_every_format() {
    let bundle = Bundle::open(crate::bundle::DEMO_NAME).unwrap();
    let text = bundle.text().unwrap();
    let prompts =
        ["一轮弯月，扁平风格", "红苹果，立体风格", "小狗的脸，扁平风格", "消防车，复古风格", "立体风格的笑脸", "猫脸"];
    let prompts: Vec<Vec<u32>> = prompts.iter().map(|prompt| text.encode(prompt, 28).unwrap()).collect();
    let [exact, bf16, int8] = [Format::F32, Format::Bf16, Format::Int8].map(|f| Models::load(&bundle, f).unwrap());
    let likeliest = |row: &[f32]| Sampling::GREEDY.draw(row, 0.0).unwrap();
    // Logits along the codes that are the most likely in f32.
    let (mut codes, mut expected) = (vec![Vec::new(); prompts.len()], Vec::new());
    let (mut state, first) = exact.decoder.start(&Source::text_to_image(&prompts)).unwrap();
    expected.push(first);
    for i in 0..64 {
        let next: Vec<u32> = expected[i].chunks(state.vocabulary()).map(likeliest).collect();
        codes.iter_mut().zip(&next).for_each(|(codes, &code)| codes.push(code));
        if i < 63 {
            expected.push(state.logits_next(&next).unwrap().to_vec());
        }
    }
    let captions = |models: &Models| -> Vec<String> {
        let greedy = Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 };
        models.caption(&codes, &greedy, 1).unwrap().into_iter().map(|mut c| c.remove(0).text).collect()
    };
    let said = captions(&exact);
    for (models, bound, same_bound, caption_bound) in [(&bf16, 0.01, 0.99, 6), (&int8, 0.1, 0.9, 4)] {
        let (mut state, mut logits) = models.decoder.start(&Source::text_to_image(&prompts)).unwrap();
        let (mut gap, mut spread, mut same) = (0.0, 0.0, 0);
        for i in 0..64 {
            if i > 0 {
                let tokens: Vec<u32> = codes.iter().map(|codes| codes[i - 1]).collect();
                logits = state.logits_next(&tokens).unwrap().to_vec();
            }
            for (a, b) in logits.chunks(state.vocabulary()).zip(expected[i].chunks(state.vocabulary())) {
                let mean = b.iter().sum::<f32>() / b.len() as f32;
                gap += a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                spread += b.iter().map(|b| f64::from(b - mean).powi(2)).sum::<f64>();
                same += usize::from(likeliest(a) == likeliest(b));
            }
        }
        let (gap, same) = ((gap / spread).sqrt(), same as f64 / (64 * prompts.len()) as f64);
        let alike = captions(models).iter().zip(&said).filter(|(a, b)| a == b).count();
        assert!(gap < bound && same >= same_bound && alike >= caption_bound, "{gap} {same} {alike}");
    }
}
