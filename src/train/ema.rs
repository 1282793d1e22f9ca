//! A moving average of the weights: what is published, sampled and evaluated.

use super::shards::Shards;
use crate::{error::Result, ops::Buffer};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The averages of the weights that this rank owns and trains, by parameter name.
pub type Average = BTreeMap<String, Buffer>;

/// The average before the first step: the weights themselves.
pub fn start(shards: &Shards) -> Result<Average> {
    shards.stored_parts()
}

/// `average += (1 - d) (weights - average)` with `d = min(decay, (1 + t) / (10 + t))` after the `t`-th update of the
/// weights, so that the random initial weights are forgotten early in a run.
pub fn update(average: &mut Average, shards: &Shards, decay: f64, updates: u64) -> Result<()> {
    let t = updates as f64;
    let rate = (1.0 - decay.min((1.0 + t) / (10.0 + t))) as f32;
    for (name, average) in average {
        match (&mut *average, shards.master(name)) {
            (Buffer::Device(average), Some(Buffer::Device(weights))) => {
                *average = (&*average + ((weights - &*average)? * f64::from(rate))?)?;
            }
            (average, _) => {
                let average = average.on_host()?;
                shards.with_part(name, |weights| {
                    let parts = average.par_chunks_mut(1 << 14).zip(weights.par_chunks(1 << 14));
                    parts.for_each(|(average, weights)| {
                        for (a, w) in average.iter_mut().zip(weights) {
                            *a += rate * (w - *a);
                        }
                    });
                })?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dist::Group,
        nn::params::Attributes,
        ops::Store,
        train::{engine::tests as toy, shards::Handling},
    };
    use candle_core::Device;

    #[test]
    fn follows_the_formula() {
        let group = Group::alone();
        for store in [Store::Memory, Store::Device(Device::Cpu)] {
            let (params, chain) = toy::chain(1, 1);
            let handling = |_: &str, _: Attributes| Handling::default();
            let names = toy::parameter_groups(&chain);
            let shards = Shards::new(&group, 0, store, &params, &names, handling, |_| Ok(None)).unwrap();
            let weights = params.values().next().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut average = start(&shards).unwrap();
            assert_eq!(*average.values().next().unwrap().values().unwrap(), weights);
            average.values_mut().for_each(|average| average.set(&[0.0; 16]).unwrap());
            update(&mut average, &shards, 0.5, 1).unwrap();
            update(&mut average, &shards, 0.5, 1000).unwrap();
            // d = 2 / 11 at step 1, then 0.5: what is missing shrinks by both.
            let expected = 1.0 - (2.0 / 11.0) * 0.5;
            for (a, w) in average.values().next().unwrap().values().unwrap().iter().zip(&weights) {
                assert!((a - w * expected).abs() < 1e-6, "{a} {w}");
            }
        }
    }
}
