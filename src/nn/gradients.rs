//! Gradients of a step, accumulated over micro-batches and segments.

use crate::{
    error::{Result, ensure},
    ops::{gemm::Beta, with_slice_mut},
};
use candle_core::{DType, Device, Shape, Tensor};
use std::collections::BTreeMap;

/// Gradients of a step by parameter name, in f32. Their memory is reused from step to step.
#[derive(Default)]
pub struct Gradients(BTreeMap<String, Gradient>);

struct Gradient {
    sum: Tensor,
    /// Whether `sum` belongs to this step; otherwise it is only memory for reuse.
    live: bool,
}

impl Gradients {
    /// Clears all gradients but keeps their memory for the next step.
    pub fn clear(&mut self) {
        self.0.values_mut().for_each(|gradient| gradient.live = false);
    }

    /// Adds a gradient given as a tensor.
    pub fn add(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?;
        let sum = match self.get(name) {
            Some(sum) => sum.add(&gradient)?,
            None => gradient.contiguous()?,
        };
        self.0.insert(name.to_owned(), Gradient { sum: sum.detach(), live: true });
        Ok(())
    }

    /// Adds a gradient in place: `f` writes it ([`Beta::Zero`]: overwriting the buffer) or adds it to the sum.
    pub fn accumulate(&mut self, name: &str, shape: &Shape, f: impl FnOnce(&mut [f32], Beta)) -> Result<()> {
        if self.0.get(name).is_none_or(|gradient| gradient.sum.shape() != shape) {
            let sum = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
            self.0.insert(name.to_owned(), Gradient { sum, live: false });
        }
        let Some(gradient) = self.0.get_mut(name) else { return Ok(()) };
        let beta = if gradient.live { Beta::One } else { Beta::Zero };
        gradient.live = true;
        Ok(with_slice_mut(&gradient.sum, |sum| f(sum, beta))?)
    }

    /// Adds a short gradient given as a vector, such as that of a bias.
    pub fn accumulate_vector(&mut self, name: &str, values: Vec<f32>) -> Result<()> {
        self.accumulate(name, &Shape::from(values.len()), |sum, beta| match beta {
            Beta::Zero => sum.copy_from_slice(&values),
            Beta::One => sum.iter_mut().zip(&values).for_each(|(s, v)| *s += v),
        })
    }

    /// Adds all gradients of `other`.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        for (name, gradient) in other.0.into_iter().filter(|(_, gradient)| gradient.live) {
            self.add(&name, gradient.sum)?;
        }
        Ok(())
    }

    /// Removes a gradient and frees its memory.
    pub fn free(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// The gradient of the parameter `name`, if the loss of the step depends on it.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name).filter(|gradient| gradient.live).map(|gradient| &gradient.sum)
    }

    /// All gradients in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.0.iter().filter(|(_, gradient)| gradient.live).map(|(name, gradient)| (name, &gradient.sum))
    }

    /// Sum of absolute values of each of these gradients; `None` if there is no gradient.
    pub fn sizes(&self, names: &[&String]) -> Result<Vec<Option<f64>>> {
        let size = |name: &&String| {
            let Some(gradient) = self.get(name) else { return Ok(None) };
            Ok(Some(f64::from(gradient.abs()?.sum_all()?.to_scalar::<f32>()?)))
        };
        names.iter().map(size).collect()
    }
}

/// Checks, given their [`Gradients::sizes`], that all gradients exist, are finite and are not zero. candle drops some
/// gradients silently while the loss still falls, so this check runs at the first step.
///
/// # Errors
/// A gradient is missing, not finite or zero; the error names every such parameter.
pub fn check_complete(names: &[&String], sizes: &[Option<f64>]) -> Result<()> {
    let problem = |(name, size): (&&String, &Option<f64>)| match size {
        None => Some(format!("`{name}` has none")),
        Some(size) if !size.is_finite() => Some(format!("`{name}` is not finite")),
        Some(0.0) => Some(format!("`{name}` is zero")),
        Some(_) => None,
    };
    let bad: Vec<String> = names.iter().zip(sizes).filter_map(problem).collect();
    ensure!(bad.is_empty(), "gradients are wrong after the first step: {}", bad.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(gradients: &Gradients, name: &str) -> Vec<f32> {
        gradients.get(name).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn in_place_and_tensor_gradients_accumulate() {
        let mut gradients = Gradients::default();
        let write = |gradients: &mut Gradients, value: f32| {
            let f = |sum: &mut [f32], beta| match beta {
                Beta::Zero => sum.fill(value),
                Beta::One => sum.iter_mut().for_each(|s| *s += value),
            };
            gradients.accumulate("a", &Shape::from(2), f).unwrap();
        };
        write(&mut gradients, 1.0);
        write(&mut gradients, 2.0);
        gradients.add("a", Tensor::new(&[10f32, 20.0], &Device::Cpu).unwrap()).unwrap();
        assert_eq!(values(&gradients, "a"), [13.0, 23.0]);
        gradients.clear();
        assert!(gradients.get("a").is_none() && gradients.iter().next().is_none());
        write(&mut gradients, 4.0);
        assert_eq!(values(&gradients, "a"), [4.0, 4.0], "what was there before is overwritten");
    }

    #[test]
    fn the_check_names_missing_zero_and_infinite_gradients() {
        let mut gradients = Gradients::default();
        gradients.add("b", Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap()).unwrap();
        gradients.add("c", Tensor::new(&[f32::NAN, 1.0], &Device::Cpu).unwrap()).unwrap();
        let names = ["a", "b", "c"].map(String::from);
        let names: Vec<&String> = names.iter().collect();
        let message = check_complete(&names, &gradients.sizes(&names).unwrap()).unwrap_err().to_string();
        for part in ["`a` has none", "`b` is zero", "`c` is not finite"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
