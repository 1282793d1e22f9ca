use super::*;
use crate::{dist::launch, train::engine::tests as toy};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn elements(var: &Var) -> Vec<f32> {
    ops::with_slice(var, <[f32]>::to_vec).unwrap()
}

#[test]
fn owners_keep_exact_weights_where_others_get_rounded_ones() {
    launch(2, PATIENCE, |group| {
        for stage in [1, 3] {
            let (params, chain) = toy::chain(1, 3);
            let exact: Vec<Vec<f32>> = params.values().map(elements).collect();
            let handling = |name: &str, _: &Var| Handling { rounded: name != "blocks.1.weight", ..Handling::default() };
            let mut shards =
                Shards::new(group, stage, Store::Memory, &params, &toy::units(&chain), handling, |_| Ok(None))?;
            shards.refresh()?;
            for (unit, ((name, var), exact)) in params.iter().zip(&exact).enumerate() {
                shards.gather(unit, None)?;
                let ours = shards.owned()[name].clone();
                for (i, (got, exact)) in elements(var).into_iter().zip(exact).enumerate() {
                    let rounded = handling(name, var).rounded && !ours.contains(&i);
                    assert_eq!(got, if rounded { half::bf16::from_f32(*exact).to_f32() } else { *exact });
                }
                assert_eq!(shards.part(name)?, exact[ours], "{name}");
                shards.release(unit)?;
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
fn at_stage_3_a_rank_holds_its_own_weights_and_those_in_use() {
    launch(3, PATIENCE, |group| {
        let (params, chain) = toy::chain(1, 3);
        let before: Vec<Vec<f32>> = params.values().map(elements).collect();
        let mut shards = Shards::new(
            group,
            3,
            Store::Memory,
            &params,
            &toy::units(&chain),
            |_, _| Handling::default(),
            |_| Ok(None),
        )?;
        let held: usize = shards.owned().keys().map(|name| shards.part(name).unwrap().len()).sum();
        assert!((5 * 3..=6 * 3).contains(&held), "{held} of {}", 3 * 16);
        for (unit, (var, before)) in params.values().zip(&before).enumerate() {
            assert!(ops::replace(var, Vec::new())?.is_empty());
            shards.gather(unit, None)?;
            assert_eq!(elements(var), *before);
            shards.release(unit)?;
            assert!(ops::replace(var, Vec::new())?.is_empty());
        }
        Ok(())
    })
    .unwrap();
}
