//! Runs kernels on the CPU, as emulator.hpp does it: compiles them as C++ with `c++`, and calls them in several orders of blocks
//! and threads, which must all give the same bits.
//!
//! Each run has its own copies of inputs and outputs, with bytes around them that no kernel may change. These bytes, and those
//! that outputs are first filled with, differ from run to run: what is read outside of a tensor, or not written, shows.

use super::call::{Address, Arg, Call, Calls, Output};
use crate::{
    error::{Context, ensure},
    ops::custom_gradient::Computed,
    report,
};
use candle_core::{CpuStorage, DType, Error, Result, Storage, Tensor, bail};
use half::bf16;
use std::{
    cell::Cell,
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
    process::Command,
    sync::OnceLock,
};

/// Orders of blocks and threads: forward, backward, and two shuffled.
const ORDERS: [u64; 4] = [0, 1, 2, 3];

/// Bytes before and behind each tensor.
const GUARD: usize = 64;

/// The function `vilg_emulate` of emulator.cpp.
type Emulate = unsafe extern "C" fn(
    name: *const c_char,
    grid_x: u32,
    grid_y: u32,
    threads: u32,
    shared_bytes: u32,
    args: *const *const c_void,
    sizes: *const usize,
    count: usize,
    order: u64,
) -> *const c_char;

thread_local! {
    static LAUNCHES: Cell<usize> = const { Cell::new(0) };
}

/// Launches on this thread so far: what a test asks that must not fall back to stock ops.
pub fn launches() -> usize {
    LAUNCHES.get()
}

/// Whether there is a C++ compiler; a test without one says so and ends.
pub fn available() -> bool {
    static ASKED: OnceLock<bool> = OnceLock::new();
    *ASKED.get_or_init(|| {
        let found = Command::new("c++").arg("--version").output().is_ok_and(|output| output.status.success());
        if !found {
            report::warn("the CUDA kernels are not tested here: there is no C++ compiler `c++`");
        }
        found
    })
}

/// As [`super::run`].
pub fn run(inputs: &[&Tensor], outputs: &[Output], calls: Calls) -> Result<Vec<Computed>> {
    let given = inputs.iter().map(|input| bytes(input)).collect::<Result<Vec<_>>>()?;
    let sizes: Vec<usize> = outputs.iter().map(|o| o.shape.elem_count() * o.dtype.size_in_bytes()).collect();
    let results = in_all_orders(&given, &sizes, calls).map_err(|error| Error::msg(format!("{error:#}")))?;
    let computed = |(output, bytes): (&Output, Vec<u8>)| {
        let storage = match output.dtype {
            DType::F32 => CpuStorage::F32(floats(&bytes)),
            DType::BF16 => CpuStorage::BF16(halves(&bytes)),
            dtype => bail!("there is no kernel that writes {dtype:?}"),
        };
        Ok(Computed { storage: Storage::Cpu(storage), shape: output.shape.clone() })
    };
    outputs.iter().zip(results).map(computed).collect()
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    if !tensor.is_contiguous() {
        bail!("a kernel needs contiguous tensors");
    }
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::F32 => bytemuck::cast_slice(&flat.to_vec1::<f32>()?).to_vec(),
        DType::U32 => bytemuck::cast_slice(&flat.to_vec1::<u32>()?).to_vec(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().flat_map(|x| x.to_bits().to_ne_bytes()).collect(),
        dtype => bail!("there is no kernel for {dtype:?}"),
    })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_ne_bytes([four[0], four[1], four[2], four[3]])).collect()
}

fn halves(bytes: &[u8]) -> Vec<bf16> {
    bytes.chunks_exact(2).map(|pair| bf16::from_bits(u16::from_ne_bytes([pair[0], pair[1]]))).collect()
}

/// The outputs, of `sizes` bytes each, if they are the same in every order.
fn in_all_orders(inputs: &[Vec<u8>], sizes: &[usize], calls: Calls) -> crate::error::Result<Vec<Vec<u8>>> {
    let first = once(inputs, sizes, calls, ORDERS[0])?;
    for order in &ORDERS[1..] {
        let other = once(inputs, sizes, calls, *order)?;
        for (i, (a, b)) in first.iter().zip(&other).enumerate() {
            let at = a.iter().zip(b).position(|(a, b)| a != b);
            ensure!(
                at.is_none(),
                "byte {at:?} of output {i} depends on the order of blocks and threads, is not written, or depends on what is \
                 outside of the inputs"
            );
        }
    }
    Ok(first)
}

fn once(inputs: &[Vec<u8>], sizes: &[usize], calls: Calls, order: u64) -> crate::error::Result<Vec<Vec<u8>>> {
    let guard = if order.is_multiple_of(2) { u8::MAX } else { 1 };
    let mut from: Vec<Guarded> = inputs.iter().map(|bytes| Guarded::of(bytes, guard)).collect();
    let mut to: Vec<Guarded> = sizes.iter().map(|size| Guarded::of(&vec![!guard; *size], guard)).collect();
    let addresses = |all: &mut [Guarded]| all.iter_mut().map(Guarded::address).collect::<Vec<_>>();
    for call in calls(&addresses(&mut from), &addresses(&mut to)) {
        launch(&call, order).with_context(|| format!("{} in order {order}", call.kernel))?;
    }
    for (input, before) in from.iter().zip(inputs) {
        ensure!(input.inner() == before && input.is_intact(), "an input was changed, or what surrounds it");
    }
    ensure!(to.iter().all(Guarded::is_intact), "a kernel writes outside of its output");
    Ok(to.iter().map(|output| output.inner().to_vec()).collect())
}

fn launch(call: &Call, order: u64) -> crate::error::Result<()> {
    let (args, sizes): (Vec<*const c_void>, Vec<usize>) = call.args.iter().map(address_and_size).unzip();
    let name = CString::new(call.kernel.as_str())?;
    let ([x, y], threads, shared) = (call.grid, u32::try_from(call.threads)?, u32::try_from(call.shared_bytes)?);
    let (x, y, emulate) = (u32::try_from(x)?, u32::try_from(y)?, library()?);
    // SAFETY: the function is that of emulator.cpp, which checks name, number and sizes of the arguments. The message lives until
    // this thread's next call.
    let error = unsafe {
        let error = emulate(name.as_ptr(), x, y, threads, shared, args.as_ptr(), sizes.as_ptr(), args.len(), order);
        (!error.is_null()).then(|| CStr::from_ptr(error).to_string_lossy().into_owned())
    };
    ensure!(error.is_none(), "{}", error.unwrap_or_default());
    LAUNCHES.set(LAUNCHES.get() + 1);
    Ok(())
}

fn address_and_size(arg: &Arg) -> (*const c_void, usize) {
    match arg {
        Arg::Pointer(address) => ((&raw const *address).cast(), size_of::<u64>()),
        Arg::Size(size) => ((&raw const *size).cast(), size_of::<i64>()),
        Arg::Float(number) => ((&raw const *number).cast(), size_of::<f32>()),
    }
}

/// Compiles the kernels, once in a process.
fn library() -> crate::error::Result<Emulate> {
    static LIBRARY: OnceLock<std::result::Result<Emulate, String>> = OnceLock::new();
    LIBRARY.get_or_init(|| compile().map_err(|error| format!("{error:#}"))).clone().map_err(crate::error::Error::msg)
}

fn compile() -> crate::error::Result<Emulate> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("kernels.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda/emulator.cpp");
    let flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared", "-o"];
    let output = Command::new("c++").args(flags).arg(&file).arg(source).output()?;
    ensure!(output.status.success(), "the kernels do not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    let path = CString::new(file.to_str().context("the temporary folder has no name in UTF-8")?)?;
    // SAFETY: the library runs nothing when it is loaded, and is never closed. The symbol has this type.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        ensure!(!library.is_null(), "the kernels cannot be loaded");
        let symbol = libc::dlsym(library, c"vilg_emulate".as_ptr());
        ensure!(!symbol.is_null(), "the library has no function vilg_emulate");
        Ok(std::mem::transmute::<*mut c_void, Emulate>(symbol))
    }
}

/// Bytes between two guards, aligned as the memory of a device.
struct Guarded {
    words: Vec<u64>,
    size: usize,
    guard: u8,
}

impl Guarded {
    fn of(inner: &[u8], guard: u8) -> Self {
        let mut words = vec![u64::from_ne_bytes([guard; 8]); (inner.len() + 2 * GUARD).div_ceil(size_of::<u64>())];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[GUARD..][..inner.len()].copy_from_slice(inner);
        Self { words, size: inner.len(), guard }
    }

    fn address(&mut self) -> Address {
        Address(self.words.as_mut_ptr() as u64 + GUARD as u64)
    }

    fn inner(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[GUARD..][..self.size]
    }

    fn is_intact(&self) -> bool {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        bytes[..GUARD].iter().chain(&bytes[GUARD + self.size..]).all(|byte| *byte == self.guard)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::run, *};
    use candle_core::Device;

    /// Runs a kernel of faulty.cu, over four blocks of two warps.
    fn faulty(name: &str) -> Result<Vec<f32>> {
        let from = Tensor::arange(0f32, 256.0, &Device::Cpu)?.affine(1.0, 0.1)?;
        let [to] = run(&[&from], [Output::new(256, DType::F32)], &|from, to| {
            vec![Call::new(name, &[], [4, 1], 64).with(from[0]).with(to[0])]
        })?;
        to.tensor().to_vec1()
    }

    #[test]
    fn a_right_kernel_passes() -> Result<()> {
        if !available() {
            return Ok(());
        }
        let found = faulty("reversed")?;
        let expected: Vec<f32> = (0..256).map(|i| (i / 64 * 64 + 63 - i % 64) as f32 + 0.1).collect();
        assert_eq!(found, expected);
        Ok(())
    }

    /// As `half` does it, ties to even, infinities and not-a-number included.
    #[test]
    fn kernels_round_to_bf16_as_the_cpu() -> Result<()> {
        if !available() {
            return Ok(());
        }
        let bits = (0..4000_u32).map(|i| i.wrapping_mul(2_654_435_761)).chain([
            0x3f80_8000,
            0x3f81_8000,
            0x3f80_8001,
            0x7fff_ffff,
            0x7f80_0001,
        ]);
        let special = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -0.0, f32::MIN_POSITIVE, f32::NAN, -f32::NAN, 1e-45];
        let numbers: Vec<f32> = bits.map(f32::from_bits).chain(special).collect();
        let from = Tensor::new(numbers.as_slice(), &Device::Cpu)?;
        // The sum of one row is the row.
        let [to] = run(&[&from], [Output::new(numbers.len(), DType::BF16)], &|from, to| {
            vec![Call::column_sums(DType::BF16, from[0], to[0], [1, numbers.len()])]
        })?;
        for (x, found) in numbers.iter().zip(to.tensor().to_vec1::<bf16>()?) {
            let expected = bf16::from_f32(x + 0.0);
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{x:e}: {found} instead of {expected}");
        }
        Ok(())
    }

    /// The race check and the others fail where they should.
    #[test]
    fn faults_are_found() {
        if !available() {
            return;
        }
        for (name, message) in [
            ("faulty_shared", "the same shared element without a barrier between"),
            ("faulty_global", "depends on the order of blocks and threads"),
            ("faulty_blocks", "depends on the order of blocks and threads"),
            ("faulty_barrier", "waits for others at a barrier"),
            ("faulty_shuffle", "waits for others at a shuffle"),
            ("faulty_index", "index 16 of 16 shared elements"),
            ("faulty_overrun", "writes outside of its output"),
            ("faulty_read", "or depends on what is outside of the inputs"),
            ("faulty_unwritten", "is not written"),
            ("faulty_nothing", "there is no such kernel"),
        ] {
            let error = faulty(name).expect_err(name).to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
    }

    #[test]
    fn launches_that_no_gpu_accepts_are_errors() {
        if !available() {
            return;
        }
        let from = Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap();
        let launched = |grid: [usize; 2], threads: usize, shared_bytes: usize, more: usize| {
            let calls = |from: &[Address], to: &[Address]| {
                let call =
                    Call::new("reversed", &[], grid, threads).with(from[0]).with(to[0]).with_shared(shared_bytes);
                vec![(0..more).fold(call, Call::with)]
            };
            run(&[&from], [Output::new(64, DType::F32)], &calls).map(|_: [Computed; 1]| ()).map_err(|e| e.to_string())
        };
        assert_eq!(launched([1, 1], 64, 0, 0), Ok(()));
        for (grid, threads, shared_bytes, more, message) in [
            ([1, 1], 48, 0, 0, "blocks of 48 threads"),
            ([0, 1], 64, 0, 0, "a grid of 0 x 1"),
            ([1, 1 << 16], 64, 0, 0, "a grid of 1 x 65536"),
            ([1, 1], 64, 49_153, 0, "more than 48 KB"),
            ([1, 1], 64, 0, 1, "the arguments are not those of the kernel"),
        ] {
            let error = launched(grid, threads, shared_bytes, more).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
