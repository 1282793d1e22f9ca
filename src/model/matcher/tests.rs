//! Manual segments equal autograd segments; padding and batch do not matter; losses and gradients.

use super::{
    contrastive::{Gradients as Found, Pairs, contrastive},
    *,
};
use crate::{
    config::Activation,
    dist::{self, Group, launch},
    error::hint_of,
    nn::{gradients::Gradients, weights},
    ops::testing::{normal, values},
};
use std::time::Duration;

const VOCAB: usize = 11;

fn config() -> config::Matcher {
    config::Matcher {
        image_size: 12,
        patch_size: 4,
        image_layers: 2,
        image_hidden: 16,
        image_heads: 2,
        image_activation: Activation::QuickGelu,
        text_layers: 2,
        text_hidden: 24,
        text_heads: 3,
        text_activation: Activation::GeluErf,
        embedding: 10,
        ..config::Matcher::default()
    }
}

fn matcher(scope: &Scope, config: &config::Matcher) -> Result<Matcher> {
    Matcher::new(scope, config, (VOCAB, 9), Precision::F32)
}

fn images() -> Result<Input> {
    Ok(Input::Images(normal("pixels", &[3, 12, 12, 3], DType::F32).tanh()?))
}

fn texts(rows: &[&[u32]], width: usize) -> Result<Input> {
    let rows: Vec<Vec<u32>> = rows.iter().map(|row| row.to_vec()).collect();
    Ok(Input::Texts(Tokens::pad(&rows, width, 0, &Device::Cpu)?))
}

/// Forward and backward through a chain, with `dy` as the gradient of its output.
fn pass(chain: &Chain<Input>, input: &Input, dy: &Tensor, gradients: &mut Gradients) -> Result<Tensor> {
    let mut x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    let mut passed = Vec::new();
    for segment in chain {
        let (y, saved) = segment.forward(&x, input)?;
        passed.push((segment, x, saved));
        x = y;
    }
    let mut dy = Some(dy.clone());
    for (segment, x, saved) in passed.into_iter().rev() {
        dy = segment.backward(&x, input, saved, dy, gradients)?;
    }
    Ok(x)
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (values(a), values(b));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(1e-3)
}

#[test]
fn manual_segments_equal_autograd() -> Result<()> {
    for activation in [Activation::Gelu, Activation::GeluErf, Activation::QuickGelu] {
        let config = config::Matcher { image_activation: activation, text_activation: activation, ..config() };
        let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
        let mut matcher = matcher(&scope, &config)?;
        for input in [images()?, texts(&[&[1, 2, 3, 4], &[1, 9], &[1, 5, 6, 7, 8, 10, 3]], 7)?] {
            let dy = normal("dy", &[3, config.embedding], DType::F32).detach();
            let [mut manual, mut autograd] = [Gradients::default(), Gradients::default()];
            let mut outputs = Vec::new();
            for (by_hand, gradients) in [(true, &mut manual), (false, &mut autograd)] {
                matcher.manual = by_hand;
                let chain = match input {
                    Input::Images(_) => matcher.image_segments(),
                    Input::Texts(_) => matcher.text_segments(),
                };
                outputs.push(pass(&chain, &input, &dy, gradients)?);
            }
            assert!(distance(&outputs[0], &outputs[1]) < 1e-5);
            let prefix = if matches!(input, Input::Images(_)) { "image." } else { "text." };
            let names: Vec<_> = scope.params().into_keys().filter(|name| name.starts_with(prefix)).collect();
            assert!(names.len() > 20);
            for name in names {
                let (ours, theirs) = (manual.get(&name).unwrap(), autograd.get(&name).unwrap());
                let distance = distance(ours, theirs);
                assert!(distance < 2e-4, "{activation:?} {name}: {distance:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_embedding_depends_on_nothing_else_in_the_batch() -> Result<()> {
    let matcher = matcher(&Scope::from_seed(2, DType::F32, &Device::Cpu), &config())?;
    let together = matcher.embed(&texts(&[&[1, 2, 3], &[1, 9, 8, 7, 6, 5, 4, 3, 2]], 9)?)?;
    let alone = matcher.embed(&texts(&[&[1, 2, 3]], 3)?)?;
    assert!(distance(&together.narrow(0, 0, 1)?, &alone) < 1e-6);
    let lengths = values(&together.sqr()?.sum(1)?);
    assert!(lengths.iter().all(|length| (length - 1.0).abs() < 1e-6), "{lengths:?}");
    assert!(distance(&together.narrow(0, 1, 1)?, &alone) > 0.1, "the text counts");
    Ok(())
}

#[test]
fn wrong_inputs_are_refused() -> Result<()> {
    let matcher = matcher(&Scope::from_seed(2, DType::F32, &Device::Cpu), &config())?;
    let message = |input: &Input| format!("{:#}", matcher.embed(input).unwrap_err());
    assert!(message(&Input::Images(Tensor::zeros((1, 8, 8, 3), DType::F32, &Device::Cpu)?)).contains("8 x 8"));
    assert!(message(&texts(&[&[1; 10]], 10)?).contains("10 tokens"));
    assert!(message(&texts(&[&[1, 11]], 2)?).contains("token 11"));
    Ok(())
}

/// Normalized embeddings (pairs, 5) by name.
fn embeddings(name: &str, pairs: usize) -> Vec<f64> {
    let all = values(&normal(name, &[pairs, 5], DType::F64));
    let unit = |row: &[f64]| {
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter().map(|x| x / length).collect::<Vec<_>>()
    };
    all.chunks(5).flat_map(unit).collect()
}

const KINDS: [ContrastiveLoss; 2] = [ContrastiveLoss::Infonce, ContrastiveLoss::Sigmoid];
/// The third and the last caption are equal.
const CAPTIONS: [u64; 7] = [5, 3, 8, 1, 2, 9, 8];
const SCALE: [f64; 2] = [1.3, -0.7];

fn loss(kind: ContrastiveLoss, images: &[f64], texts: &[f64], scale: [f64; 2]) -> Found<f64> {
    contrastive(kind, &Pairs { images, texts, captions: &CAPTIONS }, scale, &Group::alone()).unwrap()
}

#[test]
fn gradients_of_the_losses_equal_finite_differences() {
    const STEP: f64 = 1e-6;
    for kind in KINDS {
        let (images, texts) = (embeddings("images", 7), embeddings("texts", 7));
        let found = loss(kind, &images, &texts, SCALE);
        let check = |what: &str, analytic: f64, at: &dyn Fn(f64) -> f64| {
            let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            assert!((analytic - numeric).abs() < 1e-7, "{kind:?} {what}: {analytic}, numerically {numeric}");
        };
        for i in 0..images.len() {
            let moved = |values: &[f64], delta: f64| {
                let mut values = values.to_vec();
                values[i] += delta;
                values
            };
            check("image", found.images[i], &|delta| loss(kind, &moved(&images, delta), &texts, SCALE).loss);
            check("text", found.texts[i], &|delta| loss(kind, &images, &moved(&texts, delta), SCALE).loss);
        }
        check("scale", found.scale[0], &|delta| loss(kind, &images, &texts, [SCALE[0] + delta, SCALE[1]]).loss);
        check("bias", found.scale[1], &|delta| loss(kind, &images, &texts, [SCALE[0], SCALE[1] + delta]).loss);
    }
}

#[test]
fn ranks_give_the_loss_and_gradients_of_one_process() {
    let (images, texts) = (embeddings("images", 7), embeddings("texts", 7));
    for kind in KINDS {
        let whole = loss(kind, &images, &texts, SCALE);
        for ranks in 1..=4 {
            launch(ranks, Duration::from_secs(60), |group| {
                let own = dist::part(7, group.rank(), ranks);
                let rows = own.start * 5..own.end * 5;
                let pairs =
                    Pairs { images: &images[rows.clone()], texts: &texts[rows.clone()], captions: &CAPTIONS[own] };
                let part = contrastive(kind, &pairs, SCALE, group)?;
                let near = |ours: &[f64], whole: &[f64]| ours.iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-12);
                assert!(near(&part.images, &whole.images[rows.clone()]) && near(&part.texts, &whole.texts[rows]));
                let sums = group.sum(&[part.loss, part.scale[0], part.scale[1], part.correct as f64])?;
                assert!(near(&sums, &[whole.loss, whole.scale[0], whole.scale[1], whole.correct as f64]), "{sums:?}");
                Ok(())
            })
            .unwrap();
        }
    }
}

/// Against PyTorch's autograd (scripts/golden_contrastive.py).
#[test]
fn losses_and_gradients_equal_pytorch() -> Result<()> {
    let golden = weights::parse(include_bytes!("../../../tests/golden/contrastive.safetensors"), "golden")?;
    let theirs = |name: &str| values(&golden[name]);
    for (kind, name) in KINDS.into_iter().zip(["infonce", "sigmoid"]) {
        let scale = <[f64; 2]>::try_from(theirs("scale")).unwrap();
        let captions: Vec<u64> = theirs("captions").into_iter().map(|caption| caption as u64).collect();
        let (images, texts) = (theirs("images"), theirs("texts"));
        let pairs = Pairs { images: &images, texts: &texts, captions: &captions };
        let ours = contrastive(kind, &pairs, scale, &Group::alone())?;
        let check = |what: &str, ours: &[f64]| {
            let theirs = theirs(&format!("{name}.{what}"));
            assert!(ours.len() == theirs.len());
            for (ours, theirs) in ours.iter().zip(theirs) {
                assert!((ours - theirs).abs() < 2e-6 * theirs.abs().max(0.1), "{name} {what}: {ours}, theirs {theirs}");
            }
        };
        check("loss", &[ours.loss]);
        check("images", &ours.images);
        check("texts", &ours.texts);
        check("scale", &ours.scale);
    }
    Ok(())
}

#[test]
fn a_single_pair_has_a_loss_and_broken_embeddings_have_none() {
    let (one, two) = ([1.0, 0.0], [1.0, 0.0, 0.0, 1.0]);
    for kind in KINDS {
        let pairs = Pairs { images: &one, texts: &one, captions: &[1] };
        let found = contrastive(kind, &pairs, [0.0, 0.0], &Group::alone()).unwrap();
        let expected = if kind == ContrastiveLoss::Infonce { 0.0 } else { (-1f64).exp().ln_1p() };
        assert!((found.loss - expected).abs() < 1e-12 && found.correct == 2, "{found:?}");
        for broken in [[1.0, 0.0, f64::NAN, 0.0], [1.0, 0.0, f64::INFINITY, 0.0], [1.0, 0.0, 0.0, 0.0]] {
            let error = |images: &[f64], texts: &[f64]| {
                let pairs = Pairs { images, texts, captions: &[1, 2] };
                contrastive(kind, &pairs, [0.0, 0.0], &Group::alone()).unwrap_err()
            };
            for (error, what) in [(error(&broken, &two), "image 2 of 2"), (error(&two, &broken), "text 2 of 2")] {
                assert!(error.to_string().contains(what) && hint_of(&error).is_some(), "{error}");
            }
        }
    }
}
