//! Blocks of shards in memory: consecutive samples of a shard that are read together, for reading in the order of storage.

use super::{
    bad::Bad,
    members::Members,
    record::{Kind, wants},
    shard::Shard,
    tar::{self, Place},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// Size of a block in bytes, about.
pub const BLOCK_BYTES: u64 = 512 << 10;
/// Samples beyond this size are read by themselves.
const MAX_BLOCK: u64 = 16 << 20;

/// Source, shard and number of a block.
type Key = (usize, usize, usize);
/// A block, once it has been read.
type Slot = OnceLock<Result<Block, Bad>>;

/// The blocks that were read last, up to a number of bytes. Threads share it; each block is read once.
#[derive(Debug)]
pub struct BlockCache {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Each with the read that used it last.
    blocks: HashMap<Key, (u64, Arc<Slot>)>,
    bytes: usize,
    /// Number of reads so far.
    reads: u64,
}

#[derive(Debug)]
struct Block {
    /// Number of the first sample in the shard.
    first: usize,
    places: Vec<Place>,
    bytes: Vec<u8>,
}

impl BlockCache {
    /// An empty cache of `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, state: Mutex::default() }
    }

    /// The key of sample `index` of a shard, and those of its members that are read for `kind`.
    ///
    /// # Errors
    /// The sample is bad.
    pub fn members(
        &self,
        (source, number): (usize, usize),
        shard: &Shard,
        index: usize,
        kind: Kind,
    ) -> Result<(String, Members), Bad> {
        let Some(samples) = shard.samples_per_block(BLOCK_BYTES) else { return shard.members(index, Some(kind)) };
        let slot = self.slot((source, number, index / samples));
        let block = slot.get_or_init(|| self.read(shard, index / samples * samples, samples));
        let block = block.as_ref().map_err(Clone::clone)?;
        match block.sample(index) {
            Some(bytes) => tar::parse(&shard.path, bytes, |extension| wants(Some(kind), extension)),
            None => shard.members(index, Some(kind)),
        }
    }

    /// The place of a block, which may not have been read yet. Blocks that were not used for the longest time are dropped.
    fn slot(&self, key: Key) -> Arc<Slot> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.reads += 1;
        let now = state.reads;
        let (used, slot) = state.blocks.entry(key).or_default();
        *used = now;
        let slot = slot.clone();
        while state.bytes > self.capacity {
            let oldest = state.blocks.iter().filter(|(other, _)| **other != key).min_by_key(|(_, (used, _))| *used);
            let Some(oldest) = oldest.map(|(key, _)| *key) else { break };
            let dropped = state.blocks.remove(&oldest);
            let size = dropped.and_then(|(_, slot)| slot.get()?.as_ref().ok().map(Block::size)).unwrap_or(0);
            state.bytes = state.bytes.saturating_sub(size);
        }
        slot
    }

    fn read(&self, shard: &Shard, first: usize, samples: usize) -> Result<Block, Bad> {
        let block = Block::read(shard, first, samples)?;
        self.state.lock().unwrap_or_else(PoisonError::into_inner).bytes += block.size();
        Ok(block)
    }
}

impl Block {
    fn read(shard: &Shard, first: usize, samples: usize) -> Result<Self, Bad> {
        let last = (first + samples).min(shard.len() as usize);
        let places = shard.places(first..last)?;
        let start = places.first().map_or(0, |place| place.start);
        let end = places.iter().map(|place| place.start + place.length).max().unwrap_or(start);
        let mut block = Self { first, places, bytes: Vec::new() };
        if end - start <= MAX_BLOCK {
            block.bytes = vec![0; (end - start) as usize];
            shard.read_at(&mut block.bytes, start)?;
        }
        Ok(block)
    }

    /// The bytes of sample `index`; `None` if the block was too large to be read.
    fn sample(&self, index: usize) -> Option<&[u8]> {
        let start = self.places.first()?.start;
        let place = self.places.get(index.checked_sub(self.first)?)?;
        let from = (place.start - start) as usize;
        self.bytes.get(from..from + place.length as usize)
    }

    fn size(&self) -> usize {
        self.bytes.len() + self.places.len() * size_of::<Place>()
    }
}
