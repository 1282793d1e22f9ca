//! The engine: gradients of one micro-batch over a chain of segments (paper §3.2).
//!
//! Forward runs segment by segment, each on a detached input; backward goes through the chain from
//! its end, one tape at a time. `recompute` decides whether a segment's tape is kept between the two
//! or made again from its input; both give the same bits. Everything that a sharded run must move
//! passes through two places here: a segment's parameters are needed only inside [`forward`] and
//! [`backward`], and a gradient is final only when [`Gradients::add`] has it.

use crate::{
    error::{Context, Result, ensure},
    nn::segment::Segment,
};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, Var};
use std::collections::BTreeMap;

/// Gradients of a step by parameter name, added up over its micro-batches in f32.
#[derive(Default)]
pub struct Gradients(BTreeMap<String, Tensor>);

impl Gradients {
    fn add(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?;
        let sum = match self.0.remove(name) {
            Some(sum) => sum.add(&gradient)?,
            None => gradient.contiguous()?,
        };
        self.0.insert(name.to_owned(), sum.detach());
        Ok(())
    }

    /// The gradient of the parameter `name`, if the step's loss depends on it.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// All gradients in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter()
    }

    /// Checks that each of these parameters has a finite gradient that is not zero everywhere. candle cuts
    /// some gradients silently and the loss still falls, so this gate runs at the first step.
    ///
    /// # Errors
    /// Names every parameter that fails and why.
    pub fn check_complete<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> Result<()> {
        let mut bad = Vec::new();
        for name in names {
            let Some(gradient) = self.get(name) else {
                bad.push(format!("`{name}` has none"));
                continue;
            };
            let size = gradient.abs()?.sum_all()?.to_scalar::<f32>()?;
            if !size.is_finite() {
                bad.push(format!("`{name}` is not finite"));
            } else if size == 0.0 {
                bad.push(format!("`{name}` is zero"));
            }
        }
        ensure!(bad.is_empty(), "gradients are wrong after the first step: {}", bad.join(", "));
        Ok(())
    }
}

/// What a forward pass keeps of one segment.
struct Link {
    input: Var,
    /// The taped output; `None`: run forward again.
    output: Option<Tensor>,
}

/// Adds the gradients of one micro-batch to `gradients` and returns its loss.
pub fn accumulate<B>(
    segments: &[&dyn Segment<B>],
    batch: &B,
    recompute: bool,
    gradients: &mut Gradients,
) -> Result<f64> {
    let links = forward(segments, batch, recompute)?;
    let loss = links.last().and_then(|link| link.output.as_ref()).context("a chain of segments is empty")?;
    let loss = loss.to_dtype(DType::F64)?.to_scalar::<f64>().context("the last segment must return a scalar")?;
    backward(segments, batch, links, gradients)?;
    Ok(loss)
}

fn forward<B>(segments: &[&dyn Segment<B>], batch: &B, recompute: bool) -> Result<Vec<Link>> {
    let mut links = Vec::with_capacity(segments.len());
    let mut x = Tensor::zeros(0, DType::F32, &crate::runtime::device())?;
    for (i, segment) in segments.iter().enumerate() {
        let input = Var::from_tensor(&x)?;
        let y = segment.forward(&input, batch).with_context(|| format!("segment `{}`", segment.name()))?;
        x = y.detach();
        // The last segment's backward comes at once: nothing is saved by forgetting its tape.
        let keep = !recompute || i + 1 == segments.len();
        links.push(Link { input, output: keep.then_some(y) });
    }
    Ok(links)
}

fn backward<B>(segments: &[&dyn Segment<B>], batch: &B, mut links: Vec<Link>, gradients: &mut Gradients) -> Result<()> {
    let mut dy = None;
    for segment in segments.iter().rev() {
        let Some(Link { input, output }) = links.pop() else { break };
        let y = match output {
            Some(y) => y,
            None => segment.forward(&input, batch)?,
        };
        let mut store = match dy {
            None => y.backward()?,
            Some(dy) => seeded(&y, dy)?.backward()?,
        };
        drop(y);
        for (name, var) in segment.params() {
            if let Some(gradient) = store.remove(var) {
                gradients.add(name, gradient)?;
            }
        }
        dy = store.remove(&input);
        ensure!(
            dy.is_some() || links.is_empty(),
            "segment `{}` passes no gradient on to the one before it",
            segment.name()
        );
    }
    Ok(())
}

/// A scalar whose gradient with respect to `y` is `dy`.
fn seeded(y: &Tensor, dy: Tensor) -> Result<Tensor> {
    if y.device().is_cpu() {
        // Hands `dy` over as it is; the product's sum would pass over it six times.
        Ok(y.apply_op1(Seed(dy))?)
    } else {
        Ok((y * dy)?.sum_all()?)
    }
}

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, _grad_res: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::nn::params::{Init, Params, Scope};
    use candle_core::Device;

    /// `x -> tanh(x W)`, or the mean of squares at the end of the chain.
    pub struct Toy {
        name: String,
        params: Params,
        weight: Tensor,
        last: bool,
    }

    impl Segment<Tensor> for Toy {
        fn name(&self) -> &str {
            &self.name
        }

        fn params(&self) -> &Params {
            &self.params
        }

        fn forward(&self, x: &Tensor, batch: &Tensor) -> Result<Tensor> {
            let x = if x.elem_count() == 0 { batch } else { x };
            let y = x.matmul(&self.weight)?.tanh()?;
            Ok(if self.last { y.sqr()?.mean_all()? } else { y })
        }
    }

    pub fn chain(seed: u64, length: usize) -> (Params, Vec<Toy>) {
        let scope = Scope::from_seed(seed, DType::F32, &Device::Cpu);
        let link = |i: usize| {
            let name = format!("blocks.{i}");
            let scope = scope.at(&name);
            let weight = scope.get("weight", (4, 4), Init::Normal(0.5)).unwrap();
            Toy { name, params: scope.params(), weight, last: i + 1 == length }
        };
        let toys: Vec<_> = (0..length).map(link).collect();
        (scope.params(), toys)
    }

    pub fn segments(toys: &[Toy]) -> Vec<&dyn Segment<Tensor>> {
        toys.iter().map(|toy| toy as &dyn Segment<Tensor>).collect()
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
        let mut gradients = Gradients::default();
        let loss = accumulate(&segments(&toys), &x, false, &mut gradients).unwrap();
        let mut y = x.clone();
        for toy in &toys {
            y = toy.forward(&y, &x).unwrap();
        }
        assert_eq!(y.to_scalar::<f32>().unwrap() as f64, loss);
        let store = y.backward().unwrap();
        for (name, var) in &params {
            let difference = (gradients.get(name).unwrap() - store.get(var).unwrap()).unwrap();
            assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-7, "{name}");
        }
        gradients.check_complete(params.keys()).unwrap();
    }

    #[test]
    fn recomputation_changes_no_bit_and_micro_batches_add_up() {
        let (_, toys) = chain(3, 4);
        let run = |recompute| {
            let mut gradients = Gradients::default();
            for seed in 0..2 {
                accumulate(&segments(&toys), &inputs(seed), recompute, &mut gradients).unwrap();
            }
            bits(&gradients)
        };
        assert_eq!(run(true), run(false));
        let mut one = Gradients::default();
        accumulate(&segments(&toys), &inputs(0), false, &mut one).unwrap();
        assert_ne!(run(false), bits(&one));
    }

    #[test]
    fn the_gate_names_missing_zero_and_infinite_gradients() {
        let (params, _) = chain(1, 3);
        let mut gradients = Gradients::default();
        gradients.add("blocks.1.weight", Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap()).unwrap();
        gradients.add("blocks.2.weight", Tensor::new(&[f32::NAN, 1.0], &Device::Cpu).unwrap()).unwrap();
        let message = gradients.check_complete(params.keys()).unwrap_err().to_string();
        for part in ["`blocks.0.weight` has none", "`blocks.1.weight` is zero", "`blocks.2.weight` is not finite"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
