//! The adapter beside a layer: passes by hand ≡ autograd, B = 0 ≡ the layer alone, merged ≡ beside the layer.

use super::*;
use crate::{
    config::Activation,
    nn::{linear::Linear, params::Params},
    random::Random,
};
use candle_core::{DType, Device, Var};

const ROWS: usize = 4;
const SIZES: [usize; 2] = [5, 7];

fn lora(rank: usize) -> Lora {
    Lora { rank, alpha: 6.0, ..Lora::default() }
}

fn scope(lora: &Lora) -> Scope {
    Scope::from_seed(3, DType::F32, &Device::Cpu).with_lora(lora).at("blocks.0.mlp.fc1")
}

fn layer(scope: &Scope) -> Linear {
    Linear::in_block(scope, SIZES, 0.3, 1).unwrap()
}

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::keyed(seed, "numbers", 0, 0);
    (0..count).map(|_| random.normal() as f32).collect()
}

/// Random B instead of zeros.
fn fill_b(params: &Params) {
    let b = &params["blocks.0.mlp.fc1.lora_B.weight"];
    ops::with_slice_mut(b, |b: &mut [f32]| b.copy_from_slice(&numbers(5, b.len()))).unwrap();
}

fn assert_near(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len());
    let gap = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap < 1e-5, "{what}: {gap:e}");
}

#[test]
fn passes_by_hand_equal_autograd_and_only_the_adapter_has_gradients() {
    let scope = scope(&lora(3));
    let linear = layer(&scope);
    fill_b(&scope.params());
    let (x, dy) = (numbers(1, ROWS * SIZES[0]), numbers(2, ROWS * SIZES[1]));
    let tensor = |values: &[f32], columns| Tensor::from_vec(values.to_vec(), (ROWS, columns), &Device::Cpu).unwrap();
    let input = Var::from_tensor(&tensor(&x, SIZES[0])).unwrap();
    let y = linear.forward(&input).unwrap();
    let store = (&y * tensor(&dy, SIZES[1])).unwrap().sum_all().unwrap().backward().unwrap();

    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_near(&linear.manual(Precision::F32, &x, None).unwrap(), &values(&y), "y");
    let residual = numbers(4, dy.len());
    let with = linear.manual(Precision::F32, &x, Some(&residual)).unwrap();
    let expected: Vec<f32> = values(&y).iter().zip(&residual).map(|(y, r)| y + r).collect();
    assert_near(&with, &expected, "y + residual");
    for kind in [Activation::Gelu, Activation::QuickGelu] {
        let (before, _) = linear.manual_activated(Precision::F32, kind, &x).unwrap();
        assert_near(&before, &values(&y), "y before its activation");
    }
    let mut gradients = Gradients::default();
    for micro_batch in 1..=2 {
        let dx = linear.manual_backward(Precision::F32, &x, &dy, &mut gradients).unwrap();
        assert_near(&dx, &values(store.get(&input).unwrap()), "dx");
        let names: Vec<String> = gradients.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, names_of_layer());
        for name in &names {
            let expected = (store.get(&scope.params()[name]).unwrap() * f64::from(micro_batch)).unwrap();
            assert_near(&values(gradients.get(name).unwrap()), &values(&expected), name);
        }
    }
    for (name, param) in scope.params() {
        assert_eq!(param.attributes.base, !is_adapter(&name), "{name}");
        assert_eq!(param.attributes.requires_grad, is_adapter(&name), "{name}");
    }
}

fn names_of_layer() -> [String; 2] {
    names("blocks.0.mlp.fc1")
}

#[test]
fn an_adapter_starts_as_the_layer_alone() {
    let (alone, adapted) = (scope(&lora(0)), scope(&lora(2)));
    let x = numbers(1, ROWS * SIZES[0]);
    let [alone, with] = [layer(&alone), layer(&adapted)].map(|layer| layer.manual(Precision::F32, &x, None).unwrap());
    assert_eq!(alone, with);
    let params = adapted.params();
    let [a, b] = names_of_layer().map(|name| params[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let bound = 1.0 / (SIZES[0] as f32).sqrt();
    assert!(
        b.iter().all(|b| *b == 0.0) && a.iter().all(|a| a.abs() <= bound) && a.iter().any(|a| a.abs() > bound / 2.0)
    );
    // Layers that are no target have none.
    let other = Scope::from_seed(3, DType::F32, &Device::Cpu).with_lora(&lora(2)).at("blocks.0.mlp.fc3");
    layer(&other);
    assert_eq!(other.params().len(), 2);
}

#[test]
fn merged_weights_do_what_the_adapter_did() {
    let lora = lora(3);
    let scope = scope(&lora);
    let linear = layer(&scope);
    fill_b(&scope.params());
    let x = numbers(1, ROWS * SIZES[0]);
    let mut weights: HashMap<String, Tensor> =
        scope.params().iter().map(|(name, param)| (name.clone(), param.as_tensor().clone())).collect();
    let mut lacking = weights.clone();
    merge_all(&mut weights, lora.scale()).unwrap();
    assert_eq!(weights.len(), 2);
    let alone = Scope::from_tensors(weights, DType::F32, &Device::Cpu).at("blocks.0.mlp.fc1");
    let merged = layer(&alone).manual(Precision::F32, &x, None).unwrap();
    assert_near(&merged, &linear.manual(Precision::F32, &x, None).unwrap(), "merged");
    lacking.remove(&names_of_layer()[1]);
    let error = merge_all(&mut lacking, lora.scale()).unwrap_err();
    assert!(error.to_string().contains("fc1.lora_B.weight"), "{error:#}");
}
