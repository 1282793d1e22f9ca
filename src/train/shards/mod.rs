//! The weights and gradients that this rank holds, and their transfers: ZeRO stages 0 to 3 (arXiv 1910.02054; paper §3.2).
//!
//! | stage | sharded over the ranks | transfers |
//! | --- | --- | --- |
//! | 0 | nothing | all-reduce of gradients once a step |
//! | 1 | optimizer state | reduce-scatter of gradients and all-gather of weights once a step |
//! | 2 | also gradients | reduce-scatter after every segment's backward pass, all-gather of weights once a step |
//! | 3 | also weights | as 2, but an all-gather before each of a segment's passes; the weights are freed after it |
//!
//! With `train.hsdp_shard_size = n` (HSDP), each group of n consecutive ranks (a node) does this among itself, and the groups
//! are replicas: gradients are also summed over the groups.
//!
//! All stages are one policy over the same engine and the same [`layout`](super::layout). With one rank there are no
//! transfers.
//!
//! In bf16, weights that products round before use are sent rounded (see [`Handling`]): half the traffic, the same bits.
//! On devices variables are copies of the weights: see [`device`]. [`in_flight`] says what travels when.

mod device;
mod host;
mod in_flight;

use super::{
    layout::{Entry, Piece, layout},
    owned::Owned,
};
use crate::{
    dist::Group,
    error::{Context, Result, ensure},
    nn::{
        gradients::Gradients,
        params::{Attributes, Params},
        segment::Chain,
    },
    ops::{self, Buffer, Store},
};
use candle_core::{DType, Device, Tensor};
use half::{bf16, slice::HalfFloatSliceExt, vec::HalfFloatVecExt};
use in_flight::{GradientState, WeightState};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::LazyLock,
};

/// How the shards treat a parameter.
#[derive(Debug, Clone, Copy, Default)]
pub struct Handling {
    /// A single rank must own all of it.
    pub whole: bool,
    /// All readers round it to bf16 first, so that other ranks get it in bf16.
    pub rounded: bool,
    /// It is not trained.
    pub frozen: bool,
    /// It is frozen and never changes, so that ranks that hold all weights need not exchange it.
    pub base: bool,
}

/// This rank's weights and gradients.
pub struct Shards<'g> {
    group: &'g Group,
    stage: u8,
    params: Params,
    parameter_groups: Vec<ParameterGroup>,
    /// This rank's number among the owners of pieces.
    owner: usize,
    /// This rank's range of every parameter of which it owns something.
    owned: BTreeMap<String, Range<usize>>,
    /// By parameter.
    handling: BTreeMap<String, Handling>,
    /// Where optimizer state is stored.
    store: Store,
    /// Where the variables are.
    device: Device,
    masters: Masters,
    /// Gradients of whole parameters: of this micro-batch (stages 2 and 3) or of this step (0 and 1).
    gradients: Gradients,
    /// Stages 1 to 3: gradients of the elements in `owned`, summed over all ranks.
    sums: Gradients,
    /// Whether this is the step's last micro-batch.
    last: bool,
}

/// The weights that the optimizer updates, where these are not the variables themselves.
#[derive(Default)]
struct Masters {
    /// Whether variables are copies of the weights.
    copied: bool,
    /// The weights in [`Shards::owned`] where variables are copies, or freed between uses (stage 3).
    weights: BTreeMap<String, Buffer>,
    /// The same in bf16 on the host, of variables that are copies in bf16: the optimizer rounds as it updates.
    rounded: BTreeMap<String, Vec<bf16>>,
}

/// The parameters of one segment.
struct ParameterGroup {
    /// By rank.
    pieces: Vec<Vec<Piece>>,
    weights: WeightState,
    gradients: GradientState,
    /// This rank's shard of the weights on the device, where variables are copies that are freed after use (stage 3).
    device_part: Vec<Tensor>,
    /// Whether all of its parameters are frozen.
    frozen: bool,
}

impl Shards<'static> {
    /// A chain's weights and gradients on one rank.
    pub fn alone<B>(chain: &Chain<B>) -> Result<Self> {
        Self::on_one_rank(&chain.iter().flat_map(|segment| segment.params().clone()).collect(), &names(chain))
    }

    /// The same of several chains: `parameter_groups` lists the names by segment.
    pub fn on_one_rank(params: &Params, parameter_groups: &[Vec<String>]) -> Result<Self> {
        static ALONE: LazyLock<Group> = LazyLock::new(Group::alone);
        let handling = |_: &str, of: Attributes| Handling { frozen: of.base, base: of.base, ..Handling::default() };
        Self::new(&ALONE, 0, Store::Memory, params, parameter_groups, handling, |_| Ok(None))
    }
}

/// The parameter names of each segment.
pub fn names<B>(chain: &Chain<B>) -> Vec<Vec<String>> {
    chain.iter().map(|segment| segment.params().keys().cloned().collect()).collect()
}

impl<'g> Shards<'g> {
    /// Shards `params`; `parameter_groups` lists their names by segment, and `handling` says how each is treated. The parameters must
    /// be equal on all ranks, or empty (stage 3): then `fresh` returns all elements of one.
    ///
    /// # Errors
    /// A parameter belongs to no segment or to two, or the store cannot be written.
    pub fn new(
        group: &'g Group,
        stage: u8,
        store: Store,
        params: &Params,
        parameter_groups: &[Vec<String>],
        handling: impl Fn(&str, Attributes) -> Handling,
        fresh: impl Fn(&str) -> Result<Option<Vec<f32>>>,
    ) -> Result<Self> {
        // One rank, or replicas: each rank owns everything.
        let stage = if group.hsdp_shard_size() == 1 { 0 } else { stage };
        let owners = if stage == 0 { 1 } else { group.hsdp_shard_size() };
        let handling: BTreeMap<_, _> =
            params.iter().map(|(name, param)| (name.clone(), handling(name, param.attributes))).collect();
        let entries =
            parameter_groups.iter().map(|names| names.iter().map(|name| entry(params, name, &handling)).collect());
        let entries = entries.collect::<Result<Vec<Vec<Entry>>>>()?;
        let pieces = layout(&entries, owners);
        let owner = if stage == 0 { 0 } else { group.shard_rank() };
        let owned = pieces.iter().flat_map(|ranks| &ranks[owner]).map(|p| (p.name.clone(), p.range.clone())).collect();
        let covered: usize = pieces.iter().flatten().flatten().map(|piece| piece.range.len()).sum();
        let all: usize = params.values().map(|var| var.elem_count()).sum();
        ensure!(covered == all, "{covered} of {all} weights belong to exactly one segment");
        let frozen = parameter_groups.iter().map(|names| names.iter().all(|name| handling[name].frozen));
        let unit = |(pieces, frozen)| {
            let (weights, gradients) = (WeightState::Resident, GradientState::Accumulating);
            ParameterGroup { pieces, weights, gradients, device_part: Vec::new(), frozen }
        };
        let parameter_groups = pieces.into_iter().zip(frozen).map(unit).collect();
        let on_device = matches!(store, Store::Device(_));
        let device = params.values().next().map_or(Device::Cpu, |var| var.device().clone());
        let mut shards = Self {
            group,
            stage,
            params: params.clone(),
            parameter_groups,
            owner,
            owned,
            handling,
            store,
            masters: Masters {
                copied: on_device || !device.is_cpu() || params.values().any(|var| var.dtype() != DType::F32),
                ..Masters::default()
            },
            device,
            gradients: Gradients::default(),
            sums: Gradients::default(),
            last: false,
        };
        let apart = |name: &str| stage == 3 || shards.masters.copied && !shards.handling[name].base;
        let apart: Vec<_> = shards.owned.iter().filter(|(name, _)| apart(name)).collect();
        // One after the other: they may not fit together.
        for (name, range) in apart {
            let part = match fresh(name)? {
                Some(values) => shards.store.copy(&values[range.clone()])?,
                None => shards.with_part(name, |weights| shards.store.copy(weights))??,
            };
            shards.masters.weights.insert(name.clone(), part);
        }
        let Masters { weights, rounded, .. } = &mut shards.masters;
        for (name, weights) in weights.iter().filter(|(name, _)| params[*name].dtype() == DType::BF16 && !on_device) {
            rounded.insert(name.clone(), Vec::from_f32_slice(&weights.values()?));
        }
        (0..shards.parameter_groups.len()).try_for_each(|unit| shards.reshard(unit))?;
        shards.update_device_parts()?;
        Ok(shards)
    }

    /// The ranks that the shards are distributed over.
    pub fn group(&self) -> &'g Group {
        self.group
    }

    /// Where optimizer state is stored.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Copies of the weights that this rank owns and trains, by name, in the store.
    pub fn stored_parts(&self) -> Result<BTreeMap<String, Buffer>> {
        let copy = |name: &String| {
            let stored = self.with_part(name, |weights| self.store.copy(weights))??;
            Ok((name.clone(), stored))
        };
        self.trained().map(|(name, _)| name).map(copy).collect()
    }

    /// All parameters; at stage 3 they are empty between uses.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// This rank's range of every parameter of which it owns something.
    pub fn owned(&self) -> &BTreeMap<String, Range<usize>> {
        &self.owned
    }

    /// The entries of [`Shards::owned`] that are not frozen.
    pub fn trained(&self) -> impl Iterator<Item = (&String, &Range<usize>)> {
        self.owned.iter().filter(|(name, _)| !self.handling[*name].frozen)
    }

    /// Whether a piece is never sent: it belongs to a frozen base, and every rank keeps all weights.
    fn stays(&self, piece: &Piece) -> bool {
        self.stage < 3 && self.handling[&piece.name].base
    }

    /// Whether every rank owns everything.
    pub fn replicated(&self) -> bool {
        self.stage == 0
    }

    /// Whether this rank writes what it owns to checkpoints: only the first replica does.
    pub fn writes(&self) -> bool {
        if self.replicated() { self.group.leads() } else { self.group.in_first_replica() }
    }

    /// Where a segment adds the gradients of whole parameters.
    pub fn gradients(&mut self) -> &mut Gradients {
        &mut self.gradients
    }

    /// The gradients that this rank updates with, after [`Shards::finish`]: of what it owns, summed over all ranks.
    pub fn reduced(&self) -> &Gradients {
        if self.replicated() { &self.gradients } else { &self.sums }
    }

    /// Whether every parameter of this segment is frozen.
    pub fn is_frozen(&self, unit: usize) -> bool {
        self.parameter_groups[unit].frozen
    }

    /// What the optimizer updates on this rank: what it owns of each parameter that has a gradient.
    pub fn updates(&mut self) -> Vec<Owned<'_>> {
        let gradients = if self.stage == 0 { &self.gradients } else { &self.sums };
        let mut weights: BTreeMap<&str, &mut Buffer> =
            self.masters.weights.iter_mut().map(|(name, values)| (name.as_str(), values)).collect();
        let mut rounded: BTreeMap<&str, &mut Vec<bf16>> =
            self.masters.rounded.iter_mut().map(|(name, values)| (name.as_str(), values)).collect();
        let update = |(name, range): (&'_ String, &Range<usize>)| {
            let (weights, rounded) = (weights.remove(name.as_str()), rounded.remove(name.as_str()));
            let (name, param) = self.params.get_key_value(name)?;
            Some(Owned { name, param, gradient: gradients.get(name)?, range: range.clone(), weights, rounded })
        };
        self.owned.iter().filter_map(update).collect()
    }

    /// The weights that this rank owns of `name`, unless they are in the variable.
    pub fn master(&self, name: &str) -> Option<&Buffer> {
        self.masters.weights.get(name)
    }

    /// Calls `f` with the weights that this rank owns of `name`, on the host.
    pub fn with_part<R>(&self, name: &str, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let range = self.owned.get(name).with_context(|| format!("this rank owns nothing of `{name}`"))?;
        match self.masters.weights.get(name) {
            Some(weights) => Ok(f(&weights.values()?)),
            None => {
                let weights = self.params[name].to_dtype(DType::F32)?;
                Ok(ops::with_slice(&weights, |weights: &[f32]| f(&weights[range.clone()]))?)
            }
        }
    }

    /// The weights that this rank owns of `name`.
    pub fn part(&self, name: &str) -> Result<Vec<f32>> {
        self.with_part(name, <[f32]>::to_vec)
    }

    /// Sets the weights that this rank owns of `name`; [`Shards::refresh`] sends them to the other ranks.
    pub fn set_part(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let range = self.owned.get(name).with_context(|| format!("this rank owns nothing of `{name}`"))?;
        match self.masters.weights.get_mut(name) {
            Some(weights) => weights.set(values)?,
            None => ops::with_slice_mut(&self.params[name], |w: &mut [f32]| w[range.clone()].copy_from_slice(values))?,
        }
        if let Some(rounded) = self.masters.rounded.get_mut(name) {
            rounded.convert_from_f32_slice(values);
        }
        Ok(())
    }

    /// Whole parameters by name on the leading rank (`None` on the others); `part` returns the elements that a rank owns.
    pub fn collect(&self, part: impl Fn(&Self, &str) -> Result<Vec<f32>>) -> Result<Option<HashMap<String, Tensor>>> {
        let mut full: HashMap<String, Vec<f32>> = HashMap::new();
        if self.replicated() {
            let parts = self.owned.keys().map(|name| Ok((name.clone(), part(self, name)?)));
            full = parts.collect::<Result<_>>()?;
        } else {
            for unit in 0..self.parameter_groups.len() {
                let whole = self.whole(unit, self.send_exactly(unit, &part)?)?;
                if self.group.leads() {
                    full.extend(whole);
                }
            }
        }
        if !self.group.leads() {
            return Ok(None);
        }
        let tensor = |(name, values)| {
            let tensor = Tensor::from_vec(values, self.params[&name].shape(), &Device::Cpu)?;
            Ok((name, tensor))
        };
        full.into_iter().map(tensor).collect::<Result<_>>().map(Some)
    }

    /// The sum of absolute values of each of these parameters' reduced gradients, over all ranks.
    pub fn sizes(&self, names: &[&String]) -> Result<Vec<Option<f64>>> {
        let ours = self.reduced().sizes(names)?;
        if self.replicated() {
            return Ok(ours);
        }
        let counted = ours.iter().map(|size| size.filter(|_| self.group.in_first_replica()));
        let counted: Vec<f64> =
            counted.flat_map(|size| [f64::from(u8::from(size.is_some())), size.unwrap_or(0.0)]).collect();
        Ok(self.group.sum(&counted)?.chunks(2).map(|pair| (pair[0] > 0.0).then(|| pair[1])).collect())
    }
}

fn entry(params: &Params, name: &String, handling: &BTreeMap<String, Handling>) -> Result<Entry> {
    let var = params.get(name).with_context(|| format!("a segment holds `{name}`, which is no parameter"))?;
    Ok(Entry { name: name.clone(), len: var.elem_count(), whole: handling[name].whole })
}

#[cfg(test)]
mod tests;
