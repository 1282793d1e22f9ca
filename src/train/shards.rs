//! What this rank holds of weights and gradients, and when they move: sharding stages 0 to 3 (paper §3.2).
//!
//! | stage | split over the ranks | what moves |
//! | --- | --- | --- |
//! | 0 | nothing | gradients are summed once a step |
//! | 1 | optimizer state | gradients to their owners, weights back, once a step |
//! | 2 | gradients too | gradients to their owners after every segment's backward pass, weights once a step |
//! | 3 | weights too | as 2, and each segment's weights come before its pass and go after it |
//!
//! The stages are ZeRO's (arXiv 1910.02054). All of them are this one policy over the same engine and the same
//! [`layout`](super::layout); one rank is the case in which nothing moves.

use super::{
    engine::Chain,
    layout::{Entry, Piece, layout},
    owned::Owned,
};
use crate::{
    dist::Group,
    error::{Context, Result, ensure},
    nn::{gradients::Gradients, params::Params},
    ops::{self, Floats, Store, gemm::Onto},
};
use candle_core::{Device, Shape, Tensor, Var};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::LazyLock,
};

/// This rank's weights and gradients.
pub struct Shards<'g> {
    group: &'g Group,
    stage: u8,
    params: Params,
    units: Vec<Unit>,
    /// This rank's range of every parameter of which it owns something.
    owned: BTreeMap<String, Range<usize>>,
    /// Where the state lies that only the optimizer touches.
    store: Store,
    /// Stage 3: the weights in `owned`; the variables are empty between uses.
    weights: BTreeMap<String, Floats>,
    /// Of whole parameters: of this micro-batch (stages 2 and 3) or of this step.
    gradients: Gradients,
    /// Stages 1 to 3: summed over all ranks, of the elements in `owned`.
    sums: Gradients,
}

/// The parameters of one segment.
struct Unit {
    /// By rank.
    pieces: Vec<Vec<Piece>>,
    /// Whether the variables hold the weights.
    here: bool,
}

impl Shards<'static> {
    /// A chain's weights and gradients on one rank.
    pub fn alone<B>(chain: &Chain<B>) -> Result<Self> {
        static ALONE: LazyLock<Group> = LazyLock::new(Group::alone);
        let params = chain.iter().flat_map(|segment| segment.params().clone()).collect();
        Self::new(&ALONE, 0, Store::Memory, &params, &names(chain), |_, _| false)
    }
}

/// The parameter names of each segment.
pub fn names<B>(chain: &Chain<B>) -> Vec<Vec<String>> {
    chain.iter().map(|segment| segment.params().keys().cloned().collect()).collect()
}

impl<'g> Shards<'g> {
    /// Shards the parameters, of which `units` lists the names by segment; `whole` says which cannot be cut. The
    /// parameters must be equal on all ranks.
    pub fn new(
        group: &'g Group,
        stage: u8,
        store: Store,
        params: &Params,
        units: &[Vec<String>],
        whole: impl Fn(&str, &Var) -> bool,
    ) -> Result<Self> {
        // One rank, or replicas: each rank owns everything.
        let stage = if group.world_size() == 1 { 0 } else { stage };
        let owners = if stage == 0 { 1 } else { group.world_size() };
        let entries = units.iter().map(|names| names.iter().map(|name| entry(params, name, &whole)).collect());
        let entries = entries.collect::<Result<Vec<Vec<Entry>>>>()?;
        let pieces = layout(&entries, owners);
        let ours = if stage == 0 { 0 } else { group.rank() };
        let owned = pieces.iter().flat_map(|ranks| &ranks[ours]).map(|p| (p.name.clone(), p.range.clone())).collect();
        let covered: usize = pieces.iter().flatten().flatten().map(|piece| piece.range.len()).sum();
        let all: usize = params.values().map(|var| var.elem_count()).sum();
        ensure!(covered == all, "{covered} of {all} weights belong to exactly one segment");
        let units = pieces.into_iter().map(|pieces| Unit { pieces, here: true }).collect();
        let (gradients, sums) = (Gradients::default(), Gradients::default());
        let params = params.clone();
        let weights = BTreeMap::new();
        let mut shards = Self { group, stage, params, units, owned, store, weights, gradients, sums };
        if stage == 3 {
            shards.weights = shards.stored_parts()?;
            (0..shards.units.len()).try_for_each(|unit| shards.release(unit))?;
        }
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
    }

    /// Before a segment's pass: its weights come (stage 3).
    pub fn gather(&mut self, unit: usize) -> Result<()> {
        if self.units[unit].here {
            return Ok(());
        }
        for (name, values) in self.whole(unit, Self::part)? {
            ops::replace(&self.params[&name], values)?;
        }
        self.units[unit].here = true;
        Ok(())
    }

    /// After a segment's pass: its weights go (stage 3).
    pub fn release(&mut self, unit: usize) -> Result<()> {
        if self.stage < 3 {
            return Ok(());
        }
        let unit = &mut self.units[unit];
        for piece in unit.pieces.iter().flatten() {
            ops::replace(&self.params[&piece.name], Vec::new())?;
        }
        unit.here = false;
        Ok(())
    }

    /// After a segment's backward pass: its gradients go to their owners (stages 2 and 3).
    pub fn reduce(&mut self, unit: usize) -> Result<()> {
        if self.stage < 2 {
            return Ok(());
        }
        self.reduce_scatter(unit)?;
        for piece in self.units[unit].pieces.iter().flatten() {
            self.gradients.free(&piece.name);
        }
        Ok(())
    }

    /// After the last micro-batch: what was not summed over the ranks yet.
    pub fn finish(&mut self) -> Result<()> {
        let units = 0..self.units.len();
        match self.stage {
            0 if self.group.world_size() > 1 => units.into_iter().try_for_each(|unit| self.all_reduce(unit)),
            1 => units.into_iter().try_for_each(|unit| self.reduce_scatter(unit)),
            _ => Ok(()),
        }
    }

    /// After the update: the weights that others own come (stages 1 and 2).
    pub fn refresh(&mut self) -> Result<()> {
        if !(1..=2).contains(&self.stage) {
            return Ok(());
        }
        let elsewhere = self.params.values().any(|var| !var.device().is_cpu());
        for unit in 0..self.units.len() {
            if elsewhere {
                // Each weight goes to the device once, not once a piece.
                for (name, values) in self.whole(unit, Self::part)? {
                    ops::replace(&self.params[&name], values)?;
                }
                continue;
            }
            self.all_gather(unit, Self::part, |piece, part| {
                let write = |weights: &mut [f32]| weights[piece.range.clone()].copy_from_slice(part);
                Ok(ops::with_slice_mut(&self.params[&piece.name], write)?)
            })?;
        }
        Ok(())
    }

    /// What to update: each parameter that has a gradient, as far as this rank owns it.
    pub fn updates(&mut self) -> Vec<Owned<'_>> {
        let gradients = if self.stage == 0 { &self.gradients } else { &self.sums };
        let mut weights: BTreeMap<&str, &mut Floats> =
            self.weights.iter_mut().map(|(name, values)| (name.as_str(), values)).collect();
        let update = |(name, range): (&'_ String, &Range<usize>)| {
            let (gradient, weights) = (gradients.get(name), weights.remove(name.as_str()));
            let (name, var) = self.params.get_key_value(name)?;
            Some(Owned { name, var, gradient: gradient?, range: range.clone(), weights })
        };
        self.owned.iter().filter_map(update).collect()
    }

    /// Calls `f` with the weights that this rank owns of `name`.
    pub fn with_part<R>(&self, name: &str, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        let range = self.owned.get(name).with_context(|| format!("this rank owns nothing of `{name}`"))?;
        match self.weights.get(name) {
            Some(weights) => Ok(f(weights)),
            None => Ok(ops::with_slice(&self.params[name], |weights: &[f32]| f(&weights[range.clone()]))?),
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
                let whole = self.whole(unit, &part)?;
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
        let counted: Vec<f64> =
            ours.iter().flat_map(|size| [f64::from(u8::from(size.is_some())), size.unwrap_or(0.0)]).collect();
        Ok(self.group.sum(&counted)?.chunks(2).map(|pair| (pair[0] > 0.0).then(|| pair[1])).collect())
    }

    /// Whole parameters of a unit, put together from what `part` gives on the rank that owns it.
    fn whole(&self, unit: usize, part: impl Fn(&Self, &str) -> Result<Vec<f32>>) -> Result<HashMap<String, Vec<f32>>> {
        let mut full = HashMap::new();
        self.all_gather(unit, part, |piece, values| {
            let len = self.params[&piece.name].elem_count();
            let whole = full.entry(piece.name.clone()).or_insert_with(|| vec![0.0; len]);
            whole[piece.range.clone()].copy_from_slice(values);
            Ok(())
        })?;
        Ok(full)
    }

    /// Every rank's part of a unit, piece by piece.
    fn all_gather(
        &self,
        unit: usize,
        part: impl Fn(&Self, &str) -> Result<Vec<f32>>,
        mut take: impl FnMut(&Piece, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let pieces = &self.units[unit].pieces;
        let counts: Vec<usize> = pieces.iter().map(|pieces| length(pieces.iter())).collect();
        let mut ours = Vec::with_capacity(counts[self.group.rank()]);
        for piece in &pieces[self.group.rank()] {
            ours.extend(part(self, &piece.name)?);
        }
        for (pieces, values) in pieces.iter().zip(self.group.all_gather(ours, &counts)?) {
            let mut rest = values.as_slice();
            for piece in pieces {
                let (part, after) = rest.split_at(piece.range.len());
                take(piece, part)?;
                rest = after;
            }
        }
        Ok(())
    }

    /// Adds the sum over all ranks of a unit's gradients to those of their owners.
    fn reduce_scatter(&mut self, unit: usize) -> Result<()> {
        let live = |piece: &&Piece| self.gradients.get(&piece.name).is_some();
        let pieces: Vec<Vec<&Piece>> =
            self.units[unit].pieces.iter().map(|pieces| pieces.iter().filter(live).collect()).collect();
        let counts: Vec<usize> = pieces.iter().map(|pieces| length(pieces.iter().copied())).collect();
        let all = flat(&self.gradients, pieces.iter().flatten().copied())?;
        let sums = self.group.reduce_scatter(all, &counts)?;
        let mut rest = sums.as_slice();
        for piece in &pieces[self.group.rank()] {
            let (part, after) = rest.split_at(piece.range.len());
            self.sums.accumulate(&piece.name, &Shape::from(part.len()), |sum, onto| match onto {
                Onto::Nothing => sum.copy_from_slice(part),
                Onto::Old => ops::slices::add(sum, part),
            })?;
            rest = after;
        }
        Ok(())
    }

    /// Sums a unit's gradients over all ranks, on all ranks.
    fn all_reduce(&mut self, unit: usize) -> Result<()> {
        let pieces: Vec<&Piece> = self.units[unit].pieces.iter().flatten().collect();
        let sums = self.group.all_reduce(flat(&self.gradients, pieces.iter().copied())?)?;
        let mut rest = sums.as_slice();
        for piece in pieces {
            let Some(gradient) = self.gradients.get(&piece.name) else { continue };
            let (part, after) = rest.split_at(piece.range.len());
            ops::with_slice_mut(gradient, |sum: &mut [f32]| sum.copy_from_slice(part))?;
            rest = after;
        }
        Ok(())
    }
}

fn entry(params: &Params, name: &String, whole: impl Fn(&str, &Var) -> bool) -> Result<Entry> {
    let var = params.get(name).with_context(|| format!("a segment holds `{name}`, which is no parameter"))?;
    Ok(Entry { name: name.clone(), len: var.elem_count(), whole: whole(name, var) })
}

fn length<'a>(pieces: impl Iterator<Item = &'a Piece>) -> usize {
    pieces.map(|piece| piece.range.len()).sum()
}

/// The gradients of these pieces one after another; pieces without one are left out.
fn flat<'a>(gradients: &Gradients, pieces: impl Iterator<Item = &'a Piece>) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for piece in pieces {
        if let Some(gradient) = gradients.get(&piece.name) {
            ops::with_slice(gradient, |values: &[f32]| all.extend_from_slice(&values[piece.range.clone()]))?;
        }
    }
    Ok(all)
}
