//! What the ops of a tape read, write and multiply.

use super::{
    Id, Node, Tape,
    gradients::Gradient,
    kind::{Kind, Work},
};

impl Tape {
    /// The launches of the forward pass.
    pub fn forward_work(&self) -> Vec<Work> {
        let work = |node: &Node| match &node.composed {
            Some(composed) => composed.forward.clone(),
            // Each of the parts is copied by itself.
            None if node.kind == Kind::Copy && node.args.len() > 1 => {
                let copy = |(arg, _): &(Id, Gradient)| Work { kind: Kind::Copy, flops: 0, bytes: 2 * self.bytes(*arg) };
                node.args.iter().map(copy).collect()
            }
            None => {
                let read: u64 = node.args.iter().map(|(arg, _)| self.memory(*arg)).sum();
                vec![Work { kind: node.kind, flops: node.flops, bytes: read + node.elements * node.width }]
            }
        };
        self.nodes.iter().filter(|node| node.kind != Kind::View).flat_map(work).collect()
    }

    /// The launches of the backward pass.
    pub fn backward_work(&self) -> Vec<Work> {
        let (mut all, mut begun) = (Vec::new(), vec![false; self.nodes.len()]);
        for node in self.nodes.iter().rev() {
            let own = node.elements * node.width;
            all.extend(node.composed.iter().flat_map(|composed| composed.backward.iter().copied()));
            for (i, &(arg, gradient)) in node.args.iter().enumerate() {
                let bytes = self.bytes(arg);
                let others: u64 =
                    node.args.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, (arg, _))| self.memory(*arg)).sum();
                match gradient {
                    Gradient::Passed => {}
                    // The zeros, the zeros as a part of the result, and the gradient.
                    Gradient::Filled => {
                        let zeros = bytes.saturating_sub(own);
                        all.extend([zeros, 2 * zeros, 2 * own].map(|bytes| Work { kind: Kind::Copy, flops: 0, bytes }));
                    }
                    Gradient::Computed if node.composed.is_some() => {}
                    Gradient::Computed => {
                        let kind = if node.kind == Kind::View { Kind::Sum } else { node.kind };
                        all.push(Work { kind, flops: 0, bytes: own + bytes });
                    }
                    Gradient::Tracked(ops) => {
                        let one = Work { kind: node.kind, flops: node.flops, bytes: own + others + bytes };
                        all.extend((0..ops).map(|_| one));
                    }
                }
                if !std::mem::replace(&mut begun[arg.0], true) {
                    all.push(Work { kind: Kind::GradientSum, flops: 0, bytes });
                }
                all.push(Work { kind: Kind::GradientSum, flops: 0, bytes: 3 * bytes });
            }
        }
        all
    }

    /// Bytes of the memory that is read through a result: of what is broadcast, its own.
    fn memory(&self, id: Id) -> u64 {
        let node = &self.nodes[id.0];
        match (node.kind, node.args.first()) {
            (Kind::View, Some((arg, _))) => self.memory(*arg).min(self.bytes(id)),
            _ => self.bytes(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_computed_three_times() {
        let mut tape = Tape::default();
        let (a, b) = (tape.leaf(6, 2), tape.leaf(12, 2));
        // (2, 3) · (3, 4)
        tape.matmul(a, b, 8, 3);
        assert_eq!(tape.forward_work(), [Work { kind: Kind::Product, flops: 48, bytes: 12 + 24 + 16 }]);
        let backward = tape.backward_work();
        let products: Vec<_> = backward.iter().filter(|work| work.kind == Kind::Product).collect();
        assert_eq!(products.iter().map(|work| work.flops).sum::<u64>(), 96);
        assert_eq!(products.iter().map(|work| work.bytes).collect::<Vec<_>>(), [16 + 24 + 12, 16 + 12 + 24]);
        // Zeros and sums of both gradients.
        assert_eq!(backward.len(), 2 + 4);
    }
}
