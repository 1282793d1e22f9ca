//! End-to-end training: manual gradients equal autograd, autograd equals finite differences, and the reconstruction reads
//! the hidden states that it should.

use super::{
    manual_tests::{norm, run},
    tests::{CODEBOOK, Case, IMAGE_TO_TEXT, TEXT_TO_IMAGE, VOCAB, case},
    *,
};
use crate::{
    config::{Architecture, HiddenState, ImageTokenizer, Precision, QuantizerKind, Task},
    error::Result,
    nn::{gradients::Gradients, params::Scope},
    ops::testing::normal,
    tokenizer::{PixelBatch, discriminator::LogitEma},
};
use candle_core::{DType, Device, Tensor};
use std::rc::Rc;

/// Weight of the reconstruction loss.
const SHARE: f64 = 0.7;

/// Case `index` as an end-to-end generator over a grid of 4 x 4 codes and images of 8 x 8 pixels.
pub(super) fn end_to_end(index: u64, hidden: HiddenState, architecture: Architecture) -> Case {
    let mut case = case(index);
    (case.grid, case.config.task, case.config.end_to_end.hidden) = ((4, 4), Task::EndToEnd, hidden);
    case.config.end_to_end.map_width = if index.is_multiple_of(2) { 0 } else { 6 };
    case.config.image_tokenizer = ImageTokenizer {
        architecture,
        quantizer: if architecture == Architecture::Dvae { QuantizerKind::Gumbel } else { QuantizerKind::Nearest },
        image_size: 8,
        channels: 32,
        channel_multipliers: vec![1, 1],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 4,
        codebook_size: CODEBOOK,
        code_dim: 3,
        l1_weight: 0.3,
        l2_weight: 1.1,
        ..ImageTokenizer::default()
    };
    case
}

/// A text → image batch of the case, with or without its pixels.
fn batch(case: &mut Case, generator: &Generator, dtype: DType, pixels: bool) -> Result<Batch> {
    let (texts, codes) = (case.texts(), case.codes());
    let mut batch = generator.end_to_end().unwrap().arrange(case.batch(TEXT_TO_IMAGE, &texts, &codes)?);
    let values = normal("pixels", &[case.batch, 8, 8, 3], dtype).tanh()?;
    batch.pixels = pixels.then(|| Rc::new(PixelBatch::new(values, SHARE)));
    Ok(batch)
}

const ALL: [(HiddenState, Architecture); 4] = [
    (HiddenState::Input, Architecture::Vqgan),
    (HiddenState::Predict, Architecture::Vqgan),
    (HiddenState::Input, Architecture::Dvae),
    (HiddenState::Predict, Architecture::Dvae),
];

/// The gradient of every parameter along a random direction, in double precision.
#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    for (index, (hidden, architecture)) in (1..).zip(ALL) {
        let mut case = end_to_end(index, hidden, architecture);
        // L1 has a kink, which a step can cross.
        (case.config.image_tokenizer.l1_weight, case.batch) = (0.0, 2);
        let (generator, params) = case.generator(DType::F64)?;
        let batch = batch(&mut case, &generator, DType::F64, true)?;
        let chain = generator.autograd_segments(Precision::F32);
        let mut gradients = Gradients::default();
        run(&chain, &batch, &mut gradients)?;
        let (reconstructor, rest): (Vec<_>, Vec<_>) =
            params.iter().partition(|(name, _)| name.starts_with(end_to_end::RECONSTRUCTOR));
        // Its first and last layers: what is between has tests of its own, and each convolution takes seconds.
        let ends = reconstructor[..4].iter().chain(&reconstructor[reconstructor.len() - 4..]);
        let checked = rest.iter().filter(|(name, _)| !name.starts_with("text_head.")).chain(ends);
        for (name, var) in checked {
            let gradient = gradients.get(name).unwrap_or_else(|| panic!("{name} has no gradient"));
            let direction = normal(name, var.dims(), DType::F64).into_inner();
            let (start, step) = (var.as_tensor().copy()?, 1e-5);
            let at = |t: f64| -> Result<f64> {
                var.set(&(&start + (&direction * t)?)?)?;
                run(&chain, &batch, &mut Gradients::default())
            };
            let difference = (at(step)? - at(-step)?) / (2.0 * step);
            at(0.0)?;
            let expected = (gradient.to_dtype(DType::F64)? * &direction)?.sum_all()?.to_scalar::<f64>()?;
            // The bias of the k-norm has no effect on attention: what remains is rounding, which the decoder amplifies.
            // The likelihood of a dVAE has kinks and a large curvature.
            let accuracy = if architecture == Architecture::Dvae { 5e-5 } else { 2e-6 };
            let bound = if name.ends_with("k_norm.bias") { 1e-3 } else { accuracy * expected.abs().max(1.0) };
            assert!(
                (difference - expected).abs() < bound,
                "{architecture:?} {hidden:?} {name}: {difference} {expected}"
            );
        }
    }
    Ok(())
}

/// Against autograd in double precision, as for the generator alone.
#[test]
fn manual_segments_equal_autograd() -> Result<()> {
    for (index, (hidden, architecture)) in (1..).zip(ALL.into_iter().chain(ALL)) {
        let mut case = end_to_end(index, hidden, architecture);
        let (generator, params) = case.generator(DType::F32)?;
        let weights = params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let scope = Scope::from_tensors(weights, DType::F64, &Device::Cpu);
        let exact = Generator::new(&scope, &case.config, VOCAB, CODEBOOK, case.grid)?;
        let ours_batch = batch(&mut case, &generator, DType::F32, true)?;
        let mut exact_batch = ours_batch.clone();
        let pixels = ours_batch.pixels.as_ref().unwrap().pixels.to_dtype(DType::F64)?;
        exact_batch.pixels = Some(Rc::new(PixelBatch::new(pixels, SHARE)));
        let [mut manual, mut autograd, mut truth] = [(); 3].map(|()| Gradients::default());
        let ours = run(&generator.segments(), &ours_batch, &mut manual)?;
        let terms = ours_batch.pixels.as_ref().unwrap().statistics.take().unwrap().terms;
        run(&generator.autograd_segments(Precision::F32), &ours_batch, &mut autograd)?;
        let expected = run(&exact.autograd_segments(Precision::F32), &exact_batch, &mut truth)?;
        assert!((ours - expected).abs() < 1e-5 * expected.abs(), "{architecture:?} {hidden:?}: {ours} {expected}");
        let expected_terms = exact_batch.pixels.as_ref().unwrap().statistics.take().unwrap().terms;
        assert_eq!(terms.len(), expected_terms.len());
        for ((name, ours), (other, expected)) in terms.iter().zip(&expected_terms) {
            assert!(name == other && (ours - expected).abs() < 1e-5 * expected.abs(), "{name}: {ours} {expected}");
        }
        for name in params.keys() {
            let (Some(ours), Some(autograd), Some(truth)) = (manual.get(name), autograd.get(name), truth.get(name))
            else {
                assert!(manual.get(name).is_none() && name.starts_with("text_head."), "{name}");
                continue;
            };
            // Group norms over few values amplify rounding, and a gradient may be nothing else.
            let scale = if name.ends_with("k_norm.bias") { 0.1 } else { norm(truth)?.max(1e-2) };
            let [ours, autograd] = [norm(&(ours - truth)?)? / scale, norm(&(autograd - truth)?)? / scale];
            let bound = f64::max(5e-5, 3.0 * autograd);
            assert!(ours < bound, "{architecture:?} {hidden:?} {name}: {ours:e} ({autograd:e})");
        }
    }
    Ok(())
}

/// Without pixels (a reconstruction weight of 0) nothing of the generator's own gradients changes, not by a bit; nor do
/// those of image → text.
#[test]
fn the_generation_loss_alone_is_that_of_a_generator() -> Result<()> {
    for hidden in [HiddenState::Input, HiddenState::Predict] {
        let mut case = end_to_end(3, hidden, Architecture::Vqgan);
        let (ours, _) = case.generator(DType::F32)?;
        let (texts, codes) = (case.texts(), case.codes());
        let batches = [TEXT_TO_IMAGE, IMAGE_TO_TEXT].map(|list| case.batch(list, &texts, &codes).unwrap());
        case.config.task = Task::Generator;
        let scope = Scope::from_seed(1, DType::F32, &Device::Cpu);
        let two_stage = Generator::new(&scope, &case.config, VOCAB, CODEBOOK, case.grid)?;
        let ours_params = ours.params().flat_map(|params| params.clone()).collect::<std::collections::BTreeMap<_, _>>();
        for (name, var) in &scope.params() {
            var.set(ours_params[name].as_tensor())?;
        }
        for batch in &batches {
            let [mut with, mut without] = [(); 2].map(|()| Gradients::default());
            assert_eq!(run(&ours.segments(), batch, &mut with)?, run(&two_stage.segments(), batch, &mut without)?);
            let bits = |gradients: &Gradients| -> Vec<(String, Vec<u32>)> {
                let bits = |g: &Tensor| g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                gradients
                    .iter()
                    .map(|(name, g)| (name.clone(), bits(g).into_iter().map(f32::to_bits).collect()))
                    .collect()
            };
            assert!(bits(&with) == bits(&without));
        }
        // The position of the last code is no target, and no target sees it.
        let alone = run(&ours.segments(), &batches[0], &mut Gradients::default())?;
        let arranged = ours.end_to_end().unwrap().arrange(batches[0].clone());
        let with_last = run(&ours.segments(), &arranged, &mut Gradients::default())?;
        assert!((alone - with_last).abs() < 1e-6 * alone.abs(), "{alone} {with_last}");
    }
    Ok(())
}

/// What a change of one code changes in the pixels: with `input`, its own cell and what later states see; with `predict`,
/// nothing at its own cell by way of the code, and nothing at all for the last code.
#[test]
fn the_reconstruction_reads_the_states_that_it_should() -> Result<()> {
    for hidden in [HiddenState::Input, HiddenState::Predict] {
        let mut case = end_to_end(2, hidden, Architecture::Vqgan);
        case.batch = 1;
        let (generator, _) = case.generator(DType::F32)?;
        let (texts, codes) = (case.texts(), case.codes());
        let vectors = |codes: &[Vec<u32>]| -> Result<Vec<Vec<f32>>> {
            let end_to_end = generator.end_to_end().unwrap();
            let batch = end_to_end.arrange(case.batch(TEXT_TO_IMAGE, &texts, codes)?);
            let vectors = end_to_end.code_vectors(Precision::F32, &generator.hidden_states(&batch)?, &batch)?;
            Ok(vectors.reshape((16, ()))?.to_vec2()?)
        };
        let before = vectors(&codes)?;
        for changed in [0, 5, 15] {
            let mut others = codes.clone();
            others[0][changed] = (others[0][changed] + 1) % CODEBOOK as u32;
            let after = vectors(&others)?;
            let first = (0..16).find(|&i| before[i] != after[i]);
            let expected = match hidden {
                HiddenState::Input => Some(changed),
                HiddenState::Predict => (changed + 1..16).next(),
            };
            match expected {
                // A sparse pattern may skip the code right before.
                Some(least) => assert!(first >= Some(least) && first.is_some(), "{hidden:?} {changed}: {first:?}"),
                None => assert_eq!(first, None),
            }
            if hidden == HiddenState::Input {
                assert_eq!(first, Some(changed));
            }
        }
        let pixels = generator.reconstruct(case.batch(TEXT_TO_IMAGE, &texts, &codes)?)?;
        assert_eq!(pixels.dims(), [1, 8, 8, 3]);
        assert!(generator.reconstruct(case.batch(IMAGE_TO_TEXT, &texts, &codes)?).is_err());
    }
    Ok(())
}

/// Weight of the GAN loss.
const GAN_WEIGHT: f64 = 0.6;

/// A case with a discriminator, and a batch that has it in its loss.
fn adversarial(index: u64, architecture: Architecture) -> Result<(Generator, Batch)> {
    let mut case = end_to_end(index, HiddenState::Input, architecture);
    let settings = &mut case.config.image_tokenizer;
    (settings.adversarial_weight, settings.lecam_weight) = (GAN_WEIGHT, 0.1);
    (settings.discriminator_channels, settings.discriminator_layers) = (4, 1);
    let (generator, _) = case.generator(DType::F32)?;
    let batch = batch(&mut case, &generator, DType::F32, true)?;
    Ok((generator, batch))
}

/// Gradients of the batch, with the discriminator in its loss or not, and the adaptive weight.
fn gradients(
    generator: &Generator,
    batch: &Batch,
    (manual, gan, scale): (bool, bool, f64),
) -> Result<(Gradients, Option<f64>)> {
    let (mut batch, mut gradients) = (batch.clone(), Gradients::default());
    let mut pixels = PixelBatch::new(batch.pixels.as_ref().unwrap().pixels.clone(), SHARE);
    pixels.logit_ema = gan.then_some(LogitEma { real: 0.3, fake: -0.2, accuracy: 0.5 });
    (batch.pixels, batch.generator_gradient) = (Some(Rc::new(pixels)), scale);
    let chain = if manual { generator.segments() } else { generator.autograd_segments(Precision::F32) };
    run(&chain, &batch, &mut gradients)?;
    let terms = batch.pixels.as_ref().unwrap().statistics.take().unwrap().terms;
    let weight = terms.iter().find(|(name, _)| *name == "adaptive_weight").map(|(_, weight)| *weight);
    Ok((gradients, weight))
}

/// Each architecture with the gradients that it can have.
const WAYS: [(u64, Architecture, bool); 3] =
    [(1, Architecture::Vqgan, true), (1, Architecture::Vqgan, false), (2, Architecture::Dvae, false)];

/// The adaptive weight gives the adversarial gradient at the map's last layer the norm of that of the other terms.
#[test]
fn the_adaptive_weight_is_measured_at_the_last_layer_of_the_map() -> Result<()> {
    for (index, architecture, manual) in WAYS {
        let (generator, batch) = adversarial(index, architecture)?;
        let (without, none) = gradients(&generator, &batch, (manual, false, 1.0))?;
        let (with, weight) = gradients(&generator, &batch, (manual, true, 1.0))?;
        assert!(none.is_none() && weight.is_some_and(|weight| weight > 0.0), "{weight:?}");
        let name = "end_to_end.map.fc2.weight";
        let (ours, plain) = (with.get(name).unwrap(), without.get(name).unwrap());
        let ratio = norm(&(ours - plain)?)? / norm(plain)?;
        assert!(ratio <= GAN_WEIGHT * (1.0 + 1e-4) && ratio > 0.9 * GAN_WEIGHT, "{architecture:?} {manual}: {ratio}");
        // At the reconstructor's last layer it is another ratio: the weight is not measured there.
        let ends = ["conv_out.weight", "blocks.output.conv.w"];
        let is_last = |name: &&String| name.contains("reconstructor") && ends.iter().any(|end| name.ends_with(end));
        let last = with.iter().map(|(name, _)| name).find(is_last).unwrap();
        let (ours, plain) = (with.get(last).unwrap(), without.get(last).unwrap());
        let ratio = norm(&(ours - plain)?)? / norm(plain)?;
        assert!((ratio - GAN_WEIGHT).abs() > 1e-3, "{architecture:?} {manual}: {ratio}");
        let trained =
            |gradients: &Gradients| gradients.iter().filter(|(name, _)| name.contains("discriminator")).count();
        assert!(trained(&with) > 0 && trained(&without) == 0);
    }
    Ok(())
}

#[test]
fn manual_gradients_with_a_discriminator_equal_autograd() -> Result<()> {
    let (generator, batch) = adversarial(1, Architecture::Vqgan)?;
    let [(manual, ours), (autograd, theirs)] =
        [true, false].map(|manual| gradients(&generator, &batch, (manual, true, 0.3)).unwrap());
    assert!((ours.unwrap() / theirs.unwrap() - 1.0).abs() < 1e-3, "{ours:?} {theirs:?}");
    assert_eq!(manual.iter().count(), autograd.iter().count());
    for (name, theirs) in autograd.iter().filter(|(name, _)| !name.ends_with("k_norm.bias")) {
        let distance = norm(&(manual.get(name).unwrap() - theirs)?)? / norm(theirs)?.max(1e-2);
        assert!(distance < 2e-3, "{name}: {distance:e}");
    }
    Ok(())
}

/// With a scale of 0 the generator learns from its codes alone; between 0 and 1 its gradient is a straight line. Map,
/// reconstructor and discriminator get theirs at any scale.
#[test]
fn the_generator_gets_the_gradient_of_the_reconstruction_only_as_scaled() -> Result<()> {
    for (index, architecture, manual) in WAYS {
        let (generator, batch) = adversarial(index, architecture)?;
        let at = |scale| gradients(&generator, &batch, (manual, true, scale)).unwrap().0;
        let [none, part, all] = [0.0, 0.25, 1.0].map(at);
        let mut codes_alone = Gradients::default();
        let chain = if manual { generator.segments() } else { generator.autograd_segments(Precision::F32) };
        let mut tokens = batch.clone();
        tokens.pixels = None;
        run(&chain, &tokens, &mut codes_alone)?;
        let mut of_generator = 0;
        for (name, all) in all.iter() {
            let [none, part] = [&none, &part].map(|gradients| gradients.get(name).unwrap());
            if name.starts_with(end_to_end::SCOPE) {
                assert_eq!(norm(&(none - all)?)? + norm(&(part - all)?)?, 0.0, "{name}");
                continue;
            }
            assert_eq!(norm(&(none - codes_alone.get(name).unwrap())?)?, 0.0, "{name}");
            let (whole, scaled) = ((all - none)?, (part - none)?);
            let bound = 1e-5 * norm(all)?.max(norm(none)?);
            assert!(norm(&(scaled - (&whole * 0.25)?)?)? <= bound, "{architecture:?} {manual} {name}");
            of_generator += usize::from(norm(&whole)? > 10.0 * bound);
        }
        assert!(of_generator > 10, "{architecture:?} {manual}: the reconstruction reaches {of_generator} parameters");
    }
    Ok(())
}
