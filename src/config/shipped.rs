//! The configurations in `configs/`, which are part of the program: `vilg config init` writes them, and others extend them.

macro_rules! shipped {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../../configs/", $name, ".toml")))),*] };
}

/// Name and text of each.
pub const SHIPPED: &[(&str, &str)] = shipped![
    "emoji",
    "emoji-tokenizer",
    "emoji-vqgan",
    "emoji-dvae",
    "emoji-lora",
    "vqgan-f8-8192",
    "dvae-f8-8192",
    "scenes",
    "scenes-tokenizer",
    "scenes-end-to-end",
    "scenes-two-stage",
    "scenes-vqa",
    "scenes-matcher",
    "matcher",
    "300m",
    "300m-end-to-end",
    "10b",
    "finetune-coco",
    "finetune-aic-icc",
    "finetune-coco-cn",
    "finetune-fmiqa",
];

/// Name and text of the shipped configuration of this name.
pub fn shipped(name: &str) -> Option<(&'static str, &'static str)> {
    SHIPPED.iter().find(|(known, _)| *known == name).copied()
}
