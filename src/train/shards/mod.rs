//! What this rank holds of weights and gradients, and when they move: sharding stages 0 to 3 (paper §3.2).
//!
//! | stage | split over the ranks | what moves |
//! | --- | --- | --- |
//! | 0 | nothing | gradients are summed once a step |
//! | 1 | optimizer state | gradients to their owners, weights back, once a step |
//! | 2 | gradients too | gradients to their owners after every segment's backward pass, weights once a step |
//! | 3 | weights too | as 2, and each segment's weights come before its pass and go after it |
//!
//! With `train.shard_ranks = n`, n ranks after another (a node's) do this among them, and own what the ranks of the
//! other replicas own alike; gradients are summed over the replicas, too.
//!
//! The stages are ZeRO's (arXiv 1910.02054). All of them are this one policy over the same engine and the same
//! [`layout`](super::layout); one rank is the case in which nothing moves.
//!
//! In bf16, weights that products round before use travel rounded (see [`Handling`]): half the traffic, the same bits.
//! On GPUs variables are copies of the weights: see [`copies`].
//!
//! Where the group's collectives run beside computation, the next segment's weights are under way while a segment
//! computes, and so are the last one's gradients; stages 0 and 1 send theirs during a step's last backward pass. What
//! arrives is added in the same order either way, so that the bits are the same. What [`traffic`] says of floats on the
//! host, [`copies`] says of tensors on devices; this policy is one for both.

mod copies;
mod passes;
mod traffic;

use super::{
    layout::{Entry, Piece, layout},
    owned::Owned,
};
use crate::{
    dist::Group,
    error::{Context, Result, ensure},
    nn::{gradients::Gradients, params::Params, segment::Chain},
    ops::{self, Floats, Store},
};
use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, slice::HalfFloatSliceExt, vec::HalfFloatVecExt};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::LazyLock,
};
use traffic::{Going, Weights};

/// What a parameter wants of its shards.
#[derive(Debug, Clone, Copy, Default)]
pub struct Handling {
    /// It must lie on one rank.
    pub whole: bool,
    /// Whatever reads it rounds it to bf16 first, so that other ranks need no more of it.
    pub rounded: bool,
    /// It stays as it is.
    pub frozen: bool,
}

/// This rank's weights and gradients.
pub struct Shards<'g> {
    group: &'g Group,
    stage: u8,
    params: Params,
    units: Vec<Unit>,
    /// Which of the owners of pieces this rank is.
    owner: usize,
    /// This rank's range of every parameter of which it owns something.
    owned: BTreeMap<String, Range<usize>>,
    /// What each parameter wants.
    handling: BTreeMap<String, Handling>,
    /// Where the state lies that only the optimizer touches.
    store: Store,
    /// Where the variables are.
    device: Device,
    /// Whether variables are copies of the weights.
    copied: bool,
    /// What this rank gives of each unit, on the device, where variables are copies that go after use (stage 3).
    given: Vec<Vec<Tensor>>,
    /// The weights in `owned` where variables are copies, or empty between uses (stage 3).
    weights: BTreeMap<String, Floats>,
    /// The same in bf16, of variables that are copies in bf16: the optimizer rounds as it updates.
    rounded: BTreeMap<String, Vec<bf16>>,
    /// Of whole parameters: of this micro-batch (stages 2 and 3) or of this step.
    gradients: Gradients,
    /// Stages 1 to 3: summed over all ranks, of the elements in `owned`.
    sums: Gradients,
    /// Weights under way, of the unit that comes next.
    coming: Option<(usize, Weights)>,
    /// Sums under way, of the unit whose gradients went last.
    going: Option<Going>,
    /// Whether this is the step's last micro-batch.
    last: bool,
}

/// The parameters of one segment.
struct Unit {
    /// By rank.
    pieces: Vec<Vec<Piece>>,
    /// Whether the variables hold the weights.
    here: bool,
    /// Whether this step's gradients went to their owners (stages 0 and 1).
    sent: bool,
    /// Whether none of its parameters learns.
    frozen: bool,
}

impl Shards<'static> {
    /// A chain's weights and gradients on one rank.
    pub fn alone<B>(chain: &Chain<B>) -> Result<Self> {
        static ALONE: LazyLock<Group> = LazyLock::new(Group::alone);
        let params = chain.iter().flat_map(|segment| segment.params().clone()).collect();
        Self::new(&ALONE, 0, Store::Memory, &params, &names(chain), |_, _| Handling::default(), |_| Ok(None))
    }
}

/// The parameter names of each segment.
pub fn names<B>(chain: &Chain<B>) -> Vec<Vec<String>> {
    chain.iter().map(|segment| segment.params().keys().cloned().collect()).collect()
}

impl<'g> Shards<'g> {
    /// Shards the parameters, of which `units` lists the names by segment, as `handling` wants each. The parameters must be
    /// equal on all ranks, or be empty (stage 3): `fresh` then gives all elements of one.
    pub fn new(
        group: &'g Group,
        stage: u8,
        store: Store,
        params: &Params,
        units: &[Vec<String>],
        handling: impl Fn(&str, &Var) -> Handling,
        fresh: impl Fn(&str) -> Result<Option<Vec<f32>>>,
    ) -> Result<Self> {
        // One rank, or replicas: each rank owns everything.
        let stage = if group.shard_ranks() == 1 { 0 } else { stage };
        let owners = if stage == 0 { 1 } else { group.shard_ranks() };
        let handling: BTreeMap<_, _> = params.iter().map(|(name, var)| (name.clone(), handling(name, var))).collect();
        let entries = units.iter().map(|names| names.iter().map(|name| entry(params, name, &handling)).collect());
        let entries = entries.collect::<Result<Vec<Vec<Entry>>>>()?;
        let pieces = layout(&entries, owners);
        let owner = if stage == 0 { 0 } else { group.shard_rank() };
        let owned = pieces.iter().flat_map(|ranks| &ranks[owner]).map(|p| (p.name.clone(), p.range.clone())).collect();
        let covered: usize = pieces.iter().flatten().flatten().map(|piece| piece.range.len()).sum();
        let all: usize = params.values().map(|var| var.elem_count()).sum();
        ensure!(covered == all, "{covered} of {all} weights belong to exactly one segment");
        let frozen = units.iter().map(|names| names.iter().all(|name| handling[name].frozen));
        let unit = |(pieces, frozen)| Unit { pieces, here: true, sent: false, frozen };
        let units = pieces.into_iter().zip(frozen).map(unit).collect();
        let device = params.values().next().map_or(Device::Cpu, |var| var.device().clone());
        let mut shards = Self {
            group,
            stage,
            params: params.clone(),
            units,
            owner,
            owned,
            handling,
            store,
            copied: !device.is_cpu() || params.values().any(|var| var.dtype() != DType::F32),
            device,
            given: Vec::new(),
            weights: BTreeMap::new(),
            rounded: BTreeMap::new(),
            gradients: Gradients::default(),
            sums: Gradients::default(),
            coming: None,
            going: None,
            last: false,
        };
        let apart = if stage == 3 || shards.copied { &shards.owned } else { &BTreeMap::new() };
        // One after the other: they may not fit together.
        for (name, range) in apart {
            let part = match fresh(name)? {
                Some(values) => shards.store.copy(&values[range.clone()])?,
                None => shards.with_part(name, |weights| shards.store.copy(weights))??,
            };
            shards.weights.insert(name.clone(), part);
        }
        for (name, weights) in shards.weights.iter().filter(|(name, _)| params[*name].dtype() == DType::BF16) {
            shards.rounded.insert(name.clone(), Vec::from_f32_slice(weights));
        }
        (0..shards.units.len()).try_for_each(|unit| shards.release(unit))?;
        shards.give_copies()?;
        Ok(shards)
    }

    pub fn group(&self) -> &'g Group {
        self.group
    }

    /// Where the state lies that only the optimizer touches.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Copies of the weights that this rank owns, in the store.
    pub fn stored_parts(&self) -> Result<BTreeMap<String, Floats>> {
        let copy = |name: &String| {
            let stored = self.with_part(name, |weights| self.store.copy(weights))??;
            Ok((name.clone(), stored))
        };
        self.owned.keys().map(copy).collect()
    }

    /// All parameters; at stage 3 they are empty between uses.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// This rank's range of every parameter of which it owns something.
    pub fn owned(&self) -> &BTreeMap<String, Range<usize>> {
        &self.owned
    }

    /// Whether every rank owns everything.
    pub fn replicated(&self) -> bool {
        self.stage == 0
    }

    /// Whether what this rank owns goes into checkpoints: it is of the first replica.
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

    /// Forgets the last step's gradients.
    pub fn begin(&mut self, step: u64) {
        self.group.begin_step(step);
        self.gradients.clear();
        self.sums.clear();
        self.last = false;
        self.units.iter_mut().for_each(|unit| unit.sent = false);
    }

    /// The next pass over the chain is the step's last: a segment's gradients are whole when its backward pass ends.
    pub fn last_micro_batch(&mut self) {
        self.last = true;
    }

    /// Whether every parameter of this segment is frozen.
    pub fn is_frozen(&self, unit: usize) -> bool {
        self.units[unit].frozen
    }

    /// After a segment's backward pass: its gradients go to their owners, where the stage or the step wants it.
    pub fn reduce(&mut self, unit: usize) -> Result<()> {
        for piece in self.units[unit].pieces.iter().flatten().filter(|piece| self.handling[&piece.name].frozen) {
            self.gradients.free(&piece.name);
        }
        if self.stage >= 2 {
            self.send_gradients(unit)?;
            for piece in self.units[unit].pieces.iter().flatten() {
                self.gradients.free(&piece.name);
            }
        } else if self.last && self.group.overlaps() {
            self.send_gradients(unit)?;
        }
        Ok(())
    }

    /// After the last micro-batch: what was not summed over the ranks yet.
    pub fn finish(&mut self) -> Result<()> {
        if self.group.world_size() > 1 && self.stage < 2 {
            for unit in 0..self.units.len() {
                if !self.units[unit].sent {
                    self.send_gradients(unit)?;
                }
            }
        }
        self.receive_sums()
    }

    /// After the update: the weights that others own come (stages 1 and 2), and variables that are not the weights
    /// themselves become what those are now.
    pub fn refresh(&mut self) -> Result<()> {
        if self.stage == 3 {
            return self.give_copies();
        }
        if self.stage == 0 && !self.copied {
            return Ok(());
        }
        let mut coming = self.send_weights(0)?;
        for unit in 0..self.units.len() {
            let next = if unit + 1 < self.units.len() { Some(self.send_weights(unit + 1)?) } else { None };
            self.receive_weights(unit, coming)?;
            let Some(next) = next else { break };
            coming = next;
        }
        Ok(())
    }

    /// What to update: each parameter that has a gradient, as far as this rank owns it.
    pub fn updates(&mut self) -> Vec<Owned<'_>> {
        let gradients = if self.stage == 0 { &self.gradients } else { &self.sums };
        let mut weights: BTreeMap<&str, &mut Floats> =
            self.weights.iter_mut().map(|(name, values)| (name.as_str(), values)).collect();
        let mut rounded: BTreeMap<&str, &mut Vec<bf16>> =
            self.rounded.iter_mut().map(|(name, values)| (name.as_str(), values)).collect();
        let update = |(name, range): (&'_ String, &Range<usize>)| {
            let (weights, rounded) = (weights.remove(name.as_str()), rounded.remove(name.as_str()));
            let (name, var) = self.params.get_key_value(name)?;
            Some(Owned { name, var, gradient: gradients.get(name)?, range: range.clone(), weights, rounded })
        };
        self.owned.iter().filter_map(update).collect()
    }

    /// Calls `f` with the weights that this rank owns of `name`.
    pub fn with_part<R>(&self, name: &str, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let range = self.owned.get(name).with_context(|| format!("this rank owns nothing of `{name}`"))?;
        match self.weights.get(name) {
            Some(weights) => Ok(f(weights)),
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

    /// Sets the weights that this rank owns of `name`; [`Shards::refresh`] takes them to the other ranks.
    pub fn set_part(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let range = self.owned.get(name).with_context(|| format!("this rank owns nothing of `{name}`"))?;
        match self.weights.get_mut(name) {
            Some(weights) => weights.copy_from_slice(values),
            None => ops::with_slice_mut(&self.params[name], |w: &mut [f32]| w[range.clone()].copy_from_slice(values))?,
        }
        if let Some(rounded) = self.rounded.get_mut(name) {
            rounded.convert_from_f32_slice(values);
        }
        Ok(())
    }

    /// Whole parameters on the leading rank, put together from what `part` gives on the rank that owns it.
    pub fn collect(&self, part: impl Fn(&Self, &str) -> Result<Vec<f32>>) -> Result<Option<HashMap<String, Tensor>>> {
        let mut full: HashMap<String, Vec<f32>> = HashMap::new();
        if self.replicated() {
            let parts = self.owned.keys().map(|name| Ok((name.clone(), part(self, name)?)));
            full = parts.collect::<Result<_>>()?;
        } else {
            for unit in 0..self.units.len() {
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
