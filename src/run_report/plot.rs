//! Curves of several runs in one plot, as SVG inside of a page. Colors are classes of the page's style sheet, so that the
//! plot is readable in light and dark mode and in print; the style sheet also gives each run its dash pattern.

use super::{
    axis::{Axis, Scale},
    curve::Point,
    html::escape,
};
use crate::error::{Result, anyhow};
use plotters::{
    coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged},
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::ops::Range;

/// Pixels, about twice what is shown: plotters draws at whole pixels.
const SIZE: (u32, u32) = (920, 520);
/// Size of the texts in pixels.
const FONT: u32 = 32;
/// Width that the mark of a run takes beside the curves, as a share of the plot.
const MARK: f64 = 0.035;

/// What plotters draws for each run, replaced by the classes `run-0`, `run-1`, ….
pub const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 240),
    RGBColor(110, 110, 110),
];
const GRID: RGBColor = RGBColor(221, 221, 221);

/// A curve of a plot.
pub struct Line {
    /// The number of its run, below the number of [`COLORS`].
    pub run: usize,
    /// What stands at its end: `A`.
    pub mark: String,
    pub points: Vec<Point>,
}

/// The SVG element of a plot over steps, and whether its values are on a logarithmic axis; none without values.
///
/// # Errors
/// plotters fails.
pub fn svg(lines: &[Line], title: &str, scale: Scale) -> Result<Option<(String, bool)>> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let bounds = |low: fn(&Point) -> f64, high: fn(&Point) -> f64| {
        let low = points().map(low).reduce(f64::min)?;
        Some((low, points().map(high).reduce(f64::max)?))
    };
    let (Some(steps), Some(values)) = (bounds(|p| p.step, |p| p.step), bounds(|p| p.low, |p| p.high)) else {
        return Ok(None);
    };
    let axes = [Axis::of_steps(steps.0, steps.1), Axis::of_values(values.0, values.1, scale)];
    let mut drawn = String::new();
    // plotters' errors borrow the backend.
    draw(lines, &axes, &mut drawn).map_err(|e| anyhow!("cannot draw {title}: {e}"))?;
    Ok(Some((styled(&drawn, title), axes[1].is_logarithmic)))
}

/// With classes instead of colors, and without the name space, which SVG inside of HTML does not need.
fn styled(svg: &str, title: &str) -> String {
    let text = |svg: String, color: RGBColor, class: &str| {
        let RGBColor(red, green, blue) = color;
        let hex = format!("#{red:02X}{green:02X}{blue:02X}");
        svg.replace(&format!("stroke=\"{hex}\""), &format!("class=\"stroke {class}\""))
            .replace(&format!("fill=\"{hex}\""), &format!("class=\"fill {class}\""))
    };
    let mut styled = svg.replace(" xmlns=\"http://www.w3.org/2000/svg\"", "").replace(" opacity=\"1\"", "");
    for (run, color) in COLORS.into_iter().enumerate() {
        styled = text(styled, color, &format!("run-{run}"));
    }
    let styled = text(text(styled, GRID, "grid"), BLACK, "ink");
    let (width, height) = SIZE;
    let size = format!("<svg width=\"{width}\" height=\"{height}\"");
    styled.replacen(&size, &format!("<svg role=\"img\" aria-label=\"{}\"", escape(title)), 1)
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Positions, Positions>>;

/// Positions from 0 to `end`, with ticks of ours: plotters' own search for ticks does not end for some extreme values.
struct Positions {
    end: f64,
    ticks: Vec<f64>,
}

impl Ranged for Positions {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        start + (value / self.end * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        0.0..self.end
    }
}

fn draw(lines: &[Line], axes: &[Axis; 2], svg: &mut String) -> Drawn {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let marks = if lines.len() > 1 { COLORS.len().min(lines.len()) } else { 0 };
    let positions = |axis: &Axis, end| Positions { end, ticks: axis.ticks.iter().map(|(at, _)| *at).collect() };
    let label = |axis: &Axis, at: f64| {
        axis.ticks.iter().find(|(tick, _)| *tick == at).map_or(String::new(), |(_, label)| label.clone())
    };
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .margin_right(30)
        .x_label_area_size(72)
        .y_label_area_size(100)
        .build_cartesian_2d(positions(&axes[0], 1.0 + MARK * marks as f64), positions(&axes[1], 1.0))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|at| label(&axes[0], *at))
        .y_label_formatter(&|at| label(&axes[1], *at))
        .label_style(("sans-serif", FONT))
        .axis_desc_style(("sans-serif", FONT))
        .bold_line_style(GRID.stroke_width(2))
        .light_line_style(TRANSPARENT)
        .axis_style(BLACK.stroke_width(2))
        .draw()?;
    for line in lines {
        draw_line(&mut chart, line, axes, lines.len() > 1)?;
    }
    root.present()?;
    Ok(())
}

fn draw_line(chart: &mut Chart<'_, '_>, line: &Line, [x, y]: &[Axis; 2], marked: bool) -> Drawn {
    let color = COLORS[line.run % COLORS.len()];
    let at = |point: &Point, value: f64| (x.position(point.step), y.position(value));
    if line.points.iter().any(|point| point.low < point.high) {
        let edge = line.points.iter().map(|point| at(point, point.high));
        let band: Vec<_> = edge.chain(line.points.iter().rev().map(|point| at(point, point.low))).collect();
        chart.draw_series([Polygon::new(band, color.mix(0.2))])?;
    }
    let means: Vec<_> = line.points.iter().map(|point| at(point, point.mean)).collect();
    let Some(&(_, end)) = means.last() else { return Ok(()) };
    if let &[one] = means.as_slice() {
        chart.draw_series([Circle::new(one, 6, color.filled())])?;
    }
    chart.draw_series(LineSeries::new(means, color.stroke_width(3)))?;
    if marked {
        let style = ("sans-serif", FONT, FontStyle::Bold).into_font().color(&color);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        let beside = 1.0 + MARK * (line.run as f64 + 0.2);
        chart.draw_series([Text::new(line.mark.clone(), (beside, end), style)])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(run: usize, values: &[f64]) -> Line {
        let point = |(step, value): (usize, &f64)| Point { step: step as f64, mean: *value, low: *value, high: *value };
        Line { run, mark: ["A", "B"][run].to_owned(), points: values.iter().enumerate().map(point).collect() }
    }

    #[test]
    fn runs_are_told_apart_by_class_and_mark() {
        let lines = [line(0, &[3.0, 2.0, 1.0]), line(1, &[4.0, 2.5, 2.0])];
        let (svg, is_logarithmic) = svg(&lines, "the <loss>", Scale::Auto).unwrap().unwrap();
        assert!(
            !is_logarithmic && svg.starts_with("<svg role=\"img\" aria-label=\"the &lt;loss&gt;\" viewBox"),
            "{svg}"
        );
        for class in ["stroke run-0", "stroke run-1", "fill run-0", "fill run-1", "stroke grid", "fill ink"] {
            assert!(svg.contains(&format!("class=\"{class}\"")), "{class}: {svg}");
        }
        assert!(svg.contains("\nA\n") && svg.contains("\nB\n") && svg.contains("\nstep\n"), "{svg}");
        assert!(!svg.contains("http") && !svg.contains("=\"#"), "{svg}");
    }

    #[test]
    fn a_spike_inside_a_bucket_is_drawn_and_one_value_is_a_dot() {
        let mut spiked = line(0, &[3.0, 2.0, 1.0]);
        assert!(!svg(std::slice::from_ref(&spiked), "l1", Scale::Auto).unwrap().unwrap().0.contains("<polygon"));
        spiked.points[1].high = 40.0;
        assert!(svg(&[spiked], "l1", Scale::Auto).unwrap().unwrap().0.contains("<polygon"));
        let (dot, _) = svg(&[line(0, &[3.0])], "l1", Scale::Auto).unwrap().unwrap();
        assert!(dot.contains("<circle") && !dot.contains("\nA\n"), "{dot}");
        assert!(svg(&[line(0, &[])], "l1", Scale::Auto).unwrap().is_none());
    }

    #[test]
    fn extreme_values_are_drawn() {
        for values in [[f64::MAX, f64::MIN, 0.0], [1e-320, 1.0, f64::MAX], [7.0, 7.0, 7.0], [0.0, 0.0, 0.0]] {
            assert!(svg(&[line(0, &values)], "l1", Scale::Auto).unwrap().is_some(), "{values:?}");
        }
    }
}
