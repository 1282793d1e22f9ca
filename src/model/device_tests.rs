//! The segments as devices run them, on the CPU in f16: candle has no bf16 products there.

use super::{
    head::AutogradHead,
    manual_tests::{norm, run},
    tests::{KINDS, case},
};
use crate::{
    config::Precision,
    error::Result,
    nn::{gradients::Gradients, segment::Segment},
};
use candle_core::{DType, Device, Tensor};

/// Hidden states in half precision change losses and gradients by its rounding only.
#[test]
fn hidden_states_in_half_precision_have_its_own_rounding_only() -> Result<()> {
    let (mut farthest, mut counted) = (0_f64, 0);
    for index in 0..6 {
        let mut case = case(index);
        (case.config.model.qk_norm, case.config.model.sandwich_norm) = (index % 2 == 0, index % 3 == 0);
        let (generator, params) = case.generator(DType::F32)?;
        let (texts, codes) = (case.texts(), case.codes());
        for list in KINDS {
            let batch = case.batch(list, &texts, &codes)?;
            let half = generator.autograd_chain(Precision::F16, Some(DType::F16));
            let hidden = half[0].forward(&Tensor::zeros(0, DType::F32, &Device::Cpu)?, &batch)?.0;
            assert_eq!([&hidden, &half[1].forward(&hidden, &batch)?.0].map(Tensor::dtype), [DType::F16; 2]);
            let [mut ours, mut exact] = [(); 2].map(|()| Gradients::default());
            let losses = [
                run(&half, &batch, &mut ours)?,
                run(&generator.autograd_chain(Precision::F32, None), &batch, &mut exact)?,
            ];
            assert!((losses[0] - losses[1]).abs() < 2e-3 * losses[1].abs(), "{losses:?}");
            for name in params.keys().filter(|name| !name.ends_with("k_norm.bias")) {
                let (Some(ours), Some(exact)) = (ours.get(name), exact.get(name)) else {
                    assert!(ours.get(name).is_none() && exact.get(name).is_none(), "{name}");
                    continue;
                };
                farthest = farthest.max(norm(&(ours - exact)?)? / norm(exact)?.max(1e-2));
                counted += 1;
            }
        }
    }
    // Norms over few elements amplify the rounding of f16, 5e-4.
    assert!(counted > 100 && farthest < 5e-2 && farthest > 1e-5, "{counted} {farthest}");
    Ok(())
}

/// The head computes the same some rows at a time, also where the last part is short.
#[test]
fn parts_of_the_logits_give_the_loss_and_the_gradients_of_all() -> Result<()> {
    let mut case = case(3);
    let (generator, _) = case.generator(DType::F32)?;
    let head = AutogradHead { head: &generator.head, precision: Precision::F32 };
    for list in KINDS {
        let (texts, codes) = (case.texts(), case.codes());
        let batch = case.batch(list, &texts, &codes)?;
        let x = generator.hidden_states(&batch)?;
        let [mut whole, mut parts] = [(); 2].map(|()| Gradients::default());
        let (loss, of_all) = head.find(&x, &batch, usize::MAX)?;
        let (sum, of_parts) = head.find(&x, &batch, 3)?;
        let of_all = head.backward(&x, &batch, Box::new(of_all), None, &mut whole)?;
        let of_parts = head.backward(&x, &batch, Box::new(of_parts), None, &mut parts)?;
        let near = |a: &Tensor, b: &Tensor| -> Result<bool> {
            let difference = (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            Ok(difference < 1e-5 * b.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?.max(1e-3))
        };
        assert!(near(&loss, &sum)?, "{loss} {sum}");
        let (Some(of_all), Some(of_parts)) = (of_all, of_parts) else { panic!("no gradient") };
        assert!(of_all.dims() == x.dims() && near(&of_parts, &of_all)?);
        for (name, gradient) in whole.iter() {
            assert!(near(parts.get(name).expect(name), gradient)?, "{name}");
        }
    }
    Ok(())
}
