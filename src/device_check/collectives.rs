//! Collectives of tensors in a group of one rank: each returns what it was given. With one GPU this is all of NCCL that can
//! be checked: the library is found, a communicator starts, and every collective runs on its stream.

use super::{
    Part,
    case::{Check, numbers},
};
use crate::{
    dist::Group,
    error::{Context, Result, ensure},
};
use candle_core::{DType, Device, Tensor};

/// Runs each collective on the device.
pub fn checks(device: &Device) -> Vec<Check> {
    let group = Group::alone();
    let started = group.use_nccl(device);
    let mut checks = vec![Check::new(Part::Collectives, "start", DType::F32, 0.0, started.map(|()| 0.0))];
    if !checks.iter().all(|check| check.passed) {
        return checks;
    }
    let mut check = |name: &str, dtype: DType, collective: &dyn Fn(&Tensor) -> Result<Tensor>| {
        checks.push(Check::new(Part::Collectives, name, dtype, 0.0, difference(device, dtype, collective)));
    };
    check("all-reduce", DType::F32, &|x| group.all_reduce_tensor(x));
    check("reduce-scatter", DType::F32, &|x| group.reduce_scatter_tensor(x, &[x.elem_count()]));
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        check("all-gather", dtype, &|x| {
            group.all_gather_tensor(x, &[x.elem_count()])?.pop().context("no rank sent anything")
        });
    }
    checks
}

/// The largest difference between what a collective was given and what it returned.
fn difference(device: &Device, dtype: DType, collective: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<f64> {
    let given = numbers("collective", 0, &[100_003], device)?.to_dtype(dtype)?;
    let result = collective(&given)?;
    ensure!(result.dtype() == dtype && result.dims() == given.dims(), "the result has another type or shape");
    let difference = (result.to_dtype(DType::F32)? - given.to_dtype(DType::F32)?)?.abs()?;
    Ok(f64::from(difference.flatten_all()?.max(0)?.to_scalar::<f32>()?))
}
