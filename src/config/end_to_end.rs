//! The section `[end_to_end]` of a configuration.

use super::{ImageTokenizer, check::Check};
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
    /// Scale of the gradient that the reconstruction loss, with its GAN loss, sends into the generator; map and
    /// reconstructor always get all of it. Default 1. 0: the generator learns from its codes alone.
    pub generator_gradient_scale: f64,
    /// Steps over which this scale rises linearly from 0. 0 (default): it is reached at the first step.
    pub generator_gradient_warmup: u64,
    /// Joint update: scale of the gradient that the losses of image → text send into the image tokenizer's encoder. Above 0
    /// the image tokenizer is trained too, with its own losses as well. 0 (default): it is frozen.
    pub tokenizer_gradient_scale: f64,
    /// Steps over which this scale rises linearly from 0. 0 (default): it is reached at the first step.
    pub tokenizer_gradient_warmup: u64,
    /// Temperature of the soft codes whose gradient stands for that of the codes: of squared distances to the code vectors,
    /// or of the Gumbel softmax. Default 1.
    pub tokenizer_temperature: f64,
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
            generator_gradient_scale: 1.0,
            generator_gradient_warmup: 0,
            tokenizer_gradient_scale: 0.0,
            tokenizer_gradient_warmup: 0,
            tokenizer_temperature: 1.0,
        }
    }
}

/// A scale that rises linearly from 0 over `warmup` steps, at a step (counted from 1).
fn warmed_up(scale: f64, warmup: u64, step: u64) -> f64 {
    if step >= warmup { scale } else { scale * (step as f64 / warmup as f64) }
}

impl EndToEnd {
    /// Scale of the reconstruction's gradient for the generator at this step (counted from 1).
    pub fn generator_gradient(&self, step: u64) -> f64 {
        warmed_up(self.generator_gradient_scale, self.generator_gradient_warmup, step)
    }

    /// Whether the image tokenizer is trained too.
    pub fn trains_tokenizer(&self) -> bool {
        self.tokenizer_gradient_scale > 0.0
    }

    /// Scale of the gradient of image → text for the image tokenizer at this step (counted from 1).
    pub fn tokenizer_gradient(&self, step: u64) -> f64 {
        warmed_up(self.tokenizer_gradient_scale, self.tokenizer_gradient_warmup, step)
    }

    /// Checks every value.
    pub(super) fn check(&self, check: &mut Check) {
        let weight = [("reconstruction_weight", self.reconstruction_weight)];
        check.within("end_to_end", &weight, 0.0, f64::INFINITY, "1 is the paper's; 0 trains no reconstruction");
        let scale = [("generator_gradient_scale", self.generator_gradient_scale)];
        check.within(
            "end_to_end",
            &scale,
            0.0,
            f64::INFINITY,
            "1 is the gradient itself; 0 keeps it from the generator",
        );
        let scale = [("tokenizer_gradient_scale", self.tokenizer_gradient_scale)];
        check.within("end_to_end", &scale, 0.0, f64::INFINITY, "0 freezes the image tokenizer");
        let ok = self.tokenizer_temperature.is_finite() && self.tokenizer_temperature > 0.0;
        let hint = "about the squared distance between neighboring code vectors";
        check.that(ok, "end_to_end.tokenizer_temperature", "be above 0", hint);
        let hint = "model.hidden is usual, which 0 stands for";
        check.that(self.map_width <= 65536, "end_to_end.map_width", "be at most 65536", hint);
    }
}

impl ImageTokenizer {
    /// The settings of a trained image tokenizer for end-to-end training with `ours`, which says whether the reconstructor
    /// has perceptual and GAN losses.
    pub fn with_losses_of(self, ours: &Self) -> Self {
        Self {
            adversarial_weight: ours.adversarial_weight,
            adversarial_start: ours.adversarial_start,
            adversarial_loss: ours.adversarial_loss,
            discriminator_channels: ours.discriminator_channels,
            discriminator_layers: ours.discriminator_layers,
            discriminator_ceiling: ours.discriminator_ceiling,
            lecam_weight: ours.lecam_weight,
            perceptual: ours.perceptual.clone(),
            // The decoder that the reconstructor starts from is past it.
            perceptual_start: 0,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_for_the_generator_is_warmed_up() {
        let at = |scale, warmup| {
            let settings =
                EndToEnd { generator_gradient_scale: scale, generator_gradient_warmup: warmup, ..Default::default() };
            [1, 2, 4, 9].map(|step| settings.generator_gradient(step))
        };
        assert_eq!(at(0.5, 4), [0.125, 0.25, 0.5, 0.5]);
        assert_eq!(at(1.0, 0), [1.0; 4]);
    }
}
