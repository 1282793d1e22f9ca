//! Plots the cost of attention against its size as SVG.

use super::attention::Cost;
use crate::error::{Result, anyhow};
use plotters::prelude::*;
use std::{collections::BTreeSet, path::Path};

/// Milliseconds against codes, one line per pattern, both axes logarithmic.
///
/// # Errors
/// The file cannot be written, or there is nothing to draw.
pub fn plot(costs: &[Cost], path: &Path) -> Result<()> {
    // plotters' errors borrow the backend.
    draw(costs, path).map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))
}

const COLOURS: [RGBColor; 5] = [BLACK, RED, BLUE, RGBColor(0, 128, 0), RGBColor(140, 140, 140)];

fn draw(costs: &[Cost], path: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let milliseconds = |cost: &Cost| cost.seconds.median * 1e3;
    let (least, most) = bounds(costs.iter().map(milliseconds)).ok_or("nothing was measured")?;
    let (fewest, largest) = bounds(costs.iter().map(|cost| cost.codes as f64)).ok_or("nothing was measured")?;
    let sizes: BTreeSet<usize> = costs.iter().map(|cost| cost.codes).collect();
    let ticks: Vec<f64> = sizes.into_iter().map(|codes| codes as f64).collect();
    let x = (fewest / 1.3..largest * 1.3).log_scale().with_key_points(ticks);
    let root = SVGBackend::new(path, (640, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("attention, forward and backward", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(x, (least / 2.0..most * 2.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("image codes")
        .y_desc("milliseconds")
        .x_label_formatter(&f64::to_string)
        .y_label_formatter(&f64::to_string)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let mut names: Vec<&str> = Vec::new();
    for cost in costs {
        if !names.contains(&cost.pattern) {
            names.push(cost.pattern);
        }
    }
    for (name, colour) in names.into_iter().zip(COLOURS) {
        let of_name = costs.iter().filter(|cost| cost.pattern == name);
        let points: Vec<(f64, f64)> = of_name.map(|cost| (cost.codes as f64, milliseconds(cost))).collect();
        chart.draw_series(points.iter().map(|&at| Circle::new(at, 3, colour.filled())))?;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |bounds, x| {
        let (low, high) = bounds.unwrap_or((x, x));
        Some((low.min(x), high.max(x)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Spread;

    #[test]
    fn draws_one_line_per_pattern() {
        let cost = |pattern, codes, seconds| Cost {
            pattern,
            codes,
            seconds: Spread::of(vec![seconds]),
            flops: 1.0,
            memory_bytes: None,
            speedup: 1.0,
            memory_share: None,
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        plot(&[cost("dense", 16, 0.1), cost("row", 16, 0.01), cost("dense", 64, 1.0), cost("row", 64, 0.03)], &path)
            .unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("dense") && svg.contains("row"));
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(plot(&[], &path).is_err());
    }
}
