//! The engine: forward and backward passes over a chain of segments (paper §3.2).
//!
//! [`Pass::forward`] runs segment by segment, [`Pass::backward`] from the end of the chain to its beginning. Activation
//! checkpointing decides whether what a segment saved is kept between the two or computed again from its input; both give
//! the same bits. A segment's weights are needed only while it runs, and its gradients of this micro-batch are complete
//! when its backward pass ends: that is where [`Shards`] moves them in a sharded run.
//!
//! [`accumulate`] is both passes of a chain that ends in a loss. A loss over several chains or micro-batches
//! (contrastive learning) runs all forward passes first, computes the loss and its gradients with respect to their
//! outputs, and hands these to the backward passes.

use super::shards::Shards;
use crate::{
    error::{Context, Result, ensure},
    nn::segment::{Chain, Saved},
};
use candle_core::{DType, Device, Tensor};

/// One micro-batch on its way through a chain of segments.
pub struct Pass<'a, B> {
    pub chain: &'a Chain<'a, B>,
    pub batch: &'a B,
    /// Index of the chain's first segment among the parameter groups of the shards; the other segments follow it. Each
    /// chain over the same shards has its own range of groups.
    pub first_unit: usize,
    /// Activation checkpointing: every k-th segment runs forward again in the backward pass (0: none, 1: all).
    pub activation_checkpointing: usize,
}

/// What a forward pass keeps for its backward pass, segment by segment.
pub struct Activations(Vec<Link>);

struct Link {
    input: Tensor,
    /// `None`: run forward again.
    saved: Option<Saved>,
}

/// Adds the gradients of one micro-batch to those in `shards` and returns its loss, the scalar that the last segment
/// returns. The chain's segments are the first parameter groups of `shards`; `activation_checkpointing` is that of [`Pass`].
///
/// # Errors
/// A segment fails, the last one returns no scalar, or a rank does not come.
pub fn accumulate<B>(chain: &Chain<B>, batch: &B, activation_checkpointing: usize, shards: &mut Shards) -> Result<f64> {
    let pass = Pass { chain, batch, first_unit: 0, activation_checkpointing };
    let (loss, activations) = pass.run(true, shards).map(|(loss, activations)| (loss.detach(), activations))?;
    pass.backward(activations, None, shards)?;
    // Read last: a device would have nothing to do while the host waits for the loss.
    scalar(&loss)
}

/// The loss of one micro-batch, the scalar that the last segment returns, without gradients.
///
/// # Errors
/// As [`accumulate`].
pub fn loss<B>(chain: &Chain<B>, batch: &B, shards: &mut Shards) -> Result<f64> {
    // Nothing is kept for a backward pass.
    let pass = Pass { chain, batch, first_unit: 0, activation_checkpointing: 1 };
    let (loss, _) = pass.run(false, shards)?;
    scalar(&loss)
}

fn scalar(loss: &Tensor) -> Result<f64> {
    loss.to_dtype(DType::F64)?.to_scalar::<f64>().context("the last segment must return a scalar")
}

impl<B> Pass<'_, B> {
    /// The output of the last segment, and what [`Pass::backward`] needs.
    ///
    /// # Errors
    /// A segment fails, or a rank does not come.
    pub fn forward(&self, shards: &mut Shards) -> Result<(Tensor, Activations)> {
        self.run(false, shards)
    }

    /// `backward_next`: the backward pass follows at once, so that nothing is saved by freeing what the last segment
    /// needs for it.
    fn run(&self, backward_next: bool, shards: &mut Shards) -> Result<(Tensor, Activations)> {
        let mut links = Vec::with_capacity(self.chain.len());
        // Always on the CPU: it is never read, and CUDA cannot allocate zero bytes.
        let mut x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
        for (i, segment) in self.chain.iter().enumerate() {
            let unit = self.first_unit + i;
            let last = i + 1 == self.chain.len();
            let next = match last {
                false => Some(unit + 1),
                true => self.before(i).filter(|_| backward_next),
            };
            shards.all_gather(unit, next)?;
            let (y, saved) =
                segment.forward(&x, self.batch).with_context(|| format!("segment `{}`", segment.name()))?;
            let stays = last && backward_next;
            if !stays {
                shards.reshard(unit)?;
            }
            let keep =
                stays || self.activation_checkpointing == 0 || !(i + 1).is_multiple_of(self.activation_checkpointing);
            links.push(Link { input: x, saved: keep.then_some(saved) });
            x = y;
        }
        Ok((x, Activations(links)))
    }

    /// Adds the parameters' gradients of this micro-batch to those in `shards`. `dy` is the loss's gradient with respect
    /// to the output of [`Pass::forward`], of its shape; `None`: that output is the loss, a scalar.
    ///
    /// # Errors
    /// A segment fails or passes no gradient on, or a rank does not come.
    pub fn backward(&self, activations: Activations, mut dy: Option<Tensor>, shards: &mut Shards) -> Result<()> {
        let Activations(mut links) = activations;
        let frozen = (0..self.chain.len()).take_while(|i| shards.is_frozen(self.first_unit + i)).count();
        for (i, segment) in self.chain.iter().enumerate().rev() {
            let Some(Link { input, saved }) = links.pop() else { break };
            let unit = self.first_unit + i;
            shards.all_gather(unit, self.before(i))?;
            // Segments before the first trainable one need no gradient.
            if i >= frozen {
                let saved = match saved {
                    Some(saved) => saved,
                    None => segment.forward(&input, self.batch)?.1,
                };
                dy = segment.backward(&input, self.batch, saved, dy, shards.gradients())?;
            }
            shards.reshard(unit)?;
            shards.reduce_scatter(unit)?;
            ensure!(
                // An empty input, as that of the first segment, needs none.
                dy.is_some() || links.is_empty() || input.elem_count() == 0,
                "segment `{}` passes no gradient on to the one before it",
                segment.name()
            );
        }
        Ok(())
    }

    /// Whether all parameters of the chain are frozen.
    pub fn is_frozen(&self, shards: &Shards) -> bool {
        (0..self.chain.len()).all(|i| shards.is_frozen(self.first_unit + i))
    }

    /// The parameter group of the segment before the `i`-th.
    fn before(&self, i: usize) -> Option<usize> {
        i.checked_sub(1).map(|i| self.first_unit + i)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        dist::{Group, launch},
        nn::{
            gradients::{Gradients, check_complete},
            params::{Attributes, Init, Params, Scope},
            segment::{Autograd, Segment},
        },
        ops::Store,
        train::shards::Handling,
    };
    use std::time::Duration;

    /// `x -> tanh(x W)`, or the mean of squares at the end of the chain.
    pub struct Toy {
        name: String,
        params: Params,
        weight: Tensor,
        last: bool,
        pub loss_scale: f64,
    }

    impl Autograd<Tensor> for Toy {
        fn name(&self) -> &str {
            &self.name
        }

        fn params(&self) -> &Params {
            &self.params
        }

        fn autograd(&self, x: &Tensor, batch: &Tensor) -> Result<Tensor> {
            let x = if x.elem_count() == 0 { batch } else { x };
            let y = x.matmul(&self.weight)?.tanh()?;
            Ok(if self.last { (y.sqr()?.mean_all()? * self.loss_scale)? } else { y })
        }
    }

    pub fn chain(seed: u64, length: usize) -> (Params, Vec<Toy>) {
        let scope = Scope::from_seed(seed, DType::F32, &Device::Cpu);
        let link = |i: usize| {
            let name = format!("blocks.{i}");
            let scope = scope.at(&name);
            let weight = scope.block_matrices("weight", (4, 4), Init::Normal(0.5), 1).unwrap();
            Toy { name, params: scope.params(), weight, last: i + 1 == length, loss_scale: 1.0 }
        };
        let toys: Vec<_> = (0..length).map(link).collect();
        (scope.params(), toys)
    }

    pub fn segments(toys: &[Toy]) -> Vec<Box<dyn Segment<Tensor> + '_>> {
        toys.iter().map(|toy| Box::new(toy) as Box<dyn Segment<Tensor>>).collect()
    }

    /// The parameter names by segment.
    pub fn parameter_groups(toys: &[Toy]) -> Vec<Vec<String>> {
        toys.iter().map(|toy| toy.params.keys().cloned().collect()).collect()
    }

    pub fn inputs(seed: u64) -> Tensor {
        let mut random = crate::random::Random::keyed(seed, "inputs", 0, 0);
        Tensor::from_vec((0..12).map(|_| random.normal() as f32).collect(), (3, 4), &Device::Cpu).unwrap()
    }

    fn bits(gradients: &Gradients) -> Vec<(String, Vec<u32>)> {
        let bits =
            |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
        gradients.iter().map(|(name, tensor)| (name.clone(), bits(tensor))).collect()
    }

    #[test]
    fn equals_one_tape_over_the_whole_chain() {
        let (params, toys) = chain(1, 3);
        let x = inputs(2);
        let mut shards = Shards::alone(&segments(&toys)).unwrap();
        let loss = accumulate(&segments(&toys), &x, 0, &mut shards).unwrap();
        let gradients = shards.reduced();
        let mut y = x.clone();
        for toy in &toys {
            y = toy.autograd(&y, &x).unwrap();
        }
        assert_eq!(y.to_scalar::<f32>().unwrap() as f64, loss);
        let store = y.backward().unwrap();
        for (name, var) in &params {
            let difference = (gradients.get(name).unwrap() - store.get(var).unwrap()).unwrap();
            assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-7, "{name}");
        }
        let names: Vec<&String> = params.keys().collect();
        check_complete(&names, &gradients.sizes(&names).unwrap()).unwrap();
    }

    #[test]
    fn recomputation_changes_no_bit_and_micro_batches_add_up() {
        let (_, toys) = chain(3, 4);
        let run_over = |seeds: std::ops::Range<u64>, activation_checkpointing| {
            let mut shards = Shards::alone(&segments(&toys)).unwrap();
            for seed in seeds {
                accumulate(&segments(&toys), &inputs(seed), activation_checkpointing, &mut shards).unwrap();
            }
            bits(shards.reduced())
        };
        let run = |activation_checkpointing| run_over(0..2, activation_checkpointing);
        for every in 1..5 {
            assert_eq!(run(every), run(0), "every {every}");
        }
        assert_ne!(run(0), run_over(0..1, 0));
    }

    fn assert_near(got: &Tensor, expected: &Tensor, what: &str) {
        let difference = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-7, "{what}: {difference}");
    }

    #[test]
    fn backward_of_a_given_gradient_equals_one_tape() {
        let (params, toys) = chain(1, 3);
        // Without the segment with the loss: the chain ends in an embedding of shape (3, 4).
        let (segments, x, dy) = (segments(&toys[..2]), inputs(2), inputs(3));
        let y = toys[1].autograd(&toys[0].autograd(&x, &x).unwrap(), &x).unwrap();
        let store = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        for activation_checkpointing in 0..3 {
            let mut shards = Shards::alone(&segments).unwrap();
            let pass = Pass { chain: &segments, batch: &x, first_unit: 0, activation_checkpointing };
            let (embedding, activations) = pass.forward(&mut shards).unwrap();
            assert_near(&embedding, &y, "embedding");
            pass.backward(activations, Some(dy.clone()), &mut shards).unwrap();
            for name in ["blocks.0.weight", "blocks.1.weight"] {
                assert_near(shards.reduced().get(name).unwrap(), store.get(&params[name]).unwrap(), name);
            }
        }
    }

    /// Two towers over one set of shards, each with two micro-batches whose gradients come from outside.
    fn towers(group: &Group, stage: u8, together: bool) -> Result<Vec<(String, Vec<u32>)>> {
        let (params, toys) = chain(5, 4);
        let ranges = [0..2, 2..4];
        let mut all: Vec<(String, Vec<u32>)> = Vec::new();
        let sets = if together { vec![ranges.to_vec()] } else { ranges.map(|range| vec![range]).to_vec() };
        for set in sets {
            let first = set[0].start;
            let ours = &toys[first..set[set.len() - 1].end];
            let names: Vec<String> = ours.iter().flat_map(|toy| toy.params.keys().cloned()).collect();
            let params: Params = names.iter().map(|name| (name.clone(), params[name].clone())).collect();
            let handling = |_: &str, _: Attributes| Handling::default();
            let mut shards =
                Shards::new(group, stage, Store::Memory, &params, &parameter_groups(ours), handling, |_| Ok(None))?;
            shards.begin(1);
            let batches = [2, 3].map(|seed| inputs(seed + 10 * group.rank() as u64));
            let chains: Vec<_> = set.iter().map(|range| segments(&toys[range.clone()])).collect();
            let mut passes = Vec::new();
            for batch in &batches {
                for (chain, range) in chains.iter().zip(&set) {
                    let pass = Pass { chain, batch, first_unit: range.start - first, activation_checkpointing: 2 };
                    let (_, activations) = pass.forward(&mut shards)?;
                    passes.push((pass, activations));
                }
            }
            for (i, (pass, activations)) in passes.into_iter().enumerate() {
                if i == chains.len() {
                    shards.last_micro_batch();
                }
                // The second tower ends in a scalar.
                let dy = match pass.chain[1].name() {
                    "blocks.1" => inputs(20),
                    _ => Tensor::new(0.5f32, &Device::Cpu)?,
                };
                pass.backward(activations, Some(dy), &mut shards)?;
            }
            shards.finish()?;
            all.extend(bits(shards.reduced()));
            for unit in 0..ours.len() {
                shards.all_gather(unit, None)?;
            }
        }
        Ok(all)
    }

    #[test]
    fn two_chains_over_one_set_of_shards_equal_each_alone() {
        for (ranks, stage) in [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)] {
            for overlap in [false, true] {
                launch(ranks, Duration::from_secs(60), |group| {
                    if overlap {
                        group.overlap()?;
                    }
                    let (together, alone) = (towers(group, stage, true)?, towers(group, stage, false)?);
                    assert!(together == alone && !together.is_empty(), "{ranks} ranks, stage {stage}");
                    Ok(())
                })
                .unwrap();
            }
        }
    }
}
