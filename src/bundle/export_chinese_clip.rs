//! Export of a matcher with the names of Chinese-CLIP.

use super::{
    Bundle, WEIGHTS,
    import::{Form, Layout},
    publish,
    write::write_weights_to,
};
use crate::{
    config::{Activation, ContrastiveLoss, ImageEncoder, Matcher, Task},
    error::{Context, Result, bail, ensure, usage},
    nn::weights::{self, Piece, Values},
};
use candle_core::{Device, Tensor};
use safetensors::Dtype;
use std::{borrow::Cow, collections::BTreeMap, path::Path};

/// Token types of BERT, all zero: only their sum with the positions is known.
const TOKEN_TYPES: usize = 2;

impl Bundle {
    /// Writes a matcher's weights into a safetensors file with the names of OFA-Sys's checkpoints, which
    /// `vilg import chinese-clip` reads. An older safetensors file in its place is replaced, with `force` any regular
    /// file.
    ///
    /// # Errors
    /// This is not a matcher, or cn_clip has no such architecture; `file` cannot be written or replaced.
    pub fn export_chinese_clip(&self, file: &Path, dtype: Dtype, force: bool) -> Result<()> {
        self.expect(Task::Matcher)?;
        let what = format!("Chinese-CLIP has no model like {}", self.name());
        let hint = "its activations are quick-gelu for images and gelu-erf for texts, its loss is infonce, and its heads \
            have 64 channels (80 at 1280)";
        ensure!(is_chinese_clip(&self.config.matcher), usage(what, hint));
        let bytes = self.place.weights()?;
        let mut renamed = BTreeMap::new();
        for (ours, values) in weights::stored(&bytes, &self.place.file(WEIGHTS), dtype)? {
            let form = Layout::OfaSys.forms(&ours).into_iter().next();
            let form = form.with_context(|| format!("`{ours}` has no name there"))?;
            renamed.extend(converted(&ours, form, values)?);
        }
        publish::file(file, force, |out| write_weights_to(out, &renamed))
    }
}

/// Whether a reader of the weights alone would build the same model.
fn is_chinese_clip(matcher: &Matcher) -> bool {
    let heads = |hidden: usize, heads: usize| hidden == heads * if hidden == 1280 { 80 } else { 64 };
    let image = match matcher.image_encoder {
        ImageEncoder::Vit => {
            matcher.image_activation == Activation::QuickGelu && heads(matcher.image_hidden, matcher.image_heads)
        }
        ImageEncoder::Resnet => heads(matcher.image_hidden * 32, matcher.image_heads),
    };
    let text = matcher.text_activation == Activation::GeluErf && heads(matcher.text_hidden, matcher.text_heads);
    image && text && matcher.loss == ContrastiveLoss::Infonce
}

/// The tensors in which a file stores ours.
fn converted<'a>(ours: &str, form: Form, mut values: Values<'a>) -> Result<Vec<(String, Values<'a>)>> {
    let dtype = values.dtype;
    let as_stored = |tensor: Tensor| -> Result<Values<'static>> {
        Ok(Values { dtype, ..weights::of_tensor(&tensor.contiguous()?)? })
    };
    let matrix = |values: &Values| -> Result<Tensor> {
        let [_, _] = values.shape[..] else { bail!("`{ours}` has the shape {:?}", values.shape) };
        Ok(Tensor::from_vec(values.floats()?, values.shape.as_slice(), &Device::Cpu)?)
    };
    Ok(match form {
        Form::Same(name) => {
            if name == "logit_scale" {
                values.shape.clear();
            }
            vec![(name, values)]
        }
        Form::Stacked(names) => {
            let mut shape = values.shape.clone();
            let rows = shape.first_mut().filter(|rows| rows.is_multiple_of(3)).context("a tensor of one number")?;
            *rows /= 3;
            let floats = values.floats()?;
            let parts = floats.chunks(floats.len().div_ceil(3).max(1)).map(|part| Values {
                shape: shape.clone(),
                pieces: vec![Piece::Floats(Cow::Owned(part.to_vec()))],
                dtype,
            });
            names.into_iter().zip(parts).collect()
        }
        Form::Transposed(name) => vec![(name, as_stored(matrix(&values)?.t()?)?)],
        Form::Patches(name) => {
            let matrix = matrix(&values)?;
            let (hidden, numbers) = matrix.dims2()?;
            let patch = (numbers / 3).isqrt();
            let weight = matrix.reshape((hidden, patch, patch, 3))?.permute((0, 3, 1, 2))?;
            vec![(name, as_stored(weight)?)]
        }
        Form::Positions([positions, types]) => {
            let hidden = values.shape.get(1).copied().with_context(|| format!("`{ours}` is no table"))?;
            let zeros = Tensor::zeros((TOKEN_TYPES, hidden), candle_core::DType::F32, &Device::Cpu)?;
            vec![(positions, values), (types, as_stored(zeros)?)]
        }
    })
}
