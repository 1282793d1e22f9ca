//! Conversion between candle's tensors and the slices of kernels.

use super::simd::Real;
use candle_core::{
    CpuStorage, CudaStorage, DType, Device, Error, InplaceOp1, Layout, Result, Shape, Storage, StorageRef, Tensor,
    WithDType,
    backend::{BackendDevice, BackendStorage},
    bail,
};
use half::{bf16, f16};
use rayon::prelude::*;
use std::{cell::RefCell, marker::PhantomData, ops::Deref, ops::Range};

/// Number of elements per task of a parallel elementwise loop.
pub(super) const CHUNK: usize = 1 << 14;

/// Whether our kernels for CPUs compute with this tensor: it is on a CPU, and in f32 or f64.
pub fn has_cpu_kernels(x: &Tensor) -> bool {
    x.device().is_cpu() && !is_half(x.dtype())
}

/// Whether this is a floating-point type of 16 bits.
pub fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

/// `f` of x, computed in f32 where x is in half precision; the result is in the type of x.
pub fn in_f32(x: &Tensor, f: impl FnOnce(&Tensor) -> crate::error::Result<Tensor>) -> crate::error::Result<Tensor> {
    if is_half(x.dtype()) { Ok(f(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?) } else { f(x) }
}

/// Runs `$body` with `$T` as the element type of `$dtype` (`F32` or `F64`).
macro_rules! by_dtype {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            dtype => candle_core::bail!("{} is for f32 and f64, not {dtype:?}", $op),
        }
    };
}
pub(crate) use by_dtype;

fn contiguous(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => Err(Error::Msg("the kernel needs a contiguous tensor".into()).bt()),
    }
}

/// The elements of a contiguous CPU storage, inside a custom op.
pub fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    Ok(&T::cpu_storage_as_slice(storage)?[contiguous(layout)?])
}

/// A read lock on a tensor that dereferences to its elements.
pub struct View<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    elements: PhantomData<T>,
}

impl<T: WithDType> Deref for View<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            // `view` has checked device and dtype, and neither can change.
            Storage::Cpu(cpu) => T::cpu_storage_as_slice(cpu).map_or(&[], |all| &all[self.range.clone()]),
            _ => &[],
        }
    }
}

/// The elements of a contiguous CPU tensor.
pub fn view<T: WithDType>(tensor: &Tensor) -> Result<View<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = contiguous(layout)?;
    match &*storage {
        Storage::Cpu(cpu) => T::cpu_storage_as_slice(cpu)?,
        _ => bail!("the kernel needs a tensor on the CPU"),
    };
    Ok(View { storage, range, elements: PhantomData })
}

/// Calls `f` with the elements of a tensor in row-major order; from other devices they are copied to the CPU.
pub fn with_slice<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let result = f(&view(&tensor)?);
    Ok(result)
}

/// Calls `f` with the elements of a contiguous tensor, to change them in place. Tensors that share the storage (a `Var`
/// and the layers that use it) see the change; an autograd graph does not. On other devices, `f` changes a copy, which
/// is then written back.
pub fn with_slice_mut<T: Real, R>(tensor: &Tensor, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    struct Edit<T, F, R>(RefCell<(Option<F>, Option<R>)>, PhantomData<T>);

    impl<T: Real, F: FnOnce(&mut [T]) -> R, R> InplaceOp1 for Edit<T, F, R> {
        fn name(&self) -> &'static str {
            "edit in place"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let range = contiguous(layout)?;
            let Some(all) = T::elements_mut(storage) else { bail!("edit in place: expected {:?}", T::DTYPE) };
            let mut state = self.0.borrow_mut();
            if let Some(f) = state.0.take() {
                state.1 = Some(f(&mut all[range]));
            }
            Ok(())
        }
    }

    if !tensor.device().is_cpu() {
        return with_copy(tensor, f);
    }
    let edit = Edit(RefCell::new((Some(f), None)), PhantomData);
    tensor.inplace_op1(&edit)?;
    edit.0.into_inner().1.ok_or_else(|| Error::Msg("the tensor has no elements to edit".into()).bt())
}

/// [`with_slice_mut`] for other devices.
fn with_copy<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    contiguous(tensor.layout())?;
    let flat = tensor.flatten_all()?;
    let mut elements = flat.to_vec1()?;
    let result = f(&mut elements);
    flat.slice_set(&Tensor::from_vec(elements, flat.shape(), flat.device())?, 0, 0)?;
    Ok(result)
}

/// Replaces the elements of a tensor's storage, rounded to its dtype, and returns the old ones (f32 on a CPU; else
/// none). An empty vector frees the memory: until the elements are replaced again, no kernel may read a tensor with
/// this storage.
pub fn replace(tensor: &Tensor, elements: Vec<f32>) -> Result<Vec<f32>> {
    struct Replace(RefCell<Vec<f32>>);

    impl InplaceOp1 for Replace {
        fn name(&self) -> &'static str {
            "replace the elements"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            match storage {
                CpuStorage::F32(old) => std::mem::swap(old, &mut *self.0.borrow_mut()),
                storage => *storage = rounded(self.0.take(), storage.dtype())?,
            }
            Ok(())
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
            let mut elements = self.0.take();
            if elements.is_empty() {
                elements.push(0.0); // a driver may refuse memory of length zero
            }
            let elements = rounded(elements, storage.dtype())?;
            *storage = storage.device().storage_from_cpu_storage_owned(elements)?;
            Ok(())
        }
    }

    fn rounded(elements: Vec<f32>, dtype: DType) -> Result<CpuStorage> {
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(elements),
            DType::F16 => CpuStorage::F16(elements.into_par_iter().map(f16::from_f32).collect()),
            DType::BF16 => CpuStorage::BF16(elements.into_par_iter().map(bf16::from_f32).collect()),
            dtype => bail!("replace the elements: {dtype:?} is not a dtype of weights"),
        })
    }

    let elements = Replace(RefCell::new(elements));
    tensor.inplace_op1(&elements)?;
    Ok(elements.0.into_inner())
}

/// Copies the elements of `source` to a tensor's storage; both have the same dtype, shape and device. The storage may
/// be empty.
pub fn assign(tensor: &Tensor, source: &Tensor) -> Result<()> {
    struct Assign(Tensor);

    impl InplaceOp1 for Assign {
        fn name(&self) -> &'static str {
            "assign the elements"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            let (source, _) = self.0.storage_and_layout();
            let Storage::Cpu(source) = &*source else { bail!("assign the elements: they are elsewhere") };
            *storage = source.clone();
            Ok(())
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
            let (source, layout) = self.0.storage_and_layout();
            let Storage::Cuda(source) = &*source else { bail!("assign the elements: they are elsewhere") };
            *storage = source.try_clone(layout)?;
            Ok(())
        }
    }

    if (tensor.shape(), tensor.dtype()) != (source.shape(), source.dtype()) {
        bail!(
            "assign the elements: {:?} {:?} to {:?} {:?}",
            source.dtype(),
            source.dims(),
            tensor.dtype(),
            tensor.dims()
        );
    }
    // A view may only be a part of its storage.
    tensor.inplace_op1(&Assign(source.force_contiguous()?))
}

/// A new vector that `fill` writes, without the pass over memory that fills it with zeros first.
///
/// # Safety
/// `fill` must write every element and read none before it.
pub unsafe fn fresh<T: Real>(len: usize, fill: impl FnOnce(&mut [T])) -> Vec<T> {
    let mut vec: Vec<T> = Vec::with_capacity(len);
    // SAFETY: the memory is allocated for `len` elements, any bits are a float, and the caller's `fill` only
    // writes until it has written all of them.
    fill(unsafe { std::slice::from_raw_parts_mut(vec.as_mut_ptr(), len) });
    // SAFETY: as above.
    unsafe { vec.set_len(len) };
    vec
}

/// y += x.
pub fn add(y: &mut [f32], x: &[f32]) {
    let parts = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    parts.for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| *y += x));
}

/// A slice that several tasks write at once, each to rows of its own.
pub struct Scatter<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: rows are handed out under `row`'s contract only.
unsafe impl<T: Send> Sync for Scatter<'_, T> {}

impl<'a, T> Scatter<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// While it lives, no other row overlaps it.
    #[allow(clippy::mut_from_ref)] // the contract above is what makes it sound
    pub unsafe fn row(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "row out of bounds");
        // SAFETY: in bounds by the assertion, not aliased by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// What a custom op's forward pass returns.
pub fn storage<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((T::to_cpu_storage_owned(data), shape.into()))
}

/// A tensor of `data` for the results of a backward pass.
pub fn tensor<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_change_elements_reach_who_shares_them() -> Result<()> {
        let add = |x: &mut [f32]| x.iter_mut().zip([1.0, 2.0, 3.0, 4.0]).for_each(|(x, y)| *x += y);
        for copied in [false, true] {
            let edit = |tensor: &Tensor| if copied { with_copy(tensor, add) } else { with_slice_mut(tensor, add) };
            let whole = Tensor::ones((3, 2, 2), candle_core::DType::F32, &Device::Cpu)?;
            edit(&whole.get(1)?)?;
            let expected = [1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 1.0, 1.0, 1.0];
            assert_eq!(whole.flatten_all()?.to_vec1::<f32>()?, expected);
            assert!(edit(&whole.t()?).is_err(), "a copy that would be lost");
        }
        Ok(())
    }
}
