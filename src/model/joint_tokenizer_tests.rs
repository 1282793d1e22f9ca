//! The joint update of the image tokenizer: its gradient is that of soft codes, manual gradients equal autograd, and the
//! generator's own gradients stay as they are.

use super::{
    end_to_end_tests::end_to_end,
    manual_tests::{norm, run},
    tests::{CODEBOOK, Case, IMAGE_TO_TEXT, LISTS, List, TEXT_TO_IMAGE, VOCAB},
    *,
};
use crate::{
    config::{Architecture, HiddenState, Precision, QuantizerKind},
    error::Result,
    nn::{
        gradients::Gradients,
        params::{Params, Scope},
        segment::Autograd,
    },
    ops::testing::normal,
    tokenizer::{ImageTokenizer, PixelBatch, quantizer::gumbel::Relaxation},
};
use candle_core::{DType, Device, Tensor};
use std::rc::Rc;

/// Of the soft codes.
const TEMPERATURE: f64 = 0.7;
/// Of their gradient.
const SCALE: f64 = 1.5;
const RELAXATION: Relaxation = Relaxation { temperature: 0.5, kl_weight: 0.1, seed: 3, step: 2, first: 4 };

/// Quantizers, and parameters of the encoder that the caption's loss must reach.
const KINDS: [(Architecture, QuantizerKind, &[&str]); 3] = [
    (Architecture::Vqgan, QuantizerKind::Nearest, &["encoder.conv_in.weight", "quant_conv.weight"]),
    (Architecture::Vqgan, QuantizerKind::Gumbel, &["encoder.conv_out.weight", "quantize.proj.weight"]),
    (Architecture::Dvae, QuantizerKind::Gumbel, &["encoder.blocks.input.w", "encoder.blocks.output.conv.w"]),
];

fn case_of(kind: usize) -> Case {
    let (architecture, quantizer, _) = KINDS[kind];
    let mut case = end_to_end(kind as u64 + 1, HiddenState::Input, architecture);
    (case.config.image_tokenizer.quantizer, case.batch) = (quantizer, 2);
    case
}

fn tokenizer(case: &Case, dtype: DType) -> Result<(ImageTokenizer, Params)> {
    let scope = Scope::from_seed(7, dtype, &Device::Cpu);
    let tokenizer = ImageTokenizer::in_training(&scope.at("image_tokenizer"), &case.config.image_tokenizer)?;
    let params = scope.params();
    // Vectors that latents are between.
    if let Some(codebook) = params.get("image_tokenizer.quantize.embedding.weight") {
        codebook.set(&normal("codebook", codebook.dims(), dtype))?;
    }
    Ok((tokenizer, params))
}

/// Sequences of two images with all that trains the tokenizer; its own losses have the weight `share`.
fn batch(case: &mut Case, list: List, tokenizer: &ImageTokenizer, dtype: DType, share: f64) -> Result<Batch> {
    let pixels = normal("pixels", &[case.batch, 8, 8, 3], dtype).tanh()?;
    let codes = tokenizer.draw(&pixels, RELAXATION)?.to_vec2::<u32>()?;
    let texts = case.texts();
    let mut batch = case.batch(list, &texts, &codes)?;
    batch.source_pixels = Some(Rc::new(PixelBatch { relaxation: RELAXATION, ..PixelBatch::new(pixels, share) }));
    batch.tokenizer_gradient = SCALE;
    Ok(batch)
}

/// The same batch with other weights of the two gradients that the tokenizer gets.
fn weighted(batch: &Batch, share: f64, scale: f64) -> Batch {
    let mut batch = batch.clone();
    let pixels = batch.source_pixels.as_ref().unwrap().pixels.clone();
    batch.source_pixels = Some(Rc::new(PixelBatch { relaxation: RELAXATION, ..PixelBatch::new(pixels, share) }));
    batch.tokenizer_gradient = scale;
    batch
}

/// Straight-through: the encoder gets the gradient of the loss where each code's embedding moves as its soft code does, with
/// the table and the codebook fixed. In double precision.
#[test]
fn the_gradient_of_the_encoder_is_that_of_soft_codes() -> Result<()> {
    for (kind, (architecture, quantizer, names)) in KINDS.into_iter().enumerate() {
        let mut case = case_of(kind);
        let (generator, _) = case.generator(DType::F64)?;
        let (tokenizer, params) = tokenizer(&case, DType::F64)?;
        // Its own losses hardly count.
        let batch = batch(&mut case, IMAGE_TO_TEXT, &tokenizer, DType::F64, 1e-12)?;
        let mut chain = generator.autograd_segments(Precision::F32);
        chain.insert(0, Box::new(JointTokenizer::new(&tokenizer, TEMPERATURE)));
        let mut gradients = Gradients::default();
        let whole = run(&chain, &batch, &mut gradients)?;

        let mut hard = batch.clone();
        hard.source_pixels = None;
        let nothing = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
        let embedded = Autograd::autograd(&generator.embedding, &nothing, &hard)?.detach();
        let pixels = batch.source_pixels.as_ref().unwrap();
        let soft = || -> Result<Tensor> {
            let z = tokenizer.latents(&pixels.pixels)?;
            Ok(tokenizer.quantizer().soft_codes(&z, TEMPERATURE, pixels.relaxation)?.detach())
        };
        let (first, table) = (soft()?, generator.embedding.image.detach());
        let loss = || -> Result<f64> {
            let moved = ((soft()? - &first)?.matmul(&table)? * SCALE)?;
            let image = (embedded.narrow(1, 0, 16)? + moved.reshape((case.batch, 16, ()))?)?;
            let rest = embedded.narrow(1, 16, embedded.dim(1)? - 16)?;
            let start = Tensor::cat(&[image, rest], 1)?;
            let end = chain[2..]
                .iter()
                .try_fold(start, |x, segment| Ok::<_, crate::error::Error>(segment.forward(&x, &hard)?.0))?;
            Ok(end.to_dtype(DType::F64)?.to_scalar::<f64>()?)
        };
        assert_eq!(loss()?, whole, "the values are those of the codes");
        for name in names {
            let name = format!("image_tokenizer.{name}");
            let var = &params[&name];
            let direction = normal(&name, var.dims(), DType::F64).into_inner();
            let (start, step) = (var.as_tensor().copy()?, 1e-5);
            let at = |t: f64| -> Result<f64> {
                var.set(&(&start + (&direction * t)?)?)?;
                loss()
            };
            let difference = (at(step)? - at(-step)?) / (2.0 * step);
            at(0.0)?;
            let gradient = gradients.get(&name).unwrap().to_dtype(DType::F64)?;
            let expected = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            // Rectifiers have kinks.
            let accuracy = if architecture == Architecture::Dvae { 1e-3 } else { 1e-5 };
            assert!(expected.abs() > 1e-5, "{architecture:?} {quantizer:?} {name}: {expected}");
            assert!(
                (difference - expected).abs() < accuracy * expected.abs().max(1e-3),
                "{architecture:?} {quantizer:?} {name}: {difference} {expected}"
            );
        }
    }
    Ok(())
}

/// The encoder gets the sum of what its own losses and the captions give; the decoder gets its own alone.
#[test]
fn the_gradients_of_both_losses_add_up() -> Result<()> {
    for kind in [0, 2] {
        let mut case = case_of(kind);
        let (generator, _) = case.generator(DType::F64)?;
        let (tokenizer, params) = tokenizer(&case, DType::F64)?;
        let batch = batch(&mut case, IMAGE_TO_TEXT, &tokenizer, DType::F64, 0.3)?;
        let mut chain = generator.autograd_segments(Precision::F32);
        chain.insert(0, Box::new(JointTokenizer::new(&tokenizer, TEMPERATURE)));
        let gradients = |share: f64, scale: f64| -> Result<Gradients> {
            let mut gradients = Gradients::default();
            run(&chain, &weighted(&batch, share, scale), &mut gradients)?;
            Ok(gradients)
        };
        let (one, more_text, more_own) = (gradients(0.3, SCALE)?, gradients(0.3, 2.0 * SCALE)?, gradients(0.6, SCALE)?);
        // A bias of keys, or of a channel that is a group of its own before a norm, has no effect: its gradient is rounding.
        let has_effect = |name: &&String| norm(one.get(name).unwrap()).unwrap() > 1e-9;
        let names: Vec<&String> = params.keys().filter(has_effect).collect();
        assert!(2 * names.len() > params.len(), "{kind}: {} of {}", names.len(), params.len());
        let mut reached = 0;
        for name in &names {
            let [one, more_text, more_own] =
                [&one, &more_text, &more_own].map(|gradients| gradients.get(name).unwrap());
            let threefold = (more_text + more_own)?;
            assert!(norm(&(threefold - (one * 3.0)?)?)? <= 1e-5 * norm(one)?, "{kind} {name}");
            reached += usize::from(norm(&(more_text - one)?)? > 0.0);
            assert!(norm(&(more_own - one)?)? > 0.0, "{kind} {name}");
        }
        let parts = ["image_tokenizer.encoder.", "image_tokenizer.quant_conv."];
        let encoder = names.iter().filter(|name| parts.iter().any(|part| name.starts_with(part)));
        assert_eq!(reached, encoder.count(), "{kind}: captions reach the encoder and nothing else of the tokenizer");
    }
    Ok(())
}

/// Against autograd in double precision, also where the image is not the first source.
#[test]
fn manual_gradients_equal_autograd() -> Result<()> {
    for (kind, list) in [(0, IMAGE_TO_TEXT), (1, LISTS[2]), (0, LISTS[3])] {
        let mut case = case_of(kind);
        let (generator, of_generator) = case.generator(DType::F32)?;
        let (tokenizer, of_tokenizer) = tokenizer(&case, DType::F32)?;
        let double = |params: &Params| {
            let weights = params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
            Scope::from_tensors(weights, DType::F64, &Device::Cpu)
        };
        let exact = Generator::new(&double(&of_generator), &case.config, VOCAB, CODEBOOK, case.grid)?;
        let settings = &case.config.image_tokenizer;
        let exact_tokenizer = ImageTokenizer::in_training(&double(&of_tokenizer).at("image_tokenizer"), settings)?;
        let ours = batch(&mut case, list, &tokenizer, DType::F32, 0.3)?;
        let mut theirs = ours.clone();
        let pixels = ours.source_pixels.as_ref().unwrap().pixels.to_dtype(DType::F64)?;
        theirs.source_pixels = Some(Rc::new(PixelBatch { relaxation: RELAXATION, ..PixelBatch::new(pixels, 0.3) }));
        let (mut manual, mut truth) = (Gradients::default(), Gradients::default());
        let mut chain = generator.segments();
        chain.insert(0, Box::new(JointTokenizer::new(&tokenizer, TEMPERATURE)));
        run(&chain, &ours, &mut manual)?;
        let mut chain = exact.autograd_segments(Precision::F32);
        chain.insert(0, Box::new(JointTokenizer::new(&exact_tokenizer, TEMPERATURE)));
        run(&chain, &theirs, &mut truth)?;
        for name in of_generator.keys().chain(of_tokenizer.keys()).filter(|name| !name.ends_with("k_norm.bias")) {
            let (Some(ours), Some(truth)) = (manual.get(name), truth.get(name)) else {
                assert_eq!(manual.get(name).is_some(), truth.get(name).is_some(), "{kind} {name}");
                continue;
            };
            let distance = norm(&(ours - truth)?)? / norm(truth)?.max(1e-2);
            assert!(distance < 1e-3, "{kind} {list:?} {name}: {distance:e}");
        }
    }
    Ok(())
}

/// Loss and gradients of the generator are, bit by bit, those without the tokenizer in the chain.
#[test]
fn the_generator_computes_as_without_it() -> Result<()> {
    let mut case = case_of(0);
    let (generator, params) = case.generator(DType::F32)?;
    let (tokenizer, _) = tokenizer(&case, DType::F32)?;
    for list in [IMAGE_TO_TEXT, TEXT_TO_IMAGE] {
        let mut joint = batch(&mut case, list, &tokenizer, DType::F32, 0.3)?;
        if list.1 == Modality::Image {
            joint.source_pixels = None;
        }
        let mut alone = joint.clone();
        alone.source_pixels = None;
        let mut chain = generator.segments();
        let (mut with, mut without) = (Gradients::default(), Gradients::default());
        let expected = run(&chain, &alone, &mut without)?;
        chain.insert(0, Box::new(JointTokenizer::new(&tokenizer, TEMPERATURE)));
        assert_eq!(run(&chain, &joint, &mut with)?, expected);
        let bits = |gradients: &Gradients, name: &str| -> Option<Vec<f32>> {
            gradients.get(name).map(|gradient| gradient.flatten_all().unwrap().to_vec1().unwrap())
        };
        for name in params.keys() {
            assert!(bits(&with, name) == bits(&without, name), "{list:?} {name}");
        }
        let trained = with.iter().filter(|(name, _)| name.starts_with("image_tokenizer.")).count();
        assert_eq!(trained > 0, list.1 == Modality::Text);
    }
    Ok(())
}
