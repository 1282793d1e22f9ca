//! What candle's autograd keeps and allocates, without numbers: the ops of a forward pass as sizes.
//!
//! A [`Tape`] is built by functions that follow the stock ops of devices one by one: [`Layers`] and
//! [`blockwise_tape`](super::attention::blockwise_tape). It knows which results a forward pass keeps for the backward pass,
//! which is every result that an op made (candle frees none before the end), and how much the backward pass allocates beside
//! them. `tests/it/tape.rs` compares both with the bytes that a pass allocates.

mod gradients;
mod kind;
mod layers;
mod work;

use gradients::{Gradient, Gradients};
pub use kind::{Kind, Work};
pub use layers::Layers;

/// A result on a [`Tape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(usize);

struct Node {
    kind: Kind,
    elements: u64,
    /// Bytes of an element.
    width: u64,
    /// Whether it has memory of its own that the tape keeps; a view has none, and leaves do not count.
    stored: bool,
    /// Of a product, forward.
    flops: u64,
    args: Vec<(Id, Gradient)>,
    /// Of an op that is composed of others.
    composed: Option<Composed>,
}

/// What an op with a gradient written by hand computes.
struct Composed {
    forward: Vec<Work>,
    backward: Vec<Work>,
    /// Bytes that the backward pass holds at its peak, with the gradients of the arguments.
    backward_peak: u64,
}

/// The ops of a forward pass, or of a pass that is written by hand.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    /// Results that have been freed, by number.
    freed: Vec<bool>,
    /// Bytes of the results that have not been freed, now and at most.
    held: u64,
    peak: u64,
}

impl Tape {
    fn push(&mut self, kind: Kind, elements: u64, width: u64, stored: bool, args: Vec<(Id, Gradient)>) -> Id {
        self.nodes.push(Node { kind, elements, width, stored, flops: 0, args, composed: None });
        self.freed.push(!stored);
        if stored {
            self.held += elements * width;
            self.peak = self.peak.max(self.held);
        }
        Id(self.nodes.len() - 1)
    }

    /// Frees results, in a pass that is written by hand; those that have no memory of their own do not count.
    pub(in crate::ops) fn free(&mut self, ids: &[Id]) {
        for &Id(id) in ids {
            if !std::mem::replace(&mut self.freed[id], true) {
                self.held -= self.bytes(Id(id));
            }
        }
    }

    /// What a function computes, which frees all but its result as it returns.
    pub(in crate::ops) fn function_of(&mut self, f: impl FnOnce(&mut Self) -> Id) -> Id {
        let first = self.nodes.len();
        let result = f(self);
        let owner = self.owner(result);
        let others: Vec<Id> = (first..self.nodes.len()).map(Id).filter(|id| *id != owner).collect();
        self.free(&others);
        result
    }

    /// The result whose memory this one is.
    pub(in crate::ops) fn owner(&self, Id(id): Id) -> Id {
        match (self.nodes[id].kind, self.nodes[id].args.first()) {
            (Kind::View, Some((arg, _))) => self.owner(*arg),
            _ => Id(id),
        }
    }

    /// Bytes that a pass written by hand holds at its peak.
    pub(in crate::ops) fn peak(&self) -> u64 {
        self.peak
    }

    /// A parameter, an input or a constant. Its memory does not count. Its gradient does, even that of a constant, which candle
    /// computes all the same.
    pub fn leaf(&mut self, elements: u64, width: u64) -> Id {
        self.push(Kind::View, elements, width, false, Vec::new())
    }

    fn bytes(&self, Id(id): Id) -> u64 {
        self.nodes[id].elements * self.nodes[id].width
    }

    pub(in crate::ops) fn elements(&self, Id(id): Id) -> u64 {
        self.nodes[id].elements
    }

    fn width(&self, Id(id): Id) -> u64 {
        self.nodes[id].width
    }

    /// A result of the size of `like`.
    fn alike(&mut self, kind: Kind, like: Id, args: Vec<(Id, Gradient)>) -> Id {
        self.push(kind, self.elements(like), self.width(like), kind != Kind::View, args)
    }

    /// The same as a contiguous tensor.
    pub(in crate::ops) fn copy(&mut self, x: Id) -> Id {
        self.alike(Kind::Copy, x, vec![(x, Gradient::Passed)])
    }

    /// A part. Its gradient is filled up with zeros on both sides.
    pub(in crate::ops) fn narrow(&mut self, x: Id, elements: u64) -> Id {
        match elements == self.elements(x) {
            true => x,
            false => self.push(Kind::View, elements, self.width(x), false, vec![(x, Gradient::Filled)]),
        }
    }

    /// The same elements repeated.
    pub(in crate::ops) fn broadcast(&mut self, x: Id, elements: u64) -> Id {
        self.push(Kind::View, elements, self.width(x), false, vec![(x, Gradient::Computed)])
    }

    /// The multiple of x, plus a number.
    pub(in crate::ops) fn affine(&mut self, x: Id) -> Id {
        self.alike(Kind::ElementWise, x, vec![(x, Gradient::Computed)])
    }

    /// A function of each element, whose gradient is `results` ops after another, the first of which reads x or the result.
    pub(in crate::ops) fn function(&mut self, x: Id, results: usize) -> Id {
        self.alike(Kind::ElementWise, x, vec![(x, Gradient::Tracked(results))])
    }

    /// In another type.
    pub(in crate::ops) fn cast(&mut self, x: Id, width: u64) -> Id {
        match width == self.width(x) {
            true => x,
            false => self.push(Kind::Cast, self.elements(x), width, true, vec![(x, Gradient::Computed)]),
        }
    }

    /// Sum or difference.
    pub fn add(&mut self, a: Id, b: Id) -> Id {
        self.alike(Kind::ElementWise, a, vec![(a, Gradient::Passed), (b, Gradient::Passed)])
    }

    /// Sum or difference of `a` and a constant that is broadcast to its shape.
    pub(in crate::ops) fn add_constant(&mut self, a: Id) -> Id {
        let constant = self.leaf(self.elements(a), self.width(a));
        self.add(a, constant)
    }

    pub(in crate::ops) fn mul(&mut self, a: Id, b: Id) -> Id {
        self.alike(Kind::ElementWise, a, vec![(a, Gradient::Tracked(1)), (b, Gradient::Tracked(1))])
    }

    pub(in crate::ops) fn div(&mut self, a: Id, b: Id) -> Id {
        self.alike(Kind::ElementWise, a, vec![(a, Gradient::Tracked(1)), (b, Gradient::Tracked(3))])
    }

    /// Sums of groups of elements, or one element of each.
    pub(in crate::ops) fn sums(&mut self, x: Id, groups: u64) -> Id {
        self.push(Kind::Sum, groups, self.width(x), true, vec![(x, Gradient::Passed)])
    }

    /// A product with sums of `depth` terms.
    pub(in crate::ops) fn matmul(&mut self, a: Id, b: Id, elements: u64, depth: u64) -> Id {
        let args = vec![(a, Gradient::Tracked(1)), (b, Gradient::Tracked(1))];
        let product = self.push(Kind::Product, elements, self.width(a), true, args);
        self.nodes[product.0].flops = 2 * elements * depth;
        product
    }

    /// Parts after one another.
    pub(in crate::ops) fn cat(&mut self, parts: &[Id]) -> Id {
        let elements = parts.iter().map(|part| self.elements(*part)).sum();
        let width = parts.first().map_or(0, |part| self.width(*part));
        self.push(Kind::Copy, elements, width, true, parts.iter().map(|part| (*part, Gradient::Passed)).collect())
    }

    /// x with zeros before and behind it, which autograd keeps, too.
    pub(in crate::ops) fn pad(&mut self, x: Id, zeros: [u64; 2]) -> Id {
        let width = self.width(x);
        let [before, behind] =
            zeros.map(|zeros| (zeros > 0).then(|| self.push(Kind::Copy, zeros, width, true, Vec::new())));
        match before.is_none() && behind.is_none() {
            true => x,
            false => self.cat(&before.into_iter().chain([x]).chain(behind).collect::<Vec<_>>()),
        }
    }

    /// A kernel of ours that computes the gradients of all arguments together.
    pub(in crate::ops) fn kernel(&mut self, elements: u64, width: u64, args: &[Id]) -> Id {
        self.push(Kind::Kernel, elements, width, true, args.iter().map(|arg| (*arg, Gradient::Computed)).collect())
    }

    /// An op of the arguments whose gradient is written by hand: the ops of its passes, of which the forward pass ends with the
    /// result, and the bytes that the backward pass holds at its peak.
    pub(in crate::ops) fn composed(&mut self, args: &[Id], forward: &Self, backward: &Self, backward_peak: u64) -> Id {
        let (elements, width) = forward.nodes.last().map_or((0, 0), |node| (node.elements, node.width));
        let id = self.kernel(elements, width, args);
        let [forward, backward] = [forward, backward].map(Self::forward_work);
        self.nodes[id.0].composed = Some(Composed { forward, backward, backward_peak });
        id
    }

    /// Bytes that the forward pass keeps, beside leaves.
    pub fn kept(&self) -> u64 {
        self.nodes.iter().filter(|node| node.stored).map(|node| node.elements * node.width).sum()
    }

    /// Bytes that the backward pass from the last result allocates at its peak, beside what the forward pass has kept and
    /// the gradient of that result.
    pub fn backward_peak(&self) -> u64 {
        let mut gradients = Gradients::new(self.nodes.len());
        let Some(last) = self.nodes.len().checked_sub(1) else { return 0 };
        gradients.add(last, self.bytes(Id(last)), None, Gradient::Passed);
        let mut order = Vec::with_capacity(self.nodes.len());
        self.visit(last, &mut vec![false; self.nodes.len()], &mut order);
        for i in order.into_iter().rev().filter(|i| !self.nodes[*i].args.is_empty()) {
            let Some(gradient) = gradients.take(i) else { continue };
            if let Some(composed) = &self.nodes[i].composed {
                gradients.pass(composed.backward_peak);
            }
            for &(arg, kind) in &self.nodes[i].args {
                gradients.add(arg.0, self.bytes(arg), Some(gradient), kind);
            }
            gradients.end(gradient);
        }
        gradients.peak()
    }

    /// Appends a result and all that it depends on, in candle's order: the arguments of an op before its result.
    fn visit(&self, node: usize, seen: &mut [bool], order: &mut Vec<usize>) {
        if !std::mem::replace(&mut seen[node], true) {
            self.nodes[node].args.iter().for_each(|(Id(arg), _)| self.visit(*arg, seen, order));
            order.push(node);
        }
    }
}
