//! The section `[end_to_end]` of a configuration.

use super::check::Check;
use serde::{Deserialize, Serialize};

/// Section `[end_to_end]`: training of generator and reconstructor together (paper §3.1.3). Only for task `end-to-end`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EndToEnd {
    /// Hidden state that the reconstruction of code zᵢ reads: at the position whose `input` is zᵢ (default), or at the one
    /// that `predict`s zᵢ.
    pub hidden: HiddenState,
    /// Width of the network between hidden states and code vectors. 0 (default): `model.hidden`.
    pub map_width: usize,
    /// Weight of the reconstruction loss; `train.image_loss_weight` is that of the generation loss. Default 1: both count
    /// alike, as in the paper. 0: no reconstruction is trained.
    pub reconstruction_weight: f64,
    /// Initial weights of the reconstructor: those of the image `tokenizer`'s decoder (default), or `random`.
    pub reconstructor_init: ReconstructorInit,
}

/// Which hidden state the reconstruction of a code reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenState {
    /// Where the code is the input: the state knows the code, those before it and the text. The last code is an input too.
    Input,
    /// Where the code is predicted: the state knows only what is before the code.
    Predict,
}

/// What the reconstructor starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReconstructorInit {
    Tokenizer,
    Random,
}

impl Default for EndToEnd {
    fn default() -> Self {
        Self {
            hidden: HiddenState::Input,
            map_width: 0,
            reconstruction_weight: 1.0,
            reconstructor_init: ReconstructorInit::Tokenizer,
        }
    }
}

impl EndToEnd {
    /// Checks every value.
    pub(super) fn check(&self, check: &mut Check) {
        let weight = [("reconstruction_weight", self.reconstruction_weight)];
        check.within("end_to_end", &weight, 0.0, f64::INFINITY, "1 is the paper's; 0 trains no reconstruction");
        let hint = "model.hidden is usual, which 0 stands for";
        check.that(self.map_width <= 65536, "end_to_end.map_width", "be at most 65536", hint);
    }
}
