//! Ops that candle's autograd takes for one op, with a gradient written by hand.
//!
//! Autograd keeps the result of every stock op of a forward pass, and its backward pass makes zeros and a sum for every
//! gradient. An op that is composed of several stock ops, or computed by a kernel, here keeps its arguments and its result
//! only, and passes one gradient to each argument.

use crate::error::Result;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, Result as CandleResult, Shape,
    Storage, Tensor,
    backend::{BackendDevice, BackendStorage},
    bail,
    op::BackpropOp,
};
use std::sync::{Mutex, PoisonError};

/// `forward` of one to three arguments as one op; `backward` computes the gradient of each argument from the arguments, the
/// result and its gradient. Autograd records nothing of either. The result of `forward` must be new memory, not that of an
/// argument.
///
/// # Errors
/// Those of `forward`, or the arguments are on different devices.
pub fn custom_gradient(
    name: &'static str,
    args: &[&Tensor],
    forward: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    backward: impl Fn(&[&Tensor], &Tensor, &Tensor) -> CandleResult<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let untracked: Vec<Tensor> = args.iter().map(|arg| arg.detach()).collect();
    Ok(Computed::of(forward(&untracked)?)?.differentiable(name, args, backward)?)
}

/// The memory of a result.
pub struct Computed {
    pub storage: Storage,
    pub shape: Shape,
}

/// Arguments, result and its gradient → the gradient of each argument.
type Backward = Box<dyn Fn(&[&Tensor], &Tensor, &Tensor) -> CandleResult<Vec<Tensor>> + Send + Sync>;

impl Computed {
    /// Takes the memory of a tensor that nobody else uses.
    fn of(y: Tensor) -> CandleResult<Self> {
        let y = y.contiguous()?;
        let taken = Take(Mutex::new(None));
        y.inplace_op1(&taken)?;
        match taken.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(storage) => Ok(Self { storage, shape: y.shape().clone() }),
            None => bail!("a result on a device that is neither a CPU nor CUDA"),
        }
    }

    /// A tensor without a gradient.
    pub fn tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, BackpropOp::none(), false)
    }

    /// A tensor that candle's autograd differentiates with respect to one to three arguments.
    ///
    /// # Errors
    /// There are no arguments or more than three, or they are on another device.
    pub fn differentiable(
        self,
        name: &'static str,
        args: &[&Tensor],
        backward: impl Fn(&[&Tensor], &Tensor, &Tensor) -> CandleResult<Vec<Tensor>> + Send + Sync + 'static,
    ) -> CandleResult<Tensor> {
        let op = Tracked { name, result: Mutex::new(Some(self)), backward: Box::new(backward) };
        match args {
            [a] => a.apply_op1(op),
            [a, b] => a.apply_op2(b, op),
            [a, b, c] => a.apply_op3(b, c, op),
            _ => bail!("{name}: {} arguments", args.len()),
        }
    }
}

/// Takes the memory out of a tensor.
struct Take(Mutex<Option<Storage>>);

impl Take {
    /// Leaves one element behind: a driver may refuse memory of length zero.
    fn take<S>(&self, storage: &mut S, layout: &Layout, of: fn(S) -> Storage) -> CandleResult<()>
    where
        S: BackendStorage,
        S::Device: BackendDevice<Storage = S>,
    {
        if layout.start_offset() != 0 {
            bail!("a result within the memory of another tensor");
        }
        // SAFETY: the tensor ends with its last owner, and nothing reads what is left.
        let left = unsafe { storage.device().alloc_uninit(&Shape::from(1), storage.dtype())? };
        let taken = of(std::mem::replace(storage, left));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
        Ok(())
    }
}

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take the memory"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
        self.take(storage, layout, Storage::Cpu)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> CandleResult<()> {
        self.take(storage, layout, Storage::Cuda)
    }
}

/// A custom op whose result has been computed already: it only connects the result with its arguments.
struct Tracked {
    name: &'static str,
    result: Mutex<Option<Computed>>,
    backward: Backward,
}

impl Tracked {
    fn take(&self) -> CandleResult<Computed> {
        match self.result.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(result) => Ok(result),
            None => bail!("{}: the result has been taken", self.name),
        }
    }

    fn gradients(&self, args: &[&Tensor], y: &Tensor, dy: &Tensor) -> CandleResult<std::vec::IntoIter<Tensor>> {
        let untracked: Vec<Tensor> = args.iter().map(|arg| arg.detach()).collect();
        let args: Vec<&Tensor> = untracked.iter().collect();
        Ok((self.backward)(&args, &y.detach(), &dy.detach().contiguous()?)?.into_iter())
    }

    fn on_cpu(&self) -> CandleResult<(CpuStorage, Shape)> {
        match self.take()? {
            Computed { storage: Storage::Cpu(storage), shape } => Ok((storage, shape)),
            _ => bail!("{}: the result is on another device than its arguments", self.name),
        }
    }

    fn on_cuda(&self) -> CandleResult<(CudaStorage, Shape)> {
        match self.take()? {
            Computed { storage: Storage::Cuda(storage), shape } => Ok((storage, shape)),
            _ => bail!("{}: the result is on another device than its arguments", self.name),
        }
    }
}

impl CustomOp1 for Tracked {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, a: &Tensor, y: &Tensor, dy: &Tensor) -> CandleResult<Option<Tensor>> {
        Ok(self.gradients(&[a], y, dy)?.next())
    }
}

impl CustomOp2 for Tracked {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, y: &Tensor, dy: &Tensor) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[a, b], y, dy)?;
        Ok((gradients.next(), gradients.next()))
    }
}

impl CustomOp3 for Tracked {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients(&[a, b, c], y, dy)?;
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients, normal, values};
    use candle_core::{DType, Device, Var};

    /// x · y of two arguments.
    fn product(v: &[Tensor]) -> Result<Tensor> {
        custom_gradient(
            "product",
            &[&v[0], &v[1]],
            |v| Ok((&v[0] * &v[1])?),
            |v, _, dy| Ok(vec![(v[1] * dy)?, (v[0] * dy)?]),
        )
    }

    #[test]
    fn the_gradient_is_that_of_the_backward_function() -> Result<()> {
        let vars = [normal("x", &[2, 3], DType::F64), normal("y", &[2, 3], DType::F64)];
        assert_gradients(&vars, &product)?;
        let double = Var::new(&[1f32, 2.0], &Device::Cpu)?;
        let wrong = |_: &[&Tensor], _: &Tensor, dy: &Tensor| Ok(vec![(dy * 5.0)?]);
        let y = custom_gradient("double", &[&double], |v| Ok((&v[0] * 2.0)?), wrong)?;
        assert_eq!(values(&y), [2.0, 4.0]);
        assert_eq!(values(y.backward()?.get(&double).expect("a gradient")), [5.0, 5.0]);
        Ok(())
    }

    /// The result may be a view of other memory than the arguments'.
    #[test]
    fn a_view_is_copied_and_arguments_stay() -> Result<()> {
        let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
        let keep = |_: &[&Tensor], _: &Tensor, dy: &Tensor| Ok(vec![dy.clone()]);
        let y = custom_gradient("turned", &[&x], |v| Ok((&v[0] + 1.0)?.t()?), keep)?;
        assert_eq!((values(&y), values(&x)), (vec![2.0, 4.0, 3.0, 5.0], vec![1.0, 2.0, 3.0, 4.0]));
        let part = custom_gradient("part", &[&x], |v| Ok((&v[0] + 1.0)?.narrow(0, 1, 1)?), keep);
        assert!(part.is_err_and(|e| e.to_string().contains("within the memory of another tensor")));
        Ok(())
    }
}
