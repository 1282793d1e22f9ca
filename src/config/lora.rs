//! The section `[lora]` of a configuration.

use super::{Task, check::Check};
use serde::{Deserialize, Serialize};

/// Section `[lora]`: low-rank adaptation (arXiv 2106.09685) of the model in `train.init_from`. Only for task `generator`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rank of the adapters. 0 (default): no LoRA, every weight is trained.
    pub rank: usize,
    /// Scale of the adapters: what they add to a layer's output is multiplied by alpha / rank. Default 16.
    pub alpha: f64,
    /// Linear layers of each transformer block that get an adapter: `qkv`, `proj`, `fc1`, `fc2`. Default: all four.
    pub targets: Vec<LoraTarget>,
}

/// A linear layer of a transformer block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraTarget {
    /// Queries, keys and values of attention.
    Qkv,
    /// Output of attention.
    Proj,
    /// First layer of the MLP.
    Fc1,
    /// Second layer of the MLP.
    Fc2,
}

impl LoraTarget {
    const ALL: [Self; 4] = [Self::Qkv, Self::Proj, Self::Fc1, Self::Fc2];

    /// Last part of the layer's name (`qkv` of `blocks.3.attention.qkv`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Proj => "proj",
            Self::Fc1 => "fc1",
            Self::Fc2 => "fc2",
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 0, alpha: 16.0, targets: LoraTarget::ALL.to_vec() }
    }
}

impl Lora {
    /// Whether adapters are trained instead of all weights.
    pub fn is_on(&self) -> bool {
        self.rank > 0
    }

    /// The factor s of `W + s B A`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank.max(1) as f64
    }

    /// Whether the linear layer of this full name has an adapter.
    pub fn adapts(&self, layer: &str) -> bool {
        self.is_on() && self.targets.iter().any(|target| layer.rsplit('.').next() == Some(target.name()))
    }

    /// Checks every value; `init_from` is `train.init_from`.
    pub(super) fn check(&self, check: &mut Check, task: Task, init_from: &str) {
        check.that(self.rank <= 4096, "lora.rank", "be at most 4096", "8 to 64 are usual; 0 trains every weight");
        let ok = self.alpha.is_finite() && self.alpha > 0.0;
        check.that(ok, "lora.alpha", "be above 0", "once or twice the rank is usual");
        let twice = self.targets.iter().enumerate().any(|(i, target)| self.targets[..i].contains(target));
        let ok = !self.targets.is_empty() && !twice;
        check.that(
            ok,
            "lora.targets",
            "name at least one layer, and none twice",
            "[\"qkv\", \"proj\", \"fc1\", \"fc2\"]",
        );
        if self.is_on() {
            let what = "be 0 unless task is \"generator\"";
            check.that(task.has_adapters(), "lora.rank", what, "leave out the section [lora]");
            let hint = "name the model folder that the adapters are for, or \"demo\"";
            check.that(!init_from.is_empty(), "train.init_from", "name a model where lora.rank is above 0", hint);
        }
    }
}
