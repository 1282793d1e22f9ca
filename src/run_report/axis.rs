//! An axis of a plot: what it spans, linear or logarithmic, and its ticks.

/// Values beyond this are drawn at it: differences of larger ones overflow.
const LARGEST: f64 = 1e300;
/// Ratio of the largest to the smallest value from which an axis is logarithmic.
const LOGARITHMIC_FROM: f64 = 50.0;
/// Maximum number of ticks, about twice what is wanted.
const MOST_TICKS: usize = 12;

/// How values become positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// Logarithmic where all values are positive and differ by a factor of 50 or more.
    Auto,
}

/// An axis from 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    low: f64,
    high: f64,
    pub is_logarithmic: bool,
    /// Positions with their labels.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// The axis of whole numbers.
    pub fn of_steps(low: f64, high: f64) -> Self {
        let high = high.max(low + 1.0);
        Self::new(low, high, false, 1.0)
    }

    /// The axis of values from `low` to `high`, with some space around them.
    pub fn of_values(low: f64, high: f64, scale: Scale) -> Self {
        let (low, high) = (low.clamp(-LARGEST, LARGEST), high.clamp(-LARGEST, LARGEST));
        if scale == Scale::Auto && low > 0.0 && high / low >= LOGARITHMIC_FROM {
            let (low, high) = (low.log10(), high.log10());
            let space = 0.04 * (high - low);
            return Self::new(low - space, high + space, true, 0.0);
        }
        let size = low.abs().max(high.abs());
        let space = match high - low > 1e-9 * size {
            true => 0.05 * (high - low),
            // A constant.
            false if size > 0.0 => 0.1 * size,
            false => 1.0,
        };
        // Space below zero would show values that cannot be.
        let bottom = if low >= 0.0 { (low - space).max(0.0) } else { low - space };
        Self::new(bottom, high + space, false, 0.0)
    }

    fn new(low: f64, high: f64, is_logarithmic: bool, least_step: f64) -> Self {
        let mut axis = Self { low, high, is_logarithmic, ticks: Vec::new() };
        let ticks = match is_logarithmic {
            true => logarithmic_ticks(low, high),
            false => linear_ticks(low, high, least_step),
        };
        axis.ticks = ticks.into_iter().map(|(value, label)| (axis.fraction(value), label)).collect();
        axis
    }

    fn fraction(&self, value: f64) -> f64 {
        let span = self.high - self.low;
        if span > 0.0 { ((value - self.low) / span).clamp(0.0, 1.0) } else { 0.0 }
    }

    /// The position of a value: 0 at the low end, 1 at the high end.
    pub fn position(&self, value: f64) -> f64 {
        let value = value.clamp(-LARGEST, LARGEST);
        self.fraction(if self.is_logarithmic { value.max(f64::MIN_POSITIVE).log10() } else { value })
    }
}

/// Multiples of 1, 2 or 5 times a power of ten.
fn linear_ticks(low: f64, high: f64, least_step: f64) -> Vec<(f64, String)> {
    let wanted = (high - low) / 5.0;
    let power = 10_f64.powf(wanted.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= wanted);
    let step = step.unwrap_or(wanted).max(least_step);
    let first = (low / step).ceil();
    let multiples = (0..MOST_TICKS).map(|i| (first + i as f64) * step).take_while(|value| *value <= high + 1e-9 * step);
    multiples.map(|value| (value, label(value, step))).collect()
}

/// Powers of ten; where they are few, also 2 and 5 times them. Positions are logarithms.
fn logarithmic_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let every = ((high - low) / 6.0).ceil().max(1.0);
    let factors: &[f64] = if high - low < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let first = (low / every).floor() * every;
    let powers = (0..2 * MOST_TICKS).map(|i| first + i as f64 * every);
    let ticks = powers.flat_map(|power| factors.iter().map(move |factor| (power, *factor)));
    let at = ticks.map(|(power, factor)| (power + factor.log10(), factor * 10_f64.powf(power)));
    let inside = at.filter(|(at, _)| (low..=high).contains(at));
    inside.take(2 * MOST_TICKS).map(|(at, value)| (at, label(value, value))).collect()
}

/// A label of a tick that is `step` away from the next one.
fn label(value: f64, step: f64) -> String {
    // Multiples of 0.1 are not exact.
    if value.abs() < 1e-9 * step {
        return "0".to_owned();
    }
    let size = value.abs();
    if step < 1e-3 || size >= 1e7 {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'));
    }
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.digits$}");
    match text.strip_suffix("000").filter(|_| digits == 0 && size >= 10_000.0) {
        Some(thousands) => format!("{thousands}k"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(labels(&Axis::of_steps(1.0, 30.0)), ["10", "20", "30"]);
        assert_eq!(labels(&Axis::of_steps(1.0, 3.0)), ["1", "2", "3"]);
        assert_eq!(labels(&Axis::of_steps(0.0, 100_000.0)), ["0", "20k", "40k", "60k", "80k", "100k"]);
        assert_eq!(labels(&Axis::of_values(0.0, 4.5e-4, Scale::Linear)), ["0", "1e-4", "2e-4", "3e-4", "4e-4"]);
        assert_eq!(labels(&Axis::of_values(3.46, 7.62, Scale::Auto)), ["4", "5", "6", "7"]);
        assert_eq!(labels(&Axis::of_values(0.5, 60.0, Scale::Auto)), ["0.5", "1", "2", "5", "10", "20", "50"]);
        assert_eq!(labels(&Axis::of_values(1e-8, 1e4, Scale::Auto)), ["1e-6", "0.001", "1", "1000"]);
    }

    #[test]
    fn positions_are_from_0_to_1_and_rise() {
        let axis = Axis::of_values(0.01, 100.0, Scale::Auto);
        assert!(axis.is_logarithmic && (axis.position(1.0) - 0.5).abs() < 1e-9);
        let axis = Axis::of_values(-1.0, 3.0, Scale::Auto);
        assert!(!axis.is_logarithmic && (axis.position(1.0) - 0.5).abs() < 1e-9);
        assert!(!Axis::of_values(0.01, 100.0, Scale::Linear).is_logarithmic);
    }

    #[test]
    fn extreme_values_have_an_axis_with_bounded_ticks() {
        let extremes = [0.0, 1.0, -1.0, 1e-320, 1e-300, 1e300, -1e300, f64::MAX, f64::MIN, 1e16, 1e16 + 2.0, 5e-324];
        for low in extremes {
            for high in extremes.into_iter().filter(|high| *high >= low) {
                for axis in [Axis::of_values(low, high, Scale::Auto), Axis::of_values(low, high, Scale::Linear)] {
                    assert!(axis.ticks.len() <= 2 * MOST_TICKS, "{low} {high}: {axis:?}");
                    for value in [low, high] {
                        assert!((0.0..=1.0).contains(&axis.position(value)), "{low} {high}: {axis:?}");
                    }
                    assert!(axis.ticks.iter().all(|(at, _)| (0.0..=1.0).contains(at)), "{low} {high}: {axis:?}");
                }
            }
        }
        let steps = Axis::of_steps(0.0, u64::MAX as f64);
        assert!(steps.ticks.len() <= MOST_TICKS && steps.position(u64::MAX as f64) == 1.0);
        assert_eq!(Axis::of_steps(u64::MAX as f64, u64::MAX as f64).position(u64::MAX as f64), 0.0);
    }
}
