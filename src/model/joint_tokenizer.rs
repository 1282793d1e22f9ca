//! The image tokenizer as the first segment of a generator's chain: image → text trains it too, which the paper leaves for
//! later (§3.1.4).
//!
//! The transformer reads the embedding of each code, as it always does. In the backward pass soft codes stand for the codes
//! (straight-through, arXiv 1308.3432): with g the gradient of an embedding, T the table of embeddings and p(z) the soft code
//! of the latent z, the latent gets the gradient of scale · ⟨g, p(z) T⟩. For a VQGAN p(z) = softmax(−‖z − e‖² / τ) over the
//! code vectors e; for a dVAE it is the Gumbel softmax at temperature τ (arXiv 1611.01144), and the codes are drawn with its
//! noise. Neither T nor e moves by this gradient.
//!
//! The tokenizer keeps its own losses: its decoder reconstructs the same images, so that codes stay those of pixels.

use super::batch::Batch;
use crate::{
    error::{Context, Result},
    nn::{
        gradients::Gradients,
        params::Params,
        segment::{Saved, Segment, unpack},
    },
    tokenizer::{ImageTokenizer, PixelBatch},
};
use candle_core::{Tensor, Var};

/// An image tokenizer in training, for batches with the images of their source. For other batches it does nothing.
pub struct JointTokenizer<'a> {
    tokenizer: &'a ImageTokenizer,
    /// Encoder; quantizer, decoder and loss.
    halves: [Box<dyn Segment<PixelBatch> + 'a>; 2],
    temperature: f64,
    params: Params,
}

/// What the backward pass needs.
struct Encoded {
    /// Saved by each half.
    halves: [Saved; 2],
    /// (b, h, w, code_dim).
    latents: Var,
    /// (b, n, codes), with the graph that leads from the latents to them.
    soft: Tensor,
}

impl<'a> JointTokenizer<'a> {
    /// `temperature` is that of the soft codes.
    pub fn new(tokenizer: &'a ImageTokenizer, temperature: f64) -> Self {
        let halves = tokenizer.halves();
        let params = halves.iter().flat_map(|half| half.params().clone()).collect();
        Self { tokenizer, halves, temperature, params }
    }
}

impl Segment<Batch> for JointTokenizer<'_> {
    fn name(&self) -> &str {
        "image tokenizer"
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// The images of the source → soft codes (b, n, codes); without images `x`, which is empty. Leaves the statistics of the
    /// images, whose loss is not that of the chain.
    fn forward(&self, x: &Tensor, batch: &Batch) -> Result<(Tensor, Saved)> {
        let Some(pixels) = &batch.source_pixels else { return Ok((x.clone(), Box::new(()))) };
        let [encoder, decoder] = &self.halves;
        let (z, encoded) = encoder.forward(x, pixels)?;
        let (_, decoded) = decoder.forward(&z, pixels)?;
        let latents = Var::from_tensor(&z)?;
        let soft = self.tokenizer.quantizer().soft_codes(&latents, self.temperature, pixels.relaxation)?;
        let soft = soft.reshape((z.dim(0)?, (), soft.dim(1)?))?;
        Ok((soft.detach(), Box::new(Encoded { halves: [encoded, decoded], latents, soft })))
    }

    /// `dy` is the gradient of the soft codes; the encoder gets the sum of what they and its own losses give.
    fn backward(
        &self,
        x: &Tensor,
        batch: &Batch,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let Some(pixels) = &batch.source_pixels else { return Ok(None) };
        let Encoded { halves: [encoded, decoded], latents, soft } = unpack(saved)?;
        let [encoder, decoder] = &self.halves;
        let dy = dy.context("the image tokenizer is not the last segment")?;
        let own = decoder.backward(&latents, pixels, decoded, None, gradients)?;
        let own = own.context("the decoder does not depend on the latents")?;
        let mut store = (soft * dy)?.sum_all()?.backward()?;
        let of_text = store.remove(&latents).context("soft codes do not depend on the latents")?;
        // The projection from latents to logits, if there is one.
        for (name, param) in decoder.params() {
            if let Some(gradient) = store.remove(param) {
                gradients.add(name, gradient)?;
            }
        }
        encoder.backward(x, pixels, encoded, Some((own + of_text)?), gradients)?;
        Ok(None)
    }
}
