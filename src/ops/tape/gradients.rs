//! The memory of candle's backward pass (candle-core 0.11.1, backprop.rs).
//!
//! The gradient of an argument is added to a sum that starts with zeros. Where it is computed with a result of the forward
//! pass (a product), candle tracks the computation: the sum then holds all that it was computed from, among it the gradient
//! of the op's result, until its own turn is over. The gradient of a weight holds them until the end.

/// How the gradient of an argument comes from that of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradient {
    /// It is the same memory.
    Passed,
    /// With zeros on both sides.
    Filled,
    /// A new tensor that holds nothing.
    Computed,
    /// Computed by this many ops with a result of the forward pass.
    Tracked(usize),
}

/// A tensor of the backward pass.
struct Held {
    bytes: u64,
    /// Whether candle tracks what it was computed from.
    tracked: bool,
    /// What it was computed from.
    from: Vec<usize>,
    owners: usize,
}

/// The gradients of the results on a tape.
pub struct Gradients {
    tensors: Vec<Held>,
    /// By result.
    sums: Vec<Option<usize>>,
    /// Of the result whose turn it is: they live until it is over.
    temporary: Vec<usize>,
    live: u64,
    peak: u64,
}

impl Gradients {
    pub fn new(results: usize) -> Self {
        Self { tensors: Vec::new(), sums: vec![None; results], temporary: Vec::new(), live: 0, peak: 0 }
    }

    pub fn peak(&self) -> u64 {
        self.peak
    }

    /// Removes the gradient of a result, whose turn begins.
    pub fn take(&mut self, result: usize) -> Option<usize> {
        self.sums[result].take()
    }

    /// The turn of a result is over. What was computed from its gradient holds that, but no longer what it came from.
    pub fn end(&mut self, gradient: usize) {
        let from = std::mem::take(&mut self.tensors[gradient].from);
        for tensor in self.temporary.drain(..).chain(from).chain([gradient]).collect::<Vec<_>>() {
            self.release(tensor);
        }
    }

    /// The op whose turn it is holds this many bytes for a while.
    pub fn pass(&mut self, bytes: u64) {
        self.peak = self.peak.max(self.live + bytes);
    }

    /// Adds to the gradient of `argument`, which has this many bytes, what comes from the gradient of the result whose turn it is
    /// (`None`: from outside).
    pub fn add(&mut self, argument: usize, bytes: u64, gradient: Option<usize>, kind: Gradient) {
        let mut addend = gradient;
        match kind {
            Gradient::Passed => {}
            Gradient::Computed => addend = Some(self.temporary(bytes, false, Vec::new())),
            Gradient::Filled => {
                let own = gradient.map_or(0, |gradient| self.tensors[gradient].bytes);
                self.temporary(bytes.saturating_sub(own), false, Vec::new());
                addend = Some(self.temporary(bytes, false, Vec::new()));
            }
            Gradient::Tracked(ops) => {
                for _ in 0..ops {
                    addend = Some(self.temporary(bytes, true, addend.into_iter().collect()));
                }
            }
        }
        let before = match self.sums[argument].take() {
            Some(sum) => sum,
            None => self.allocate(bytes, false, Vec::new()),
        };
        // The gradient of the result whose turn it is has been detached from what it was computed from.
        let tracks = |tensor: usize| self.tensors[tensor].tracked && Some(tensor) != gradient;
        let from: Vec<usize> = [Some(before), addend].into_iter().flatten().collect();
        let tracked = from.iter().any(|tensor| tracks(*tensor));
        let sum = self.allocate(bytes, tracked, if tracked { from } else { Vec::new() });
        self.release(before);
        self.sums[argument] = Some(sum);
    }

    fn temporary(&mut self, bytes: u64, tracked: bool, from: Vec<usize>) -> usize {
        let tensor = self.allocate(bytes, tracked, from);
        self.temporary.push(tensor);
        tensor
    }

    fn allocate(&mut self, bytes: u64, tracked: bool, from: Vec<usize>) -> usize {
        from.iter().for_each(|tensor| self.tensors[*tensor].owners += 1);
        self.tensors.push(Held { bytes, tracked, from, owners: 1 });
        self.live += bytes;
        self.peak = self.peak.max(self.live);
        self.tensors.len() - 1
    }

    fn release(&mut self, tensor: usize) {
        let mut released = vec![tensor];
        while let Some(tensor) = released.pop() {
            let held = &mut self.tensors[tensor];
            held.owners -= 1;
            if held.owners == 0 {
                self.live -= held.bytes;
                released.append(&mut held.from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// y = w · x, by hand: dw holds zeros, the product and dy until the end.
    #[test]
    fn a_tracked_gradient_holds_what_it_was_computed_from() {
        let mut gradients = Gradients::new(3);
        gradients.add(2, 10, None, Gradient::Passed);
        assert_eq!((gradients.live, gradients.peak), (10, 20), "zeros and the sum");
        let dy = gradients.take(2).unwrap();
        gradients.add(0, 10, Some(dy), Gradient::Tracked(1));
        assert_eq!(gradients.live, 10 + 10 + 10 + 10, "dy, the product, zeros, the sum");
        gradients.end(dy);
        assert_eq!(gradients.live, 40);
        let dw = gradients.take(0).unwrap();
        gradients.end(dw);
        assert_eq!((gradients.live, gradients.peak), (0, 40));
    }

    #[test]
    fn other_gradients_hold_nothing() {
        let mut gradients = Gradients::new(3);
        gradients.add(2, 10, None, Gradient::Passed);
        let dy = gradients.take(2).unwrap();
        gradients.add(0, 10, Some(dy), Gradient::Computed);
        gradients.add(1, 30, Some(dy), Gradient::Filled);
        gradients.end(dy);
        assert_eq!(gradients.live, 40);
        // dy, a temporary of 10 and its sum, zeros of 20 and the filled gradient, zeros and the sum.
        assert_eq!(gradients.peak, 10 + 20 + 50 + 60);
    }
}
