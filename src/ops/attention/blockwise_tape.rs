//! The ops of [`blockwise`](super::blockwise) attention as sizes, line by line. A change there wants the same change here.

use super::{
    blockwise_parts_tape::{Others, Sizes},
    grouping::grouped,
    key_ranges::KeyLists,
};
use crate::ops::tape::{Id, Layers, Tape};

/// qkv (samples, positions, 3, heads, d) → (samples, positions, heads · d).
pub fn attention(
    layers: &Layers,
    tape: &mut Tape,
    qkv: Id,
    lists: &KeyLists,
    [samples, positions, heads]: [usize; 3],
) -> Id {
    let blocks = grouped(lists, positions);
    let all = tape.elements(qkv) / 3;
    let rows = (samples * heads) as u64;
    let d = all / (rows * positions as u64).max(1);
    let sizes = Sizes { layers, blocks: &blocks, rows, d, positions };
    let [mut forward, mut backward] = [Tape::default(), Tape::default()];
    sizes.forward(&mut forward);
    sizes.backward(&mut backward);
    let peak = backward.peak();
    tape.composed(&[qkv], &forward, &backward, peak)
}

impl Sizes<'_> {
    fn forward(&self, tape: &mut Tape) {
        let [q, k, v] = self.split(tape);
        let others = (self.others_len() > 0).then(|| {
            let Others { q, seen } = self.others(tape, [q, k, v]);
            match seen {
                Some([_, v, weights]) => tape.matmul(weights, v, self.of(self.others_len()), self.blocks.reach as u64),
                None => q,
            }
        });
        let codes = (!self.blocks.codes.is_empty()).then(|| {
            let codes = self.codes(tape, [q, k, v]);
            self.output(tape, &codes)
        });
        let joined = self.joined(tape, others, codes);
        tape.copy(joined);
    }

    fn backward(&self, tape: &mut Tape) {
        let dy = tape.leaf(self.of(self.positions), self.layers.stream);
        let dy = tape.copy(dy);
        let [q, k, v] = self.split(tape);
        let (mut dk, mut dv) = (None, None);
        let others = (self.others_len() > 0).then(|| self.others_backward(tape, [q, k, v], dy, &mut dk, &mut dv));
        let codes = (!self.blocks.codes.is_empty()).then(|| {
            let codes = self.codes(tape, [q, k, v]);
            tape.free(&[q, k, v]);
            self.codes_backward(tape, codes, dy, &mut dk, &mut dv)
        });
        let joined = self.joined(tape, others, codes);
        tape.free(
            &others.into_iter().chain(codes).map(|id| tape.owner(id)).filter(|id| *id != joined).collect::<Vec<_>>(),
        );
        let dq = tape.affine(joined);
        tape.free(&[joined]);
        let parts: Vec<Id> = [Some(dq), dk, dv].into_iter().flatten().collect();
        tape.cat(&parts);
    }

    /// All positions in order.
    fn joined(&self, tape: &mut Tape, others: Option<Id>, codes: Option<Id>) -> Id {
        match (others, codes) {
            (Some(others), Some(codes)) => tape.cat(&[others, codes]),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => tape.leaf(0, self.layers.stream),
        }
    }
}
