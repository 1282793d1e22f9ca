//! The engine: gradients of one micro-batch over a chain of segments (paper §3.2).
//!
//! Forward runs segment by segment; backward goes through the chain from its end. `recompute` decides
//! whether what a segment saved is kept between the two or made again from its input; both give the same
//! bits. A segment's weights are needed only while it runs, and its gradients of this micro-batch are complete when its
//! backward pass ends: that is where [`Shards`] moves them in a sharded run.

use super::shards::Shards;
use crate::{
    error::{Context, Result, ensure},
    nn::segment::{Saved, Segment},
};
use candle_core::{DType, Device, Tensor};

/// A chain of segments; the last one returns the loss.
pub type Chain<'a, B> = [Box<dyn Segment<B> + 'a>];

/// What a forward pass keeps of one segment.
struct Link {
    input: Tensor,
    /// `None`: run forward again.
    saved: Option<Saved>,
}

/// Adds the gradients of one micro-batch to those in `shards` and returns its loss. Every `recompute`-th segment
/// forgets what it saved and runs forward again in the backward pass; 0: none does, 1: all do.
pub fn accumulate<B>(chain: &Chain<B>, batch: &B, recompute: usize, shards: &mut Shards) -> Result<f64> {
    let (links, loss) = forward(chain, batch, recompute, shards)?;
    let loss = loss.to_dtype(DType::F64)?.to_scalar::<f64>().context("the last segment must return a scalar")?;
    backward(chain, batch, links, shards)?;
    Ok(loss)
}

fn forward<B>(chain: &Chain<B>, batch: &B, recompute: usize, shards: &mut Shards) -> Result<(Vec<Link>, Tensor)> {
    let mut links = Vec::with_capacity(chain.len());
    // On the CPU whatever the device: nobody reads it, and a CUDA driver has no memory of length zero.
    let mut x = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
    for (i, segment) in chain.iter().enumerate() {
        // The last segment's backward comes at once: nothing is saved by forgetting what it needs.
        let last = i + 1 == chain.len();
        let next = if last { i.checked_sub(1) } else { Some(i + 1) };
        shards.gather(i, next)?;
        let (y, saved) = segment.forward(&x, batch).with_context(|| format!("segment `{}`", segment.name()))?;
        if !last {
            shards.release(i)?;
        }
        let keep = recompute == 0 || !(i + 1).is_multiple_of(recompute) || last;
        links.push(Link { input: x, saved: keep.then_some(saved) });
        x = y;
    }
    Ok((links, x))
}

fn backward<B>(chain: &Chain<B>, batch: &B, mut links: Vec<Link>, shards: &mut Shards) -> Result<()> {
    let mut dy = None;
    for (i, segment) in chain.iter().enumerate().rev() {
        let Some(Link { input, saved }) = links.pop() else { break };
        shards.gather(i, i.checked_sub(1))?;
        if !shards.idle(i) {
            let saved = match saved {
                Some(saved) => saved,
                None => segment.forward(&input, batch)?.1,
            };
            dy = segment.backward(&input, batch, saved, dy, shards.gradients())?;
        }
        shards.release(i)?;
        shards.reduce(i)?;
        ensure!(
            dy.is_some() || links.is_empty(),
            "segment `{}` passes no gradient on to the one before it",
            segment.name()
        );
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::nn::{
        gradients::{Gradients, check_complete},
        params::{Init, Params, Scope},
        segment::Taped,
    };

    /// `x -> tanh(x W)`, or the mean of squares at the end of the chain.
    pub struct Toy {
        name: String,
        params: Params,
        weight: Tensor,
        last: bool,
        pub loss_scale: f64,
    }

    impl Taped<Tensor> for Toy {
        fn name(&self) -> &str {
            &self.name
        }

        fn params(&self) -> &Params {
            &self.params
        }

        fn taped(&self, x: &Tensor, batch: &Tensor) -> Result<Tensor> {
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
            let weight = scope.get("weight", (4, 4), Init::Normal(0.5)).unwrap();
            Toy { name, params: scope.params(), weight, last: i + 1 == length, loss_scale: 1.0 }
        };
        let toys: Vec<_> = (0..length).map(link).collect();
        (scope.params(), toys)
    }

    pub fn segments(toys: &[Toy]) -> Vec<Box<dyn Segment<Tensor> + '_>> {
        toys.iter().map(|toy| Box::new(toy) as Box<dyn Segment<Tensor>>).collect()
    }

    /// The parameter names by segment.
    pub fn units(toys: &[Toy]) -> Vec<Vec<String>> {
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
            y = toy.taped(&y, &x).unwrap();
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
        let run_over = |seeds: std::ops::Range<u64>, recompute| {
            let mut shards = Shards::alone(&segments(&toys)).unwrap();
            for seed in seeds {
                accumulate(&segments(&toys), &inputs(seed), recompute, &mut shards).unwrap();
            }
            bits(shards.reduced())
        };
        let run = |recompute| run_over(0..2, recompute);
        for every in 1..5 {
            assert_eq!(run(every), run(0), "every {every}");
        }
        assert_ne!(run(0), run_over(0..1, 0));
    }
}
