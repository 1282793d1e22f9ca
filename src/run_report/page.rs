//! The page, section by section.

use super::{
    Contents,
    axis::Scale,
    configuration,
    curve::Curve,
    html::{Cell, PAGE_START, Row, STYLE, escape, grouped, mark, short, table},
    metrics::{
        COMMUNICATION_WAIT, DATA_WAIT, DEVICE_MEMORY, DEVICE_PEAK_MEMORY, DEVICE_RESERVED, GRADIENT_NORM,
        LEARNING_RATE, MFU, PEAK_MEMORY, PER_SECOND, SECONDS, TFLOPS,
    },
    plot::{self, Line},
    run::Run,
    tables, versions,
};
use crate::{error::Result, report};
use std::collections::BTreeSet;

/// Curves that every run has, after its losses, with the title, the scale and a factor.
const COMMON: [(&str, &str, Scale, f64); 11] = [
    (GRADIENT_NORM, "gradient norm", Scale::Auto, 1.0),
    (LEARNING_RATE, "learning rate", Scale::Linear, 1.0),
    (PER_SECOND, "throughput", Scale::Linear, 1.0),
    (TFLOPS, "TFLOP/s of a rank", Scale::Linear, 1.0),
    (MFU, "model FLOPs utilization (MFU), %", Scale::Linear, 100.0),
    (DATA_WAIT, "waiting for data, % of the step", Scale::Linear, 100.0),
    (COMMUNICATION_WAIT, "waiting for other ranks, % of the step", Scale::Linear, 100.0),
    (PEAK_MEMORY, "peak memory, GB", Scale::Linear, 1e-9),
    (DEVICE_MEMORY, "device memory in use, GB", Scale::Linear, 1e-9),
    (DEVICE_PEAK_MEMORY, "peak device memory in use, GB", Scale::Linear, 1e-9),
    (DEVICE_RESERVED, "device memory held from the driver, GB", Scale::Linear, 1e-9),
];

/// The whole page.
///
/// # Errors
/// A plot cannot be drawn.
pub fn page(contents: &Contents) -> Result<String> {
    let Contents { runs, evaluations } = contents;
    let mut sections: Vec<(&str, String)> = Vec::new();
    if !runs.is_empty() {
        sections.push(("Runs", overview(runs)));
        sections.push(("Curves", curves(runs)?));
        sections.push(("Samples", samples(runs)));
    }
    sections.push(("Evaluations", tables::html(evaluations)));
    sections.push(("Configuration", configuration::html(runs)));
    sections.push(("Versions", versions::html(runs)));
    sections.retain(|(_, body)| !body.is_empty());
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = if names.is_empty() { "evaluations".to_owned() } else { names.join(", ") };
    let mut page = format!(
        "{PAGE_START}<meta name=\"viewport\" content=\"width=device-width\"><title>vilg report: {0}</title>\n\
         <style>\n{STYLE}</style></head><body>\n<h1>{0}</h1>\n<p class=\"soft\">vilg report, {1}</p>\n<nav>",
        escape(&title),
        escape(&format!("vilg {}", report::version()))
    );
    for (name, _) in &sections {
        page += &format!("<a href=\"#{0}\">{0}</a>", name);
    }
    page += "</nav>\n";
    for (name, body) in sections {
        page += &format!("<section id=\"{name}\"><h2>{name}</h2>\n{body}</section>\n");
    }
    page += "</body></html>\n";
    Ok(page)
}

/// A piece of a run's line.
fn line_sample(run: usize) -> String {
    format!(
        "<svg viewBox=\"0 0 144 24\" aria-hidden=\"true\"><line class=\"stroke run-{}\" stroke-width=\"5\" x1=\"0\" y1=\"12\" \
         x2=\"144\" y2=\"12\"/></svg>",
        run % plot::COLORS.len()
    )
}

/// Each run with its progress, and what could not be read.
fn overview(runs: &[Run]) -> String {
    let header = ["", "run", "task", "steps", "first and last line", "time of steps", "throughput", "last values"];
    let row = |(at, run): (usize, &Run)| {
        let metrics = &run.metrics;
        let step = grouped(metrics.last_step.unwrap_or_default());
        let wanted = run.setting("train.steps").and_then(|steps| steps.parse().ok()).map(grouped);
        let last = losses(std::slice::from_ref(run)).into_iter().filter_map(|name| {
            let (_, value) = metrics.curves.get(name)?.last?;
            Some(format!("{name} {}", short(value)))
        });
        let speed = metrics.per_second().map(|speed| format!("{} {}/s", short(speed), metrics.unit));
        let text = |text: Option<String>| text.map_or(Cell::Missing, Cell::Text);
        let cells = vec![
            Cell::Text(mark(at)),
            Cell::Text(run.name.clone()),
            text(run.setting("task").map(str::to_owned)),
            Cell::Text(wanted.map_or(step.clone(), |wanted| format!("{step} of {wanted}"))),
            text(metrics.times.as_ref().map(|[first, last]| format!("{first} – {last}"))),
            Cell::Text(clock(metrics.seconds)),
            text(speed),
            Cell::Text(last.collect::<Vec<_>>().join(", ")),
        ];
        Row { cells, class: "" }
    };
    let mut html = table(&header.map(str::to_owned), &runs.iter().enumerate().map(row).collect::<Vec<_>>());
    let problems = runs.iter().flat_map(|run| run.problems.iter().map(move |problem| (run, problem)));
    let items: String =
        problems.map(|(run, problem)| format!("<li>{}: {}\n", escape(&run.name), escape(problem))).collect();
    if !items.is_empty() {
        html += &format!("<div class=\"notes\"><p>Not everything is shown:<ul>\n{items}</ul></div>\n");
    }
    html
}

/// Hours, minutes and seconds: `1:02:03`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// The names of losses and of other figures of the task, in any of the runs.
fn losses(runs: &[Run]) -> BTreeSet<&str> {
    let names = runs.iter().flat_map(|run| run.metrics.curves.keys().map(String::as_str));
    names.filter(|name| *name != SECONDS && COMMON.iter().all(|(common, ..)| common != name)).collect()
}

/// A plot for each curve, with all runs in it.
fn curves(runs: &[Run]) -> Result<String> {
    let mut html = String::new();
    if runs.len() > 1 {
        let item =
            |(at, run): (usize, &Run)| format!("<li>{} <b>{}</b> {}\n", line_sample(at), mark(at), escape(&run.name));
        let items: String = runs.iter().enumerate().map(item).collect();
        html += &format!("<ul class=\"legend\">\n{items}</ul>\n");
    }
    let thinning = runs.iter().flat_map(|run| run.metrics.curves.values()).map(Curve::thinning).max();
    if let Some(steps) = thinning.filter(|steps| *steps > 1) {
        html += &format!(
            "<p class=\"soft\">Long curves are thinned: a point is the mean of up to {} steps, and the band around it spans \
             their smallest and largest value.\n",
            grouped(steps)
        );
    }
    html += "<div class=\"plots\">\n";
    let own = losses(runs).into_iter().map(|name| (name, name, Scale::Auto, 1.0));
    for (name, title, scale, factor) in own.chain(COMMON) {
        let lines: Vec<Line> = runs.iter().enumerate().filter_map(|(at, run)| line(at, run, name, factor)).collect();
        let title = if name == PER_SECOND { format!("{title}, {}", unit(runs)) } else { title.to_owned() };
        let Some((svg, is_logarithmic)) = plot::svg(&lines, &title, scale)? else { continue };
        let note = if is_logarithmic { " <span>(logarithmic)</span>" } else { "" };
        html += &format!("<figure><figcaption>{}{note}</figcaption>{svg}</figure>\n", escape(&title));
    }
    Ok(html + "</div>\n")
}

/// The unit of the throughput, if the runs agree.
fn unit(runs: &[Run]) -> String {
    let units: BTreeSet<&str> = runs.iter().map(|run| run.metrics.unit.as_str()).collect();
    format!("{}/s", units.into_iter().collect::<Vec<_>>().join(" or "))
}

/// The curve `name` of a run.
fn line(at: usize, run: &Run, name: &str, factor: f64) -> Option<Line> {
    let mut points = run.metrics.curves.get(name)?.points();
    for point in &mut points {
        (point.mean, point.low, point.high) = (point.mean * factor, point.low * factor, point.high * factor);
    }
    (!points.is_empty()).then(|| Line { run: at, mark: mark(at), points })
}

/// The sample images of each run by step.
fn samples(runs: &[Run]) -> String {
    let mut html = String::new();
    for (at, run) in runs.iter().enumerate().filter(|(_, run)| !run.samples.shown.is_empty()) {
        let (shown, total) = (run.samples.shown.len(), run.samples.total);
        let of_all = if shown < total { format!(", {shown} of {total} sample images") } else { String::new() };
        html += &format!("<h3>{} {}{of_all}</h3>\n", mark(at), escape(&run.name));
        if let Some(prompts) = run.setting("sample.prompts").filter(|prompts| *prompts != "[]") {
            html += &format!("<p class=\"soft\">sample.prompts = {}\n", escape(prompts));
        }
        html += "<div class=\"samples\">\n";
        for sample in &run.samples.shown {
            // Small images are enlarged, large ones are not.
            let side = sample.width.clamp(200, 400);
            html += &format!(
                "<figure><figcaption>step {0}</figcaption><img style=\"--side:{side}px\" alt=\"sample of step {0}\" \
                 src=\"{1}\"></figure>\n",
                grouped(sample.step),
                sample.uri
            );
        }
        html += "</div>\n";
    }
    html
}
