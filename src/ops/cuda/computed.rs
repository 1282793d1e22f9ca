//! Results of kernels as tensors, with a gradient that other kernels compute.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
    op::BackpropOp,
};
use std::sync::{Mutex, PoisonError};

/// What kernels have written.
pub struct Computed {
    pub storage: Storage,
    pub shape: Shape,
}

/// Arguments, result and its gradient → the gradient of each argument.
type Backward = Box<dyn Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync>;

impl Computed {
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
        backward: impl Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let op = Tracked { name, result: Mutex::new(Some(self)), backward: Box::new(backward) };
        match args {
            [a] => a.apply_op1(op),
            [a, b] => a.apply_op2(b, op),
            [a, b, c] => a.apply_op3(b, c, op),
            _ => bail!("{name}: {} arguments", args.len()),
        }
    }
}

/// A custom op whose result has been computed already: it only connects the result with its arguments.
struct Tracked {
    name: &'static str,
    result: Mutex<Option<Computed>>,
    backward: Backward,
}

impl Tracked {
    fn take(&self) -> Result<Computed> {
        match self.result.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(result) => Ok(result),
            None => bail!("{}: the result has been taken", self.name),
        }
    }

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Computed { storage: Storage::Cpu(storage), shape } => Ok((storage, shape)),
            _ => bail!("{}: the result is on another device than its arguments", self.name),
        }
    }

    fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
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

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, a: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok((self.backward)(&[a], y, &dy.contiguous()?)?.into_iter().next())
    }
}

impl CustomOp2 for Tracked {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = (self.backward)(&[a, b], y, &dy.contiguous()?)?.into_iter();
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
    ) -> Result<(CpuStorage, Shape)> {
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
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = (self.backward)(&[a, b, c], y, &dy.contiguous()?)?.into_iter();
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}
