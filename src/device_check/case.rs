//! One comparison: an op on a device against the same op in f64 on the CPU.

use super::Part;
use crate::{
    error::{Result, ensure},
    random::Random,
};
use candle_core::{DType, Device, Tensor, Var};
use half::bf16;
use serde::Serialize;

/// Some inputs → one output.
pub type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// What to compare.
pub struct Case {
    pub name: String,
    /// The shape of each input.
    pub inputs: Vec<Vec<usize>>,
    /// The type of the inputs on the device.
    pub dtype: DType,
    /// Computed on the device.
    pub tested: Function,
    /// Computed on the CPU in f64.
    pub reference: Function,
    /// Bound of the relative error.
    pub tolerance: f64,
}

/// The result of one comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub part: Part,
    pub name: String,
    /// Type of the numbers on the device: `f32`, `f16` or `bf16`.
    pub dtype: &'static str,
    /// Largest difference between an element and its reference, relative to the largest element of that tensor: of the
    /// output and of all gradients. `None`: the device computed nothing, or no numbers.
    pub error: Option<f64>,
    pub tolerance: f64,
    pub passed: bool,
    /// Why the device computed nothing.
    pub failure: Option<String>,
}

impl Check {
    /// The result of a computation that gave this error.
    pub fn new(part: Part, name: &str, dtype: DType, tolerance: f64, error: Result<f64>) -> Self {
        let failure = match &error {
            Ok(error) if error.is_finite() => None,
            Ok(_) => Some("the result is not a number".to_owned()),
            // Errors of candle may include a backtrace.
            Err(error) => Some(format!("{error:#}").lines().next().unwrap_or_default().to_owned()),
        };
        let error = error.ok().filter(|error| error.is_finite());
        let passed = error.is_some_and(|error| error <= tolerance);
        Self { part, name: name.to_owned(), dtype: dtype.as_str(), error, tolerance, passed, failure }
    }
}

impl Case {
    /// Computes both sides and compares them.
    pub fn check(&self, part: Part, device: &Device) -> Check {
        Check::new(part, &self.name, self.dtype, self.tolerance, self.error(device))
    }

    fn error(&self, device: &Device) -> Result<f64> {
        let expected = self.results(&self.reference, DType::F64, &Device::Cpu)?;
        let found = self.results(&self.tested, self.dtype, device)?;
        let errors = expected.iter().zip(&found).map(|(expected, found)| relative_error(expected, found));
        Ok(errors.collect::<Result<Vec<_>>>()?.into_iter().fold(0.0, f64::max))
    }

    /// The output and the gradient of each input, on the CPU.
    fn results(&self, function: &Function, dtype: DType, device: &Device) -> Result<Vec<Vec<f64>>> {
        let input = |(i, shape): (usize, &Vec<usize>)| {
            Ok(Var::from_tensor(&numbers("inputs", i, shape, device)?.to_dtype(dtype)?)?)
        };
        let vars = self.inputs.iter().enumerate().map(input).collect::<Result<Vec<Var>>>()?;
        let y = function(&vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>())?;
        // A sum in which each element has its own weight.
        let sum_type = if dtype == DType::F64 { dtype } else { DType::F32 };
        let weights = numbers("weights", 0, y.dims(), device)?.to_dtype(sum_type)?;
        // Flat, because candle's sum of a scalar asks a driver for no bytes.
        let gradients = (y.to_dtype(sum_type)? * weights)?.flatten_all()?.sum_all()?.backward()?;
        let mut all = vec![values(&y)?];
        for (i, var) in vars.iter().enumerate() {
            let gradient = gradients.get(var);
            ensure!(gradient.is_some(), "input {i} has no gradient");
            all.extend(gradient.map(values).transpose()?);
        }
        Ok(all)
    }
}

/// Standard normal numbers that every type represents exactly, in f32.
pub fn numbers(purpose: &str, index: usize, shape: &[usize], device: &Device) -> Result<Tensor> {
    let mut random = Random::keyed(5, purpose, 0, index as u64);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| bf16::from_f64(random.normal()).to_f32()).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(device)?)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The largest difference relative to the largest expected element; infinite if something is not a number.
fn relative_error(expected: &[f64], found: &[f64]) -> Result<f64> {
    ensure!(expected.len() == found.len(), "{} elements instead of {}", found.len(), expected.len());
    let largest = expected.iter().fold(1e-3, |largest: f64, x| largest.max(x.abs()));
    let difference = |(expected, found): (&f64, &f64)| match (found - expected).abs() {
        difference if difference.is_finite() => difference / largest,
        _ => f64::INFINITY,
    };
    Ok(expected.iter().zip(found).map(difference).fold(0.0, f64::max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(tested: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Check {
        let case = Case {
            name: "product".to_owned(),
            inputs: vec![vec![4, 5], vec![4, 5]],
            dtype: DType::F32,
            tested: Box::new(tested),
            reference: Box::new(|v| Ok((&v[0] * &v[1])?)),
            tolerance: 1e-5,
        };
        case.check(Part::Ops, &Device::Cpu)
    }

    #[test]
    fn a_check_fails_where_output_gradient_or_shape_differ() {
        let right = check(|v| Ok((&v[0] * &v[1])?));
        assert!(right.passed && right.failure.is_none() && right.error.is_some_and(|e| e < 1e-6), "{right:?}");
        let output = check(|v| Ok(((&v[0] * &v[1])? * 1.001)?));
        assert!(!output.passed && output.error.is_some_and(|e| e > 5e-4 && e < 2e-3), "{output:?}");
        // The output is the same, and the gradients are twice the right ones.
        let gradient = check(|v| {
            let (a, b) = (&v[0], &v[1]);
            Ok((((a * b)? * 2.0)? - (a.detach() * b.detach())?)?)
        });
        assert!(!gradient.passed && gradient.failure.is_none(), "{gradient:?}");
        let constant = check(|v| Ok((&v[0] * &v[1].detach())?));
        assert_eq!(constant.failure.as_deref(), Some("input 1 has no gradient"));
        let shape = check(|v| Ok((&v[0] * &v[1])?.narrow(0, 0, 3)?));
        assert!(!shape.passed && shape.error.is_none(), "{shape:?}");
        let nan = check(|v| Ok(((&v[0] * &v[1])? / 0.0)?));
        assert_eq!((nan.passed, nan.failure.as_deref()), (false, Some("the result is not a number")));
    }
}
