//! How published files store each of our tensors: names and layouts of OFA-Sys and of Hugging Face.

use crate::{
    error::{Context, Result, ensure},
    nn::checkpoint_file::CheckpointFile,
};
use candle_core::Tensor;

/// Who names the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// OFA-Sys's own checkpoints, as `cn_clip` reads them.
    OfaSys,
    /// `ChineseCLIPModel` of transformers.
    HuggingFace,
}

/// How a file stores one of our tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Under this name, as it is.
    Same(String),
    /// Query, key and value, which are one tensor of ours.
    Stacked([String; 3]),
    /// Transposed.
    Transposed(String),
    /// A convolution (hidden, 3, patch, patch) instead of a matrix (hidden, patch · patch · 3).
    Patches(String),
    /// Positions and token types. Only the first type is used: it is added to the positions.
    Positions([String; 2]),
}

impl Layout {
    /// The forms in which a file may hold the tensor `ours`. The first one is written on export.
    pub fn forms(self, ours: &str) -> Vec<Form> {
        let parts: Vec<&str> = ours.split('.').collect();
        match parts[..] {
            ["image", "blocks", layer, ref rest @ ..] => self.image_layer(layer, &rest.join(".")),
            ["image", name, ref rest @ ..] => vec![self.image(name, rest)],
            ["text", "blocks", layer, ref rest @ ..] => self.text_layer(layer, &rest.join(".")),
            ["text", name, ref rest @ ..] => vec![self.text(name, &rest.join("."))],
            _ => vec![Form::Same(ours.to_owned())],
        }
    }

    /// What the names of the text encoder begin with.
    pub fn text_prefix(self) -> &'static str {
        match self {
            Self::OfaSys => "bert",
            Self::HuggingFace => "text_model",
        }
    }

    fn image(self, name: &str, rest: &[&str]) -> Form {
        let kind = rest.join(".");
        match (self, name) {
            (Self::OfaSys, "patch") => Form::Patches("visual.conv1.weight".to_owned()),
            (Self::OfaSys, "class") => Form::Same("visual.class_embedding".to_owned()),
            (Self::OfaSys, "position") => Form::Same("visual.positional_embedding".to_owned()),
            (Self::OfaSys, "norm_pre") => Form::Same(format!("visual.ln_pre.{kind}")),
            (Self::OfaSys, "norm") => Form::Same(format!("visual.ln_post.{kind}")),
            (Self::OfaSys, "proj") => Form::Transposed("visual.proj".to_owned()),
            // The names of the ResNet are ours.
            (Self::OfaSys, _) if rest.is_empty() => Form::Same(format!("visual.{name}")),
            (Self::OfaSys, _) => Form::Same(format!("visual.{name}.{kind}")),
            (Self::HuggingFace, "patch") => Form::Patches("vision_model.embeddings.patch_embedding.weight".to_owned()),
            (Self::HuggingFace, "class") => Form::Same("vision_model.embeddings.class_embedding".to_owned()),
            (Self::HuggingFace, "position") => {
                Form::Same("vision_model.embeddings.position_embedding.weight".to_owned())
            }
            (Self::HuggingFace, "norm_pre") => Form::Same(format!("vision_model.pre_layrnorm.{kind}")),
            (Self::HuggingFace, "norm") => Form::Same(format!("vision_model.post_layernorm.{kind}")),
            (Self::HuggingFace, "proj") => Form::Same("visual_projection.weight".to_owned()),
            (Self::HuggingFace, _) => Form::Same(format!("vision_model.{name}")),
        }
    }

    fn image_layer(self, layer: &str, rest: &str) -> Vec<Form> {
        let (name, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
        match self {
            Self::OfaSys => {
                let prefix = format!("visual.transformer.resblocks.{layer}");
                let name = match name {
                    "attention.qkv" => {
                        let plain = Form::Same(format!("{prefix}.attn.in_proj_{kind}"));
                        return vec![plain, Form::Same(format!("{prefix}.attn.Wqkv.{kind}"))];
                    }
                    "attention.proj" => "attn.out_proj",
                    "norm1" => "ln_1",
                    "norm2" => "ln_2",
                    "mlp.fc1" => "mlp.c_fc",
                    "mlp.fc2" => "mlp.c_proj",
                    other => other,
                };
                vec![Form::Same(format!("{prefix}.{name}.{kind}"))]
            }
            Self::HuggingFace => {
                let prefix = format!("vision_model.encoder.layers.{layer}");
                let name = match name {
                    "attention.qkv" => {
                        return vec![Form::Stacked(
                            ["q", "k", "v"].map(|part| format!("{prefix}.self_attn.{part}_proj.{kind}")),
                        )];
                    }
                    "attention.proj" => "self_attn.out_proj",
                    "norm1" => "layer_norm1",
                    "norm2" => "layer_norm2",
                    other => other,
                };
                vec![Form::Same(format!("{prefix}.{name}.{kind}"))]
            }
        }
    }

    fn text(self, name: &str, kind: &str) -> Form {
        let prefix = format!("{}.embeddings", self.text_prefix());
        match (name, self) {
            ("token", _) => Form::Same(format!("{prefix}.word_embeddings.weight")),
            ("position", _) => {
                Form::Positions(["position", "token_type"].map(|table| format!("{prefix}.{table}_embeddings.weight")))
            }
            ("norm_pre", _) => Form::Same(format!("{prefix}.LayerNorm.{kind}")),
            ("proj", Self::OfaSys) => Form::Transposed("text_projection".to_owned()),
            ("proj", Self::HuggingFace) => Form::Same("text_projection.weight".to_owned()),
            _ => Form::Same(format!("{prefix}.{name}")),
        }
    }

    /// BERT's layers have the same names in both.
    fn text_layer(self, layer: &str, rest: &str) -> Vec<Form> {
        let (name, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let prefix = format!("{}.encoder.layer.{layer}", self.text_prefix());
        let same = |name: &str| Form::Same(format!("{prefix}.{name}.{kind}"));
        match name {
            "attention.qkv" => {
                let parts = ["query", "key", "value"].map(|part| format!("{prefix}.attention.self.{part}.{kind}"));
                vec![Form::Stacked(parts), same("attention.self.Wqkv")]
            }
            "attention.proj" => vec![same("attention.output.dense"), same("attention.self.out_proj")],
            "norm1" => vec![same("attention.output.LayerNorm")],
            "norm2" => vec![same("output.LayerNorm")],
            "mlp.fc1" => vec![same("intermediate.dense")],
            "mlp.fc2" => vec![same("output.dense")],
            other => vec![same(other)],
        }
    }
}

impl Form {
    /// The tensors of the file.
    pub fn names(&self) -> &[String] {
        match self {
            Self::Same(name) | Self::Transposed(name) | Self::Patches(name) => std::slice::from_ref(name),
            Self::Stacked(names) => names,
            Self::Positions(names) => names,
        }
    }

    /// Whether the file has all of them.
    pub fn is_in(&self, file: &CheckpointFile) -> bool {
        self.names().iter().all(|name| file.shape(name).is_some())
    }

    /// Shape of our tensor, by the shapes in the file. `None` if the file lacks it.
    pub fn shape(&self, file: &CheckpointFile) -> Option<Vec<usize>> {
        let mut shape = file.shape(self.names().first()?)?.to_vec();
        match self {
            Self::Same(_) | Self::Positions(_) => {}
            Self::Stacked(_) => {
                let rows = shape.first_mut()?;
                *rows = rows.saturating_mul(3);
            }
            Self::Transposed(_) => shape.reverse(),
            Self::Patches(_) => {
                let numbers = shape.iter().skip(1).fold(1, |all: usize, one| all.saturating_mul(*one));
                shape = vec![*shape.first()?, numbers];
            }
        }
        Some(shape)
    }

    /// Reads our tensor.
    ///
    /// # Errors
    /// The file lacks one of the tensors, or their shapes do not fit together.
    pub fn read(&self, file: &CheckpointFile) -> Result<Tensor> {
        let read = || -> Result<Tensor> {
            Ok(match self {
                Self::Same(name) => file.tensor(name)?,
                Self::Stacked(names) => {
                    let parts = names.iter().map(|name| file.tensor(name)).collect::<Result<Vec<_>>>()?;
                    Tensor::cat(&parts, 0)?
                }
                Self::Transposed(name) => file.tensor(name)?.t()?.contiguous()?,
                Self::Patches(name) => {
                    let weight = file.tensor(name)?;
                    let (hidden, colors, height, width) = weight.dims4()?;
                    ensure!(colors == 3 && height == width, "`{name}` has shape {:?}", weight.dims());
                    weight.permute((0, 2, 3, 1))?.contiguous()?.reshape((hidden, height * width * 3))?
                }
                Self::Positions([positions, types]) => {
                    file.tensor(positions)?.broadcast_add(&file.tensor(types)?.narrow(0, 0, 1)?)?
                }
            })
        };
        read().with_context(|| format!("cannot read `{}`", self.names().join("`, `")))
    }
}
