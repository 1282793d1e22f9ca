//! Peaks of NVIDIA's GPUs by name, from their data sheets; products without sparsity. `vilg train` divides by them for its
//! MFU. Those of A100, H100, H200, B200 and L40S in bf16 equal those of PyTorch's torchtitan (`tools/utils.py`).

/// Memory of a device that tensors are allocated from, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use now.
    pub allocated: u64,
    /// The most that was in use since the start of the process.
    pub peak: u64,
    /// Held from the driver, in use or not.
    pub reserved: u64,
}

/// A model of GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Words of the name that the driver reports, all of which must occur.
    pub words: &'static str,
    /// Products in bf16 or f16 with sums in f32, in TFLOP/s.
    pub bf16_tflops: f64,
    /// In f32 without TF32, in TFLOP/s.
    pub f32_tflops: f64,
}

const fn gpu(words: &'static str, bf16_tflops: f64, f32_tflops: f64) -> Gpu {
    Gpu { words, bf16_tflops, f32_tflops }
}

/// Names with more words first.
const GPUS: [Gpu; 23] = [
    gpu("GB200", 2500.0, 80.0),
    gpu("B200", 2250.0, 75.0),
    gpu("GH200", 989.0, 67.0),
    gpu("H200 NVL", 836.0, 60.0),
    gpu("H200", 989.0, 67.0),
    gpu("H100 NVL", 835.0, 60.0),
    gpu("H100 PCIE", 756.0, 51.0),
    gpu("H100", 989.0, 67.0),
    gpu("H800 PCIE", 756.0, 51.0),
    gpu("H800", 989.0, 67.0),
    gpu("H20", 148.0, 44.0),
    gpu("A100", 312.0, 19.5),
    gpu("A800", 312.0, 19.5),
    gpu("A40", 149.7, 37.4),
    gpu("A30", 165.0, 10.3),
    gpu("A10", 125.0, 31.2),
    gpu("L40S", 362.0, 91.6),
    gpu("L40", 181.0, 90.5),
    gpu("L4", 121.0, 30.3),
    gpu("6000 ADA", 364.0, 91.1),
    gpu("5090", 209.5, 104.8),
    gpu("4090", 165.2, 82.6),
    gpu("3090", 71.0, 35.6),
];

impl Gpu {
    /// The model of a device's name, as the driver reports it (`NVIDIA H100 80GB HBM3`) or shorter (`h100`); `None`: the
    /// table does not have it.
    pub fn named(device: &str) -> Option<Self> {
        let device = device.to_ascii_uppercase();
        let has = |word: &str| device.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| part == word);
        GPUS.into_iter().find(|gpu| gpu.words.split(' ').all(has))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names as `nvidia-smi -L` prints them.
    #[test]
    fn devices_are_found_by_the_names_of_the_driver() {
        let peak = |name: &str| Gpu::named(name).map(|gpu| gpu.bf16_tflops);
        for (name, expected) in [
            ("NVIDIA H100 80GB HBM3", 989.0),
            ("NVIDIA H100 PCIe", 756.0),
            ("NVIDIA H100 NVL", 835.0),
            ("NVIDIA H200", 989.0),
            ("NVIDIA GH200 480GB", 989.0),
            ("NVIDIA B200", 2250.0),
            ("NVIDIA A100-SXM4-80GB", 312.0),
            ("NVIDIA A100-PCIE-40GB", 312.0),
            ("NVIDIA L40S", 362.0),
            ("NVIDIA L4", 121.0),
            ("NVIDIA RTX 6000 Ada Generation", 364.0),
            ("NVIDIA GeForce RTX 4090", 165.2),
            ("h100", 989.0),
        ] {
            assert_eq!(peak(name), Some(expected), "{name}");
        }
        for name in ["", "NVIDIA A1000", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X", "NVIDIA GeForce RTX 40900"] {
            assert_eq!(peak(name), None, "{name}");
        }
    }

    #[test]
    fn the_documentation_has_the_same_table() {
        let page = include_str!("../../docs/gpu.md");
        for Gpu { words, bf16_tflops, f32_tflops } in GPUS {
            let row = format!("| {words} | {bf16_tflops} | {f32_tflops} |");
            assert!(page.contains(&row), "{row}");
        }
    }

    /// An entry that an earlier one covers would never be found.
    #[test]
    fn every_model_is_found_by_its_own_words() {
        for gpu in GPUS {
            assert_eq!(Gpu::named(gpu.words), Some(gpu));
            assert!(gpu.bf16_tflops > gpu.f32_tflops, "{gpu:?}");
        }
    }
}
