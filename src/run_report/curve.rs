//! A curve over steps in bounded memory: the values of neighbouring steps share a bucket, which keeps their mean and their
//! extremes, so that a spike of one step among millions stays visible.

/// Maximum number of buckets.
const BUCKETS: usize = 200;

/// The values of some neighbouring steps.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bucket {
    /// The steps divided by the width of a bucket.
    number: u64,
    count: f64,
    /// Sums of the steps and of the values.
    steps: f64,
    values: f64,
    low: f64,
    high: f64,
}

/// What a bucket shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The mean of the steps.
    pub step: f64,
    pub mean: f64,
    /// The smallest and the largest value.
    pub low: f64,
    pub high: f64,
}

/// A curve that is read from its last step to its first one.
#[derive(Debug, Default)]
pub struct Curve {
    /// Steps of a bucket: 2 to the power of this.
    width: u32,
    /// By descending step.
    buckets: Vec<Bucket>,
    /// The step that was added last, which is the lowest.
    lowest: Option<u64>,
    /// Last step with a number, and its value.
    pub last: Option<(u64, f64)>,
}

impl Curve {
    /// Adds the value of `step`; `None` is a value that is not finite. The steps descend: where one does not, the run went
    /// back to an earlier step there, a later line has counted already, and false is returned.
    pub fn add(&mut self, step: u64, value: Option<f64>) -> bool {
        if self.lowest.is_some_and(|lowest| step >= lowest) {
            return false;
        }
        self.lowest = Some(step);
        let Some(value) = value else { return true };
        self.last = self.last.or(Some((step, value)));
        let number = step >> self.width;
        let bucket = Bucket { number, count: 1.0, steps: step as f64, values: value, low: value, high: value };
        push(&mut self.buckets, bucket);
        while self.buckets.len() > BUCKETS {
            self.widen();
        }
        true
    }

    fn widen(&mut self) {
        self.width += 1;
        let mut merged = Vec::with_capacity(BUCKETS);
        for bucket in self.buckets.drain(..) {
            push(&mut merged, Bucket { number: bucket.number >> 1, ..bucket });
        }
        self.buckets = merged;
    }

    /// By ascending step.
    pub fn points(&self) -> Vec<Point> {
        let point = |bucket: &Bucket| Point {
            step: bucket.steps / bucket.count,
            // The mean of one value may differ from it in the last bit, and from equal extremes.
            mean: (bucket.values / bucket.count).clamp(bucket.low, bucket.high),
            low: bucket.low,
            high: bucket.high,
        };
        self.buckets.iter().rev().map(point).collect()
    }

    /// The largest number of steps that a point stands for.
    pub fn thinning(&self) -> u64 {
        1 << self.width
    }
}

/// Adds a bucket to those of higher steps, or to the last of them if it is of the same steps.
fn push(buckets: &mut Vec<Bucket>, bucket: Bucket) {
    match buckets.last_mut() {
        Some(last) if last.number == bucket.number => {
            last.count += bucket.count;
            last.steps += bucket.steps;
            last.values += bucket.values;
            last.low = last.low.min(bucket.low);
            last.high = last.high.max(bucket.high);
        }
        _ => buckets.push(bucket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_curves_keep_every_value() {
        let mut curve = Curve::default();
        for step in (1..=BUCKETS as u64).rev() {
            assert!(curve.add(step, Some(1.0 / step as f64)));
        }
        let points = curve.points();
        assert_eq!((points.len(), curve.thinning(), curve.last), (BUCKETS, 1, Some((200, 1.0 / 200.0))));
        for (point, step) in points.iter().zip(1..) {
            let value = 1.0 / f64::from(step);
            assert_eq!(*point, Point { step: f64::from(step), mean: value, low: value, high: value });
        }
    }

    #[test]
    fn long_curves_are_thinned_and_keep_their_spikes_and_mean() {
        let (mut curve, steps) = (Curve::default(), 3_000_000_u64);
        for step in (1..=steps).rev() {
            let value = match step {
                1_234_567 => 1e6,
                2_345_678 => -1e6,
                _ => (step % 2) as f64,
            };
            curve.add(step, Some(value));
        }
        let points = curve.points();
        assert!(points.len() <= BUCKETS && points.len() > BUCKETS / 3, "{}", points.len());
        // All but the first and the last bucket are full.
        let full = &points[1..points.len() - 1];
        assert!(full.windows(2).all(|pair| pair[1].step - pair[0].step == curve.thinning() as f64));
        let at = |spike: f64| points.iter().min_by_key(|point| (point.step - spike).abs() as u64).unwrap();
        assert_eq!((at(1_234_567.0).high, at(2_345_678.0).low), (1e6, -1e6));
        assert_eq!(points.iter().filter(|point| point.high > 1.0 || point.low < 0.0).count(), 2);
        assert!((points[10].mean - 0.5).abs() < 1e-3, "{:?}", points[10]);
    }

    #[test]
    fn sparse_and_huge_steps_are_thinned_too() {
        let mut curve = Curve::default();
        for i in 0..1000_u64 {
            curve.add(u64::MAX - i * (u64::MAX / 1000), Some(i as f64));
        }
        assert!(curve.points().len() <= BUCKETS);
    }

    #[test]
    fn the_later_line_counts_where_a_run_went_back() {
        let mut curve = Curve::default();
        // In the file: 1 2 3 4 | 3 4 5, read from its end.
        let later = [(5, 50.0), (4, 40.0), (3, 30.0)].map(|(step, value)| curve.add(step, Some(value)));
        let earlier = [(4, -1.0), (3, -1.0), (2, 2.0), (1, 1.0)].map(|(step, value)| curve.add(step, Some(value)));
        assert_eq!((later, earlier), ([true; 3], [false, false, true, true]));
        assert_eq!(curve.points().iter().map(|point| point.mean).collect::<Vec<_>>(), [1.0, 2.0, 30.0, 40.0, 50.0]);
        // A later line counts although its value is not finite.
        let mut curve = Curve::default();
        assert!(curve.add(2, None) && !curve.add(2, Some(1.0)) && curve.add(1, Some(3.0)));
        assert_eq!((curve.points().len(), curve.last), (1, Some((1, 3.0))));
    }
}
