//! BERT's embedding: tokens and positions, normed (arXiv 1810.04805). There is one segment of text, so its embedding is
//! part of the positions.

use super::Input;
use crate::{
    error::{Context, Result, bail, ensure},
    model::Tokens,
    nn::{
        gradients::Gradients,
        norm::LayerNorm,
        params::{Init, Params, Scope},
        segment::{Autograd, Saved, Segment},
    },
    ops::{self, scatter::scatter_add, slices::view},
};
use candle_core::Tensor;

/// The first segment of the text encoder.
pub struct TextEmbedding {
    /// (vocabulary, hidden)
    token: Tensor,
    /// (positions, hidden)
    position: Tensor,
    norm: LayerNorm,
    /// Name of the encoder's scope.
    prefix: String,
    name: String,
    params: Params,
}

impl TextEmbedding {
    pub fn new(scope: &Scope, hidden: usize, vocab_size: usize, positions: usize) -> Result<Self> {
        Ok(Self {
            token: scope.table("token", (vocab_size, hidden), Init::Normal(0.02))?,
            position: scope.table("position", (positions, hidden), Init::Normal(0.02))?,
            norm: LayerNorm::new(&scope.at("norm_pre"), hidden)?.with_eps(1e-12),
            prefix: scope.name().to_owned(),
            name: format!("{}.embedding", scope.name()),
            params: scope.params(),
        })
    }

    /// The texts of a batch, how many they are, and their positions.
    fn texts<'b>(&self, input: &'b Input) -> Result<(&'b Tokens, usize, usize)> {
        let Input::Texts(texts) = input else { bail!("images for the text encoder") };
        let (b, length) = texts.ids.dims2()?;
        let most = self.position.dim(0)?;
        ensure!(length <= most, "a text of {length} tokens, with positions for {most}");
        Ok((texts, b, length))
    }
}

impl Autograd<Input> for TextEmbedding {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &Params {
        &self.params
    }

    /// (b, length) → (b, length, hidden).
    fn autograd(&self, _: &Tensor, input: &Input) -> Result<Tensor> {
        let (texts, _, length) = self.texts(input)?;
        let tokens = ops::embedding(&self.token, &texts.ids)?;
        self.norm.forward(&tokens.broadcast_add(&self.position.narrow(0, 0, length)?)?)
    }
}

/// [`TextEmbedding`] with hand-written gradients.
pub struct ManualTextEmbedding<'a>(pub &'a TextEmbedding);

impl Segment<Input> for ManualTextEmbedding<'_> {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn params(&self) -> &Params {
        &self.0.params
    }

    fn forward(&self, _: &Tensor, input: &Input) -> Result<(Tensor, Saved)> {
        let (texts, b, length) = self.0.texts(input)?;
        let (vocabulary, hidden) = self.0.token.dims2()?;
        let ids = texts.ids.flatten_all()?.to_vec1::<u32>()?;
        let foreign = ids.iter().find(|id| **id as usize >= vocabulary);
        ensure!(foreign.is_none(), "token {} is outside the vocabulary of {vocabulary}", foreign.unwrap_or(&0));
        let (token, position) = (view::<f32>(&self.0.token)?, view::<f32>(&self.0.position)?);
        let mut sum = Vec::with_capacity(ids.len() * hidden);
        for (i, id) in ids.iter().enumerate() {
            let token = &token[*id as usize * hidden..][..hidden];
            sum.extend(token.iter().zip(&position[i % length * hidden..]).map(|(token, position)| token + position));
        }
        let y = self.0.norm.manual(&sum)?;
        Ok((Tensor::from_vec(y, (b, length, hidden), texts.ids.device())?, Box::new((ids, sum))))
    }

    fn backward(
        &self,
        _: &Tensor,
        input: &Input,
        saved: Saved,
        dy: Option<Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let saved = saved.downcast::<(Vec<u32>, Vec<f32>)>().ok();
        let (ids, sum) = *saved.context("the saved state belongs to another segment")?;
        let (_, _, length) = self.0.texts(input)?;
        let hidden = self.0.token.dim(1)?;
        let dy = dy.context("the embedding is not the last segment")?;
        let dsum = self.0.norm.manual_backward(&sum, &view(&dy)?, gradients)?;
        let rows: [Vec<(usize, usize)>; 2] = [
            ids.iter().enumerate().map(|(i, id)| (*id as usize, i)).collect(),
            (0..ids.len()).map(|i| (i % length, i)).collect(),
        ];
        for ((name, table), rows) in [("token", &self.0.token), ("position", &self.0.position)].into_iter().zip(rows) {
            let name = format!("{}.{name}", self.0.prefix);
            gradients.accumulate(&name, table.shape(), |sum, beta| scatter_add(sum, beta, hidden, &dsum, &rows))?;
        }
        Ok(None)
    }
}
