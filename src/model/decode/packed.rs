//! The generator's weights for decoding on the CPU: packed once, on plain slices.

use crate::{
    error::{Context, Result},
    model::{sequence::Modality, transformer::Generator},
    nn::{norm::LayerNorm, pattern::Pattern},
    ops::{
        layer_norm,
        packed::{Finish, Format, PackedLinear},
    },
};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The packed weights of a generator.
pub struct PackedGenerator {
    pub text: Table,
    pub text_position: Table,
    pub image: Table,
    pub image_row: Table,
    pub image_column: Table,
    pub image_start: Vec<f32>,
    pub layers: Vec<PackedLayer>,
    norm: Norm,
    text_head: PackedLinear,
    image_head: PackedLinear,
    pub heads: usize,
}

/// The packed weights of a transformer block.
pub struct PackedLayer {
    pub pattern: Pattern,
    norm1: Norm,
    qkv: PackedLinear,
    qk_norm: Option<(Norm, Norm)>,
    proj: PackedLinear,
    norm2: Norm,
    fc1: PackedLinear,
    fc2: PackedLinear,
    post: Option<(Norm, Norm)>,
}

/// An embedding table (rows, hidden).
pub struct Table {
    values: Vec<f32>,
    hidden: usize,
}

impl Table {
    /// Row `row` of the table, (hidden).
    ///
    /// # Errors
    /// There is no such row.
    pub fn row(&self, row: usize) -> Result<&[f32]> {
        let rows = self.values.len() / self.hidden;
        self.values.chunks_exact(self.hidden).nth(row).with_context(|| format!("token {row} of a vocabulary of {rows}"))
    }
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Norm {
    /// Number of rows that one parallel task normalizes.
    const ROWS: usize = 16;

    fn apply(&self, y: &mut [f32], x: &[f32]) {
        let chunk = Self::ROWS * self.weight.len();
        let rows = y.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
        rows.for_each(|(y, x)| layer_norm::forward_rows(y, x, &self.weight, &self.bias, LayerNorm::EPS as f32));
    }
}

/// The generator's parameters by full name.
struct Named(BTreeMap<String, Tensor>);

impl Named {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.0.get(name).with_context(|| format!("the generator has no `{name}`"))?;
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    fn table(&self, name: &str, hidden: usize) -> Result<Table> {
        Ok(Table { values: self.values(&format!("{name}.weight"))?, hidden })
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        Ok(Norm { weight: self.values(&format!("{name}.weight"))?, bias: self.values(&format!("{name}.bias"))? })
    }

    /// Two norms, or `None` if the model does not have the first.
    fn norms(&self, first: &str, second: &str) -> Result<Option<(Norm, Norm)>> {
        if !self.has(&format!("{first}.weight")) {
            return Ok(None);
        }
        Ok(Some((self.norm(first)?, self.norm(second)?)))
    }

    fn linear(&self, name: &str, format: Format) -> Result<PackedLinear> {
        let (weight, bias) = (self.values(&format!("{name}.weight"))?, self.values(&format!("{name}.bias"))?);
        Ok(PackedLinear::new(&weight, &bias, format))
    }

    fn layer(&self, i: usize, pattern: Pattern, format: Format) -> Result<PackedLayer> {
        let name = |part: &str| format!("blocks.{i}.{part}");
        Ok(PackedLayer {
            pattern,
            norm1: self.norm(&name("norm1"))?,
            qkv: self.linear(&name("attention.qkv"), format)?,
            qk_norm: self.norms(&name("attention.q_norm"), &name("attention.k_norm"))?,
            proj: self.linear(&name("attention.proj"), format)?,
            norm2: self.norm(&name("norm2"))?,
            fc1: self.linear(&name("mlp.fc1"), format)?,
            fc2: self.linear(&name("mlp.fc2"), format)?,
            post: self.norms(&name("norm1_post"), &name("norm2_post"))?,
        })
    }
}

impl PackedGenerator {
    /// Copies the generator's weights. Matrices are stored in `format`; embeddings, norms and biases stay f32.
    pub fn new(generator: &Generator, format: Format) -> Result<Self> {
        let params = generator.params().flatten();
        let named = Named(params.map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect());
        let image_start = named.values("image_start")?;
        let table = |name| named.table(name, image_start.len());
        let layers = generator.layers.iter().enumerate();
        Ok(Self {
            text: table("text_embedding")?,
            text_position: table("text_position")?,
            image: table("image_embedding")?,
            image_row: table("image_row")?,
            image_column: table("image_column")?,
            layers: layers.map(|(i, layer)| named.layer(i, layer.pattern, format)).collect::<Result<_>>()?,
            norm: named.norm("norm")?,
            text_head: named.linear("text_head", format)?,
            image_head: named.linear("image_head", format)?,
            heads: generator.heads,
            image_start,
        })
    }

    pub fn hidden(&self) -> usize {
        self.image_start.len()
    }

    /// Computes `workspace.logits` (rows, vocabulary) from `workspace.x`, for targets of this modality.
    pub fn logits(&self, workspace: &mut Workspace, target: Modality) {
        let head = match target {
            Modality::Text => &self.text_head,
            Modality::Image => &self.image_head,
        };
        workspace.logits.resize(workspace.x.len() / self.hidden() * head.outputs(), 0.0);
        self.norm.apply(&mut workspace.normed, &workspace.x);
        head.apply(&mut workspace.logits, &workspace.normed, Finish::Set);
    }
}

/// The buffers of a pass through the layers, reused from step to step.
#[derive(Default)]
pub struct Workspace {
    /// The residual stream (rows, hidden).
    pub x: Vec<f32>,
    /// Queries, keys and values (rows, 3, heads, d).
    pub qkv: Vec<f32>,
    /// Output of attention (rows, hidden).
    pub attended: Vec<f32>,
    pub scores: Vec<f32>,
    pub logits: Vec<f32>,
    normed: Vec<f32>,
    branch: Vec<f32>,
    inner: Vec<f32>,
}

impl Workspace {
    /// Resizes the buffers for `rows` rows; allocates nothing if they have been that large before.
    pub fn fit(&mut self, rows: usize, hidden: usize) {
        [&mut self.x, &mut self.attended, &mut self.normed, &mut self.branch]
            .into_iter()
            .for_each(|buffer| buffer.resize(rows * hidden, 0.0));
        self.qkv.resize(rows * 3 * hidden, 0.0);
    }
}

impl PackedLayer {
    /// Computes `workspace.qkv` from `workspace.x`.
    pub fn qkv(&self, workspace: &mut Workspace) {
        self.norm1.apply(&mut workspace.normed, &workspace.x);
        self.qkv.apply(&mut workspace.qkv, &workspace.normed, Finish::Set);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let hidden = self.norm1.weight.len();
            for qkv in workspace.qkv.chunks_exact_mut(3 * hidden) {
                let before = &mut workspace.branch[..hidden];
                for (norm, part) in [q_norm, k_norm].into_iter().zip(qkv.chunks_exact_mut(hidden)) {
                    before.copy_from_slice(part);
                    norm.apply(part, before);
                }
            }
        }
    }

    /// Runs the block after attention: from `workspace.attended` to the block's output in `workspace.x`.
    pub fn finish(&self, workspace: &mut Workspace) {
        let rows = workspace.x.len() / self.norm1.weight.len();
        workspace.inner.resize(rows * self.fc1.outputs(), 0.0);
        let Workspace { x, attended, normed, branch, inner, .. } = workspace;
        let (post1, post2) = self.post.as_ref().map_or((None, None), |(a, b)| (Some(a), Some(b)));
        add(x, &self.proj, attended, post1, [branch, normed]);
        self.norm2.apply(normed, x);
        self.fc1.apply(inner, normed, Finish::Gelu);
        add(x, &self.fc2, inner, post2, [branch, normed]);
    }
}

/// `x += post(linear(input))`, where `post` is the norm of a sandwich block, if any.
fn add(x: &mut [f32], linear: &PackedLinear, input: &[f32], post: Option<&Norm>, [branch, normed]: [&mut Vec<f32>; 2]) {
    let Some(post) = post else { return linear.apply(x, input, Finish::Add) };
    linear.apply(branch, input, Finish::Set);
    post.apply(normed, branch);
    x.iter_mut().zip(normed).for_each(|(x, n)| *x += *n);
}
