use super::*;
use crate::{
    config::{Precision, Train},
    dist::launch,
    nn::params::{Init, Scope},
    train::{
        engine::tests as toy,
        optimizer::{GradientScale, Optimizer},
    },
};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn elements(var: &Tensor) -> Vec<f32> {
    ops::with_slice(var, <[f32]>::to_vec).unwrap()
}

#[test]
fn owners_keep_exact_weights_where_others_get_rounded_ones() {
    launch(2, PATIENCE, |group| {
        for stage in [1, 3] {
            let (params, chain) = toy::chain(1, 3);
            let exact: Vec<Vec<f32>> = params.values().map(|param| elements(param)).collect();
            let handling =
                |name: &str, _: Attributes| Handling { rounded: name != "blocks.1.weight", ..Handling::default() };
            let mut shards =
                Shards::new(group, stage, Store::Memory, &params, &toy::parameter_groups(&chain), handling, |_| {
                    Ok(None)
                })?;
            shards.refresh()?;
            for (unit, ((name, var), exact)) in params.iter().zip(&exact).enumerate() {
                shards.all_gather(unit, None)?;
                let ours = shards.owned()[name].clone();
                for (i, (got, exact)) in elements(var).into_iter().zip(exact).enumerate() {
                    let rounded = handling(name, var.attributes).rounded && !ours.contains(&i);
                    assert_eq!(got, if rounded { half::bf16::from_f32(*exact).to_f32() } else { *exact });
                }
                assert_eq!(shards.part(name)?, exact[ours], "{name}");
                shards.reshard(unit)?;
            }
            if let Some(collected) = shards.collect(Shards::part)? {
                let collected: BTreeMap<_, _> = collected.into_iter().collect();
                let values = collected.values().map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                assert!(values.eq(exact));
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn copies_are_what_the_optimizer_left_rounded_to_their_type() {
    for ranks in [1, 3] {
        launch(ranks, PATIENCE, |group| {
            let stores = [Store::Memory, Store::Device(Device::Cpu)];
            let all = stores.iter().flat_map(|store| [(store, Precision::Bf16), (store, Precision::F16)]);
            for (stage, (store, precision)) in (0..=3).flat_map(|stage| all.clone().map(move |of| (stage, of))) {
                let scope = Scope::from_seed(1, DType::F32, &Device::Cpu).in_precision(precision);
                scope.at("blocks.0").block_matrices("weight", (5, 7), Init::Normal(1.0), 1)?;
                scope.at("blocks.0").get("bias", 4, Init::Ones)?;
                let (params, fresh, settings) = (scope.params(), scope.fresh().unwrap(), Train::default());
                let (parameter_groups, handling) =
                    ([params.keys().cloned().collect()], |_: &str, _: Attributes| Handling::default());
                let fill = |name: &str| fresh.values(name).map(Some);
                let mut shards = Shards::new(group, stage, store.clone(), &params, &parameter_groups, handling, fill)?;
                let on_device = shards.masters.weights.values().all(|weights| matches!(weights, Buffer::Device(_)));
                assert_eq!(on_device, matches!(store, Store::Device(_)));
                let mut optimizer = Optimizer::new(&shards, &settings)?;
                for step in 1..=2 {
                    shards.begin(step);
                    for (name, var) in &params {
                        shards.gradients().add(name, Tensor::ones(var.shape(), DType::F32, &Device::Cpu)?)?;
                    }
                    shards.reduce_scatter(0)?;
                    shards.finish()?;
                    optimizer.step(&mut shards, &settings, step, 1.0, GradientScale::new(1.0, 0.0, 1.0))?;
                    shards.refresh()?;
                }
                let exact = shards.collect(Shards::part)?;
                shards.all_gather(0, None)?;
                for (name, exact) in exact.into_iter().flatten() {
                    let (var, exact) = (&params[&name], exact.flatten_all()?);
                    let rounded = exact.to_dtype(var.dtype())?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                    assert_eq!(elements(&var.to_dtype(DType::F32)?), rounded, "{name}");
                    assert!(exact.to_vec1::<f32>()?.iter().zip(fresh.values(&name)?).all(|(a, b)| *a != b));
                    assert_eq!(var.dtype() == DType::F32, exact.to_vec1::<f32>()? == rounded);
                }
                shards.reshard(0)?;
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn at_stage_3_a_rank_holds_its_own_weights_and_those_in_use() {
    launch(3, PATIENCE, |group| {
        let (params, chain) = toy::chain(1, 3);
        let before: Vec<Vec<f32>> = params.values().map(|param| elements(param)).collect();
        let mut shards = Shards::new(
            group,
            3,
            Store::Memory,
            &params,
            &toy::parameter_groups(&chain),
            |_, _| Handling::default(),
            |_| Ok(None),
        )?;
        let held: usize = shards.owned().keys().map(|name| shards.part(name).unwrap().len()).sum();
        assert!((5 * 3..=6 * 3).contains(&held), "{held} of {}", 3 * 16);
        for (unit, (var, before)) in params.values().zip(&before).enumerate() {
            assert!(ops::replace(var, Vec::new())?.is_empty());
            shards.all_gather(unit, None)?;
            assert_eq!(elements(var), *before);
            shards.reshard(unit)?;
            assert!(ops::replace(var, Vec::new())?.is_empty());
        }
        Ok(())
    })
    .unwrap();
}
