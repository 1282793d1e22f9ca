//! Cost of attention against the number of codes, and of a whole block: each sparse pattern compared with dense
//! attention.

use super::{Spread, flops::layout, seconds, shapes::Shape, work};
use crate::{
    config::{AttentionKind, ConvBorder, RowExtent},
    error::{Context, Result},
    model::{Layout, flops},
    nn::pattern::{Grid, Pattern},
    ops::{self, attention::KeyRanges},
    random::Random,
    runtime,
    train::shards::Shards,
};
use candle_core::{Tensor, Var};
use serde::Serialize;
use std::sync::Arc;

/// Time and memory of one pattern at one size.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// `row`, `column`, `conv` or `dense`. `dense n×n` builds the whole attention matrix, the others never do.
    pub pattern: &'static str,
    /// Number of image codes, without the text tokens.
    pub codes: usize,
    /// Time of forward and backward in seconds.
    pub seconds: Spread,
    /// FLOPs of forward and backward, useful ones only.
    pub flops: f64,
    /// Peak memory in bytes, beyond the memory already in use; `None` on a GPU.
    pub memory_bytes: Option<u64>,
    /// Speed-up over `dense` at the same size.
    pub speedup: f64,
    /// Memory relative to `dense` at the same size.
    pub memory_share: Option<f64>,
}

/// Maximum size of an attention matrix, in elements over all heads; larger ones are skipped.
const MAX_SCORES: usize = 1 << 27;

/// Attention alone, forward and backward, for one text→image sequence on square grids with the given sides; `blockwise`:
/// from stock tensor ops, as on devices, instead of by the kernels of CPUs.
pub fn attention(shape: &Shape, sides: &[usize], blockwise: bool, repeat: usize) -> Result<Vec<Cost>> {
    let attend = |qkv: &Tensor, keys: &Arc<KeyRanges>| match blockwise {
        true => ops::attention::blockwise::attention(qkv, keys),
        false => ops::attention(qkv, keys),
    };
    let mut costs = Vec::new();
    for &side in sides {
        let layout = Layout::text_to_image(shape.config.text.max_tokens, Grid { height: side, width: side });
        let model = &shape.config.model;
        let qkv = qkv(layout.positions(), model.heads, model.hidden / model.heads)?;
        let cost = |(pattern, kind): (&'static str, Pattern)| {
            let keys = flops::keys(&layout, kind);
            let mut run = || once(&qkv, |qkv| attend(qkv, &keys));
            Cost::measure(pattern, side * side, 3.0 * flops::attention(model.hidden, &keys), repeat, &mut run)
        };
        let mut of_size = patterns(model.conv_size).into_iter().map(cost).collect::<Result<Vec<_>>>()?;
        if model.heads * layout.positions().pow(2) <= MAX_SCORES {
            let keys = flops::keys(&layout, Pattern::Dense);
            let mut run = || once(&qkv, |qkv| ops::attention::composed(qkv, &keys));
            let flops = 3.0 * flops::attention(model.hidden, &keys);
            of_size.push(Cost::measure("dense n×n", side * side, flops, repeat, &mut run)?);
        }
        compare(&mut of_size);
        costs.extend(of_size);
    }
    Ok(costs)
}

fn patterns(size: usize) -> [(&'static str, Pattern); 4] {
    [
        ("dense", Pattern::Dense),
        ("row", Pattern::Row(RowExtent::Window)),
        ("column", Pattern::Column),
        ("conv", Pattern::Conv { size, border: ConvBorder::Clip }),
    ]
}

fn qkv(positions: usize, heads: usize, d: usize) -> Result<Var> {
    let mut random = Random::keyed(1, "qkv", 0, 0);
    let values: Vec<f32> = (0..positions * 3 * heads * d).map(|_| random.normal() as f32).collect();
    Ok(Var::from_vec(values, (1, positions, 3, heads, d), &runtime::device()?)?)
}

fn once(qkv: &Var, attend: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let gradients = attend(qkv)?.sum_all()?.backward()?;
    gradients.get(qkv).context("attention returned no gradient")?;
    Ok(())
}

/// A whole block of the shape, forward and backward, with each pattern.
pub fn block(shape: &Shape, repeat: usize) -> Result<Vec<Cost>> {
    let mut costs = Vec::new();
    // The paper's order gives three layers the patterns row, column and conv.
    for (kind, names) in [(AttentionKind::Dense, &["dense"][..]), (AttentionKind::Sparse, &["row", "column", "conv"])] {
        let mut shape = shape.clone();
        (shape.config.model.attention, shape.config.model.layers) = (kind, names.len());
        let (generator, _) = work::generator(&shape)?;
        let (batch, layout) = (work::batch(&shape)?, layout(&shape));
        for (i, name) in names.iter().enumerate() {
            let mut chain = generator.segments();
            chain.drain(2 + i..1 + names.len());
            chain.drain(1..1 + i);
            let pattern = Pattern::of_layer(i + 1, &shape.config.model);
            let flops = 3.0 * shape.batch as f64 * flops::block(&shape.config.model, &layout, pattern);
            let mut shards = Shards::alone(&chain)?;
            let mut run = || work::forward_backward(&chain, &batch, &mut shards);
            costs.push(Cost::measure(name, layout.grid().len(), flops, repeat, &mut run)?);
        }
    }
    compare(&mut costs);
    Ok(costs)
}

impl Cost {
    fn measure(
        pattern: &'static str,
        codes: usize,
        flops: f64,
        repeat: usize,
        run: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let before = runtime::restart_peak();
        let seconds = seconds(repeat, run)?;
        let on_cpu = runtime::device()?.is_cpu();
        let memory = before.zip(runtime::peak_bytes()).map(|(before, peak)| peak.saturating_sub(before));
        let memory_bytes = memory.filter(|_| on_cpu);
        Ok(Self { pattern, codes, seconds, flops, memory_bytes, speedup: 1.0, memory_share: None })
    }
}

/// Fills in the columns relative to `dense`, the first entry.
fn compare(costs: &mut [Cost]) {
    let Some(Cost { seconds, memory_bytes: dense, .. }) = costs.first().cloned() else { return };
    for cost in costs {
        cost.speedup = seconds.median / cost.seconds.median;
        cost.memory_share = cost.memory_bytes.zip(dense).map(|(own, dense)| own as f64 / dense as f64);
    }
}
