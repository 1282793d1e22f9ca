//! Named parameters: created from a seed or taken from a checkpoint, always in order of name.
//!
//! candle's `VarMap` iterates a `HashMap` (another order in each process) and cannot seed its random
//! numbers on a CPU; both would break exact resumption, so parameters are ours.

use crate::{
    config::{Lora, Precision},
    error::{Result, bail, ensure},
    ops,
};
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor, Var, op::BackpropOp};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fmt::Display,
    ops::Deref,
    rc::Rc,
};

/// Parameters by full name, in order of name.
pub type Params = BTreeMap<String, Param>;

/// A variable, and how training treats it.
#[derive(Debug, Clone)]
pub struct Param {
    pub var: Var,
    pub attributes: Attributes,
}

impl Deref for Param {
    type Target = Var;

    fn deref(&self) -> &Var {
        &self.var
    }
}

/// How training treats a parameter. The layer that makes the parameter decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Decoupled weight decay applies: to matrices and convolutions, not to biases, norms, embeddings and codebooks.
    pub weight_decay: bool,
    /// The matrices stacked along the first dimension, if this is the weight of a linear layer in a transformer block
    /// (query, key and value: 3). Muon can update these, and such a layer rounds its weight to the compute precision.
    pub block_matrices: Option<usize>,
    /// Statistics that are updated by formula, such as those of an EMA codebook, have no gradient.
    pub requires_grad: bool,
    /// Its gradient is part of the global norm and is clipped. A discriminator, which has a loss of its own, is left out.
    pub clipped: bool,
    /// Weight of a model under low-rank adapters: it stays as it is, and checkpoints leave it out.
    pub base: bool,
}

/// How a fresh parameter is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `-bound..bound`.
    Uniform(f64),
}

enum Origin {
    /// Fresh parameters. If they are empty, the caller fills them.
    Seed {
        fresh: Fresh,
        empty: bool,
    },
    Tensors(HashMap<String, Tensor>),
}

/// The initial values of fresh parameters, computed one parameter at a time.
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
    /// Low-rank adapters of the linear layers in transformer blocks, where these are trained and not the layers.
    lora: Option<Lora>,
    params: Params,
}

/// A place in the tree of parameter names (`blocks.3.attention`), through which layers get theirs.
#[derive(Clone)]
pub struct Scope {
    store: Rc<RefCell<Store>>,
    prefix: String,
    clipped: bool,
}

impl Scope {
    /// Fresh parameters; each is keyed by (`seed`, its name), so that it depends on no other.
    pub fn from_seed(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::new(Origin::Seed { fresh: Fresh { seed, fillings: BTreeMap::new() }, empty: false }, dtype, device)
    }

    /// The same parameters, f32 and empty (see [`ops::replace`]); [`Scope::fresh`] has their initial values. For
    /// ranks that hold only a part of a model.
    pub fn empty_from_seed(seed: u64, device: &Device) -> Self {
        Self::new(Origin::Seed { fresh: Fresh { seed, fillings: BTreeMap::new() }, empty: true }, DType::F32, device)
    }

    /// The initial values of fresh parameters, f32.
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
        let store = Store { origin, dtype, device, precision, lora: None, params: Params::new() };
        Self { store: Rc::new(RefCell::new(store)), prefix: String::new(), clipped: true }
    }

    /// The same for parameters with a loss of their own: their gradients are neither part of the global norm nor clipped.
    pub fn without_clipping(self) -> Self {
        Self { clipped: false, ..self }
    }

    /// The same for layers that multiply in `precision`. [`Scope::block_matrices`] are stored in it.
    pub fn in_precision(self, precision: Precision) -> Self {
        self.store.borrow_mut().precision = precision;
        self
    }

    /// The same where the parameters that follow are a frozen base, to which [`Scope::adapter`] adds low-rank adapters.
    /// Nothing changes if `lora` is off.
    pub fn with_lora(self, lora: &Lora) -> Self {
        self.store.borrow_mut().lora = lora.is_on().then(|| lora.clone());
        self
    }

    /// The low-rank adapters, if the parameters are the base of any.
    pub fn lora(&self) -> Option<Lora> {
        self.store.borrow().lora.clone()
    }

    /// What layers multiply in.
    pub fn precision(&self) -> Precision {
        self.store.borrow().precision
    }

    /// The scope `name` below this one.
    pub fn at(&self, name: impl Display) -> Self {
        Self { prefix: self.full_name(name), ..self.clone() }
    }

    /// The device of the parameters.
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
    /// variable that the optimizer updates. Weight decay applies if it has two dimensions or more.
    ///
    /// # Errors
    /// A checkpoint lacks it or holds it in another shape.
    pub fn get(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let shape = shape.into();
        let attributes = Attributes { weight_decay: shape.rank() >= 2, ..self.attributes() };
        self.make(name, shape, init, self.dtype(), attributes)
    }

    /// The same for the rows of an embedding, of positions or of a codebook: without weight decay.
    ///
    /// # Errors
    /// As [`Scope::get`].
    pub fn table(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        self.make(name, shape.into(), init, self.dtype(), self.attributes())
    }

    /// The same for what is updated by formula and not by gradients.
    ///
    /// # Errors
    /// As [`Scope::get`].
    pub fn statistics(&self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let attributes = Attributes { requires_grad: false, ..self.attributes() };
        self.make(name, shape.into(), init, self.dtype(), attributes)
    }

    /// The same for `stacked` matrices of a transformer block, which only matrix products read: on a device they are
    /// stored in the scope's precision.
    ///
    /// # Errors
    /// As [`Scope::get`].
    pub fn block_matrices(&self, name: &str, shape: (usize, usize), init: Init, stacked: usize) -> Result<Tensor> {
        let dtype = ops::matmul_weight_dtype(self.precision()).unwrap_or(self.dtype());
        let attributes = Attributes { weight_decay: true, block_matrices: Some(stacked), ..self.attributes() };
        self.make(name, shape.into(), init, dtype, attributes)
    }

    /// A matrix of a low-rank adapter, which is trained although its scope belongs to a frozen base.
    ///
    /// # Errors
    /// As [`Scope::get`].
    pub fn adapter(&self, name: &str, shape: (usize, usize), init: Init) -> Result<Tensor> {
        let attributes = Attributes { weight_decay: true, requires_grad: true, base: false, ..self.attributes() };
        self.make(name, shape.into(), init, self.dtype(), attributes)
    }

    /// The attributes of a parameter of this scope without weight decay.
    fn attributes(&self) -> Attributes {
        let base = self.store.borrow().lora.is_some();
        Attributes { weight_decay: false, block_matrices: None, requires_grad: !base, clipped: self.clipped, base }
    }

    fn dtype(&self) -> DType {
        self.store.borrow().dtype
    }

    fn make(&self, name: &str, shape: Shape, init: Init, dtype: DType, attributes: Attributes) -> Result<Tensor> {
        let name = self.full_name(name);
        let mut store = self.store.borrow_mut();
        let device = store.device.clone();
        let var = match &mut store.origin {
            Origin::Seed { fresh, empty } => {
                fresh.fillings.insert(name.clone(), (shape.elem_count(), init));
                if *empty && device.is_cpu() && dtype == DType::F32 {
                    // Never allocated: the size may be that of a model that fits nowhere.
                    let storage = Storage::Cpu(CpuStorage::F32(Vec::new()));
                    Var::from_tensor(&Tensor::from_storage(storage, shape, BackpropOp::none(), true))?
                } else if *empty {
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
        let param = Param { var, attributes };
        ensure!(store.params.insert(name.clone(), param).is_none(), "parameter `{name}` is defined twice");
        Ok(tensor)
    }

    /// All parameters handed out below this scope so far.
    pub fn params(&self) -> Params {
        let store = self.store.borrow();
        let below =
            |name: &str| self.prefix.is_empty() || name.strip_prefix(&self.prefix).is_some_and(|r| r.starts_with('.'));
        store.params.iter().filter(|(name, _)| below(name)).map(|(name, param)| (name.clone(), param.clone())).collect()
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
        Init::Constant(value) => vec![value as f32; count],
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
