//! A page with the plots of a filtering run: rows that remain after each rule, and lengths of captions.

use super::report::{LONGEST, Report};
use crate::error::{Result, anyhow};
use plotters::prelude::*;

/// How the page begins.
pub const PAGE_START: &str = "<!doctype html><meta charset=\"utf-8\"><title>vilg data filter</title>";

/// One self-contained HTML page.
///
/// # Errors
/// A plot cannot be drawn.
pub fn page(report: &Report) -> Result<String> {
    // plotters' errors borrow the backend.
    let draw = |plot: fn(&Report, &mut String) -> Drawn| {
        let mut svg = String::new();
        plot(report, &mut svg).map_err(|e| anyhow!("cannot draw: {e}")).map(|()| svg)
    };
    let rows: String = report
        .rules
        .iter()
        .map(|count| {
            let share = 100.0 * count.left_out as f64 / report.rows.max(1) as f64;
            format!("<tr><td>{}<td>{}<td>{share:.2} %<td>{}\n", count.rule, count.left_out, count.remaining)
        })
        .collect();
    Ok(format!(
        "{PAGE_START}\n\
         <style>body{{font:16px sans-serif;margin:2em auto;max-width:720px}}td,th{{padding:.2em 1em;text-align:right}}\
         td:first-child{{text-align:left}}</style>\n<h1>{} of {} rows kept</h1>\n\
         <p>A row counts under the first rule that it breaks.\n\
         <table><tr><th>rule<th>left out<th>share<th>remaining\n{rows}</table>\n{}\n{}\n",
        report.kept,
        report.rows,
        draw(draw_rules)?,
        draw(draw_lengths)?
    ))
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// Bars of the rows that remain after each rule.
fn draw_rules(report: &Report, svg: &mut String) -> Drawn {
    let root = SVGBackend::with_string(svg, (720, 340)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = report.rows.max(1) as f64;
    let bars = report.rules.len();
    let mut chart = ChartBuilder::on(&root)
        .caption("rows that remain after each rule", ("sans-serif", 18))
        .margin(12)
        .y_label_area_size(160)
        .x_label_area_size(40)
        .build_cartesian_2d(0.0..most * 1.05, (0..bars - 1).into_segmented())?;
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(bar) => bars.checked_sub(bar + 1).and_then(|at| report.rules.get(at)),
        _ => None,
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("rows")
        .y_labels(bars)
        .y_label_formatter(&|at| name(at).map(|count| count.rule.to_string()).unwrap_or_default())
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(report.rules.iter().rev().enumerate().map(|(bar, count)| {
        let corners = [(0.0, SegmentValue::Exact(bar)), (count.remaining as f64, SegmentValue::Exact(bar + 1))];
        let mut rectangle = Rectangle::new(corners, RGBColor(70, 110, 170).filled());
        rectangle.set_margin(3, 3, 0, 0);
        rectangle
    }))?;
    root.present()?;
    Ok(())
}

/// Histograms of the lengths of captions, of all rows and of those that are kept.
fn draw_lengths(report: &Report, svg: &mut String) -> Drawn {
    let root = SVGBackend::with_string(svg, (720, 320)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = report.lengths.iter().copied().max().unwrap_or(0).max(1) as f64;
    let mut chart = ChartBuilder::on(&root)
        .caption("length of captions: all rows (grey) and kept rows (blue)", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..(LONGEST + 1) as f64, 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .x_desc(format!("length (the last bar: {LONGEST} and more)"))
        .y_desc("rows")
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (counts, color) in [(&report.lengths, RGBColor(200, 200, 200)), (&report.kept_lengths, RGBColor(70, 110, 170))]
    {
        chart.draw_series(counts.iter().enumerate().map(|(at, count)| {
            Rectangle::new([(at as f64 + 0.1, 0.0), (at as f64 + 0.9, *count as f64)], color.filled())
        }))?;
    }
    root.present()?;
    Ok(())
}
