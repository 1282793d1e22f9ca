//! Resources of this process, chosen once at start: threads, memory, file locks, signals and the device.

#[cfg_attr(not(feature = "cuda"), path = "runtime/cuda_disabled.rs")]
mod cuda;
mod device;
mod facts;
mod file_sync;
mod gpu;
mod kernels;
mod mapped;
mod memory;
mod processor;
mod signals;
mod threads;

pub use device::{Wanted, choose_device, cpu_only, device, device_memory, device_model, set_local_rank};
pub use facts::{Facts, command_line, facts, host_identity, host_name};
pub use file_sync::{Lock, lock, lock_shared, sync_folder};
pub use gpu::{DeviceMemory, Gpu};
pub use kernels::{Kernels, choose_kernels, kernels};
pub use mapped::Mapped;
pub use memory::{keep_memory, peak_bytes, resident_bytes, restart_peak};
#[cfg(target_arch = "x86_64")]
pub use processor::amd;
pub use processor::{amx_bf16, want_amx};
pub use signals::is_ignored;
pub use threads::{allowed_processors, on_threads, start_threads, with_threads};
