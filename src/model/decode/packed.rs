//! The generator's weights for decoding on the CPU: packed once, on plain slices.

use crate::{
    error::{Context, Result},
    model::{layer::Layer, sequence::Modality, transformer::Generator},
    nn::{block::BlockLayers, linear::Linear, norm::LayerNorm, pattern::Pattern},
    ops::{
        layer_norm,
        packed::{Finish, Format, PackedLinear},
    },
};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

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
    block: BlockLayers<Norm, PackedLinear>,
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

    fn new(norm: &LayerNorm) -> Result<Self> {
        Ok(Self { weight: values(norm.weight())?, bias: values(norm.bias())? })
    }

    fn apply(&self, y: &mut [f32], x: &[f32]) {
        let chunk = Self::ROWS * self.weight.len();
        let rows = y.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
        rows.for_each(|(y, x)| layer_norm::forward_rows(y, x, &self.weight, &self.bias, LayerNorm::EPS as f32));
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn pack(linear: &Linear, format: Format) -> Result<PackedLinear> {
    Ok(PackedLinear::new(&values(linear.weight())?, &values(linear.bias())?, format))
}

impl PackedLayer {
    fn new(layer: &Layer, format: Format) -> Result<Self> {
        let block = layer.block.layers.try_map(|_, norm| Norm::new(norm), |_, linear| pack(linear, format))?;
        Ok(Self { pattern: layer.pattern, block })
    }
}

impl PackedGenerator {
    /// Copies the generator's weights. Matrices are stored in `format`; embeddings, norms and biases stay f32.
    pub fn new(generator: &Generator, format: Format) -> Result<Self> {
        let Generator { embedding, layers, head, heads, .. } = generator;
        let image_start = values(&embedding.image_start)?;
        let table =
            |table: &Tensor| -> Result<Table> { Ok(Table { values: values(table)?, hidden: image_start.len() }) };
        Ok(Self {
            text: table(&embedding.text)?,
            text_position: table(&embedding.text_position)?,
            image: table(&embedding.image)?,
            image_row: table(&embedding.image_row)?,
            image_column: table(&embedding.image_column)?,
            layers: layers.iter().map(|layer| PackedLayer::new(layer, format)).collect::<Result<_>>()?,
            norm: Norm::new(&head.norm)?,
            text_head: pack(head.linear(Modality::Text), format)?,
            image_head: pack(head.linear(Modality::Image), format)?,
            heads: *heads,
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
        self.block.norm1.apply(&mut workspace.normed, &workspace.x);
        self.block.qkv.apply(&mut workspace.qkv, &workspace.normed, Finish::Set);
        if let Some((q_norm, k_norm)) = &self.block.qk_norm {
            let hidden = self.block.norm1.weight.len();
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
        let rows = workspace.x.len() / self.block.norm1.weight.len();
        workspace.inner.resize(rows * self.block.fc1.outputs(), 0.0);
        let Workspace { x, attended, normed, branch, inner, .. } = workspace;
        let (post1, post2) = self.block.post.as_ref().map_or((None, None), |(a, b)| (Some(a), Some(b)));
        add(x, &self.block.proj, attended, post1, [branch, normed]);
        self.block.norm2.apply(normed, x);
        self.block.fc1.apply(inner, normed, Finish::Gelu);
        add(x, &self.block.fc2, inner, post2, [branch, normed]);
    }
}

/// `x += post(linear(input))`, where `post` is the norm of a sandwich block, if any.
fn add(x: &mut [f32], linear: &PackedLinear, input: &[f32], post: Option<&Norm>, [branch, normed]: [&mut Vec<f32>; 2]) {
    let Some(post) = post else { return linear.apply(x, input, Finish::Add) };
    linear.apply(branch, input, Finish::Set);
    post.apply(normed, branch);
    x.iter_mut().zip(normed).for_each(|(x, n)| *x += *n);
}
