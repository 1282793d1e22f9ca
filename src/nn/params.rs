//! Named parameters: created from a seed or taken from a checkpoint, always in order of name.
//!
//! candle's `VarMap` iterates a `HashMap` (another order in each process) and cannot seed its random
//! numbers on a CPU; both would break exact resumption, so parameters are ours.

use crate::{
    config::Precision,
    error::{Result, bail, ensure},
    ops,
};
use candle_core::{DType, Device, Shape, Tensor, Var};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fmt::Display,
    rc::Rc,
};

/// Trainable tensors by full name, in order of name.
pub type Params = BTreeMap<String, Var>;

/// How a fresh parameter is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `-bound..bound`.
    Uniform(f64),
}

enum Origin {
    /// Fresh parameters; empty ones are filled by whoever wants them.
    Seed {
        fresh: Fresh,
        empty: bool,
    },
    Tensors(HashMap<String, Tensor>),
}

/// What fresh parameters are filled with, each on its own when it is wanted.
#[derive(Clone)]
pub struct Fresh {
    seed: u64,
    /// Elements and filling by name.
    fillings: BTreeMap<String, (usize, Init)>,
}

impl Fresh {
    /// All elements of a parameter, f32.
    ///
    /// # Errors
    /// There is no such parameter.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let Some((count, init)) = self.fillings.get(name) else { bail!("there is no parameter `{name}`") };
        Ok(fill(self.seed, name, *count, *init))
    }
}

struct Store {
    origin: Origin,
    dtype: DType,
    device: Device,
    precision: Precision,
    params: Params,
}

/// A place in the tree of parameter names (`blocks.3.attention`), through which layers get theirs.
#[derive(Clone)]
pub struct Scope {
    store: Rc<RefCell<Store>>,
    prefix: String,
}

impl Scope {
    /// Fresh parameters; each is keyed by (`seed`, its name), so that it depends on no other.
    pub fn from_seed(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::new(Origin::Seed { fresh: Fresh { seed, fillings: BTreeMap::new() }, empty: false }, dtype, device)
    }

    /// The same parameters, f32 and empty (see [`ops::replace`]); [`Scope::fresh`] says what belongs into them. For
    /// ranks that hold a part of a model which is too large to be whole anywhere.
    pub fn empty_from_seed(seed: u64, device: &Device) -> Self {
        Self::new(Origin::Seed { fresh: Fresh { seed, fillings: BTreeMap::new() }, empty: true }, DType::F32, device)
    }

    /// What fresh parameters are filled with, in full precision.
    pub fn fresh(&self) -> Option<Fresh> {
        match &self.store.borrow().origin {
            Origin::Seed { fresh, .. } => Some(fresh.clone()),
            Origin::Tensors(_) => None,
        }
    }

    /// Parameters of a checkpoint, cast to `dtype`.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::new(Origin::Tensors(tensors), dtype, device)
    }

    fn new(origin: Origin, dtype: DType, device: &Device) -> Self {
        let (device, precision) = (device.clone(), Precision::F32);
        let store = Store { origin, dtype, device, precision, params: Params::new() };
        Self { store: Rc::new(RefCell::new(store)), prefix: String::new() }
    }

    /// The same for layers that multiply in `precision`. Their [`Scope::matmul_weight`]s are kept in it.
    pub fn in_precision(self, precision: Precision) -> Self {
        self.store.borrow_mut().precision = precision;
        self
    }

    /// What layers multiply in.
    pub fn precision(&self) -> Precision {
        self.store.borrow().precision
    }

    /// The scope `name` below this one.
    pub fn at(&self, name: impl Display) -> Self {
        Self { store: self.store.clone(), prefix: self.full_name(name) }
    }

    /// Where parameters lie.
    pub fn device(&self) -> Device {
        self.store.borrow().device.clone()
    }

    /// The full name of this place.
    pub fn name(&self) -> &str {
        &self.prefix
    }

    fn full_name(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// The parameter `name` of this scope with the given shape. The tensor shares its storage with the
    /// variable that the optimizer updates.
    ///
    /// # Errors
    /// A checkpoint lacks it or holds it in another shape.
    pub fn get(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let dtype = self.store.borrow().dtype;
        self.get_as(dtype, name, shape.into(), init)
    }

    /// The same of a parameter that nothing reads but products, and that is kept as they want it.
    ///
    /// # Errors
    /// As [`Scope::get`].
    pub fn matmul_weight(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let dtype = ops::matmul_weight_dtype(self.precision()).unwrap_or(self.store.borrow().dtype);
        self.get_as(dtype, name, shape.into(), init)
    }

    fn get_as(&self, dtype: DType, name: &str, shape: Shape, init: Init) -> Result<Tensor> {
        let name = self.full_name(name);
        let mut store = self.store.borrow_mut();
        let device = store.device.clone();
        let var = match &mut store.origin {
            Origin::Seed { fresh, empty } => {
                fresh.fillings.insert(name.clone(), (shape.elem_count(), init));
                if *empty {
                    let var = Var::zeros(shape, dtype, &device)?;
                    ops::replace(&var, Vec::new())?;
                    var
                } else {
                    Var::from_tensor(&Tensor::from_vec(fresh.values(&name)?, shape, &device)?.to_dtype(dtype)?)?
                }
            }
            Origin::Tensors(tensors) => {
                let Some(value) = tensors.remove(&name) else { bail!("tensor `{name}` is missing") };
                ensure!(value.shape() == &shape, "tensor `{name}` has shape {:?}, expected {shape:?}", value.dims());
                Var::from_tensor(&value.to_device(&device)?.to_dtype(dtype)?)?
            }
        };
        let tensor = var.as_tensor().clone();
        ensure!(store.params.insert(name.clone(), var).is_none(), "parameter `{name}` is defined twice");
        Ok(tensor)
    }

    /// All parameters handed out below this scope so far.
    pub fn params(&self) -> Params {
        let store = self.store.borrow();
        let below =
            |name: &str| self.prefix.is_empty() || name.strip_prefix(&self.prefix).is_some_and(|r| r.starts_with('.'));
        store.params.iter().filter(|(name, _)| below(name)).map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// Checks that a checkpoint held nothing that no layer asked for.
    pub fn finish(&self) -> Result<()> {
        if let Origin::Tensors(rest) = &self.store.borrow().origin {
            let mut names: Vec<_> = rest.keys().map(String::as_str).collect();
            names.sort_unstable();
            ensure!(names.is_empty(), "{} unknown tensors, the first is `{}`", names.len(), names[0]);
        }
        Ok(())
    }
}

fn fill(seed: u64, name: &str, count: usize, init: Init) -> Vec<f32> {
    let mut random = crate::random::Random::keyed(seed, &format!("init/{name}"), 0, 0);
    match init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Normal(std) => (0..count).map(|_| (random.normal() * std) as f32).collect(),
        Init::Uniform(bound) => (0..count).map(|_| ((random.unit() * 2.0 - 1.0) * bound) as f32).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_parameters_are_filled_as_the_others_are() {
        let (whole, empty) = (Scope::from_seed(7, DType::F32, &Device::Cpu), Scope::empty_from_seed(7, &Device::Cpu));
        let inits = [Init::Zeros, Init::Ones, Init::Normal(0.3), Init::Uniform(2.0)];
        for scope in [&whole, &empty] {
            for (i, init) in inits.into_iter().enumerate() {
                scope.at("layer").get(&i.to_string(), (3, 5), init).unwrap();
            }
        }
        let fresh = empty.fresh().unwrap();
        for (name, var) in whole.params() {
            let empty = &empty.params()[&name];
            assert_eq!(empty.shape(), var.shape());
            assert!(ops::replace(empty, Vec::new()).unwrap().is_empty());
            assert_eq!(fresh.values(&name).unwrap(), ops::with_slice(&var, <[f32]>::to_vec).unwrap(), "{name}");
        }
        assert!(fresh.values("layer.4").is_err());
    }
}
