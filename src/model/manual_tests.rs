//! Manual segments equal autograd segments, forward and backward.

use super::{
    tests::{CODEBOOK, KINDS, LISTS, VOCAB, case},
    *,
};
use crate::{
    config::Precision,
    error::Result,
    nn::{gradients::Gradients, params::Scope, segment::Segment},
};
use candle_core::{DType, Device, Tensor};

pub(super) fn norm(a: &Tensor) -> Result<f64> {
    Ok(a.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>()?)
}

/// Forward and backward through a chain: the loss, and the gradients of all parameters.
pub(super) fn run(chain: &[Box<dyn Segment<Batch> + '_>], batch: &Batch, gradients: &mut Gradients) -> Result<f64> {
    let mut x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    let mut passed = Vec::new();
    for segment in chain {
        let (y, saved) = segment.forward(&x, batch)?;
        passed.push((segment, x, saved));
        x = y;
    }
    let mut dy = None;
    for (segment, input, saved) in passed.into_iter().rev() {
        dy = segment.backward(&input, batch, saved, dy, gradients)?;
    }
    Ok(x.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

/// Compares with autograd in double precision. The bound is 1e-5, or twice autograd's own error in f32 where a small
/// model with norms over four elements amplifies rounding.
#[test]
fn manual_segments_equal_autograd() -> Result<()> {
    for index in 0..24 {
        let mut case = case(index);
        (case.config.model.qk_norm, case.config.model.sandwich_norm) = (index % 2 == 0, index % 4 > 1);
        let (generator, params) = case.generator(DType::F32)?;
        let weights = params.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let scope = Scope::from_tensors(weights, DType::F64, &Device::Cpu);
        let exact = Generator::new(&scope, &case.config, VOCAB, CODEBOOK, case.grid)?;
        let (texts, codes) = (case.texts(), case.codes());
        let [mut manual, mut autograd, mut truth] = [(); 3].map(|()| Gradients::default());
        // All lists of spans add to the same gradient buffers.
        for list in LISTS {
            let batch = case.batch(list, &texts, &codes)?;
            let ours = run(&generator.segments(), &batch, &mut manual)?;
            run(&generator.autograd_segments(Precision::F32), &batch, &mut autograd)?;
            let expected = run(&exact.autograd_segments(Precision::F32), &batch, &mut truth)?;
            assert!((ours - expected).abs() < 1e-5 * expected.abs(), "case {index} {list:?}: {ours} {expected}");
            for name in params.keys() {
                let (Some(ours), Some(autograd), Some(truth)) = (manual.get(name), autograd.get(name), truth.get(name))
                else {
                    assert_eq!(manual.get(name).is_some(), truth.get(name).is_some(), "case {index} {name}");
                    continue;
                };
                // A constant added to all keys does not change attention: the gradient of the k-norm's bias is only
                // rounding error.
                let scale = if name.ends_with("k_norm.bias") { 0.1 } else { norm(truth)?.max(1e-2) };
                let [ours, autograd] = [norm(&(ours - truth)?)? / scale, norm(&(autograd - truth)?)? / scale];
                assert!(ours < f64::max(1e-5, 2.0 * autograd), "case {index} {list:?} {name}: {ours:e} ({autograd:e})");
            }
        }
    }
    Ok(())
}

/// In f16 the manual segments sum products in f32 where candle rounds them to f16. Each gradient is within 1 % (by
/// norm) of autograd's in f16, which is within 2 % of the exact one: so both compute in f16.
#[test]
fn manual_segments_in_f16_are_close_to_autograd() -> Result<()> {
    let mut farthest = [0f64; 2];
    for index in 0..8 {
        let mut case = case(index);
        case.config.train.precision = Precision::F16;
        let (generator, params) = case.generator(DType::F32)?;
        let (texts, codes) = (case.texts(), case.codes());
        for list in KINDS {
            let batch = case.batch(list, &texts, &codes)?;
            let [mut manual, mut autograd, mut exact] = [(); 3].map(|()| Gradients::default());
            run(&generator.segments(), &batch, &mut manual)?;
            run(&generator.autograd_segments(Precision::F16), &batch, &mut autograd)?;
            run(&generator.autograd_segments(Precision::F32), &batch, &mut exact)?;
            for name in params.keys().filter(|name| !name.ends_with("k_norm.bias")) {
                let (Some(ours), Some(autograd), Some(exact)) = (manual.get(name), autograd.get(name), exact.get(name))
                else {
                    continue;
                };
                let scale = norm(exact)?.max(1e-2);
                let distances = [norm(&(ours - autograd)?)? / scale, norm(&(autograd - exact)?)? / scale];
                farthest = std::array::from_fn(|i| farthest[i].max(distances[i]));
            }
        }
    }
    assert!(farthest[0] < 1e-2 && farthest[1] < 2e-2 && farthest[1] > 1e-5, "{farthest:?}");
    Ok(())
}

/// Bit-equal on one thread and on four, for a batch large enough to be split.
#[test]
fn manual_gradients_do_not_depend_on_the_threads() -> Result<()> {
    let gradients = |threads: usize| -> Result<Vec<(String, Vec<u32>)>> {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(|| {
            let mut case = case(5);
            (case.batch, case.grid) = (8, (9, 9));
            (case.config.model.heads, case.config.model.hidden, case.config.model.layers) = (3, 96, 4);
            let (generator, _) = case.generator(DType::F32)?;
            let (texts, codes) = (case.texts(), case.codes());
            let mut gradients = Gradients::default();
            for list in KINDS {
                run(&generator.segments(), &case.batch(list, &texts, &codes)?, &mut gradients)?;
            }
            let bits = |(name, g): (&String, &Tensor)| -> Result<(String, Vec<u32>)> {
                let values: Vec<f32> = g.flatten_all()?.to_vec1()?;
                Ok((name.clone(), values.into_iter().map(f32::to_bits).collect()))
            };
            gradients.iter().map(bits).collect()
        })
    };
    assert!(gradients(1)? == gradients(4)?);
    Ok(())
}
