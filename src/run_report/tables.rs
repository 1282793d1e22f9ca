//! Tables of evaluations: one a kind, with a row for each result, and the paper's figures where the metric is the same.

use super::{
    columns::{Column, Format, layout, title},
    evaluation::{Evaluation, Kind},
    html::{Cell, Row, escape, short, table},
    paper,
};
use serde_json::Value;

/// Maximum number of rows of a result of an unknown kind.
const ROWS: usize = 200;
/// The features of the paper's FID, as `vilg eval t2i` names them.
const DM_GAN: &str = "Inception, protocol dm-gan";
/// The class of rows with the paper's figures.
const PAPER: &str = "paper";

/// All tables, as HTML.
pub fn html(evaluations: &[Evaluation]) -> String {
    let mut kinds: Vec<Kind> = evaluations.iter().map(|evaluation| evaluation.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let of_kind = |kind| evaluations.iter().filter(|evaluation| evaluation.kind == kind).collect::<Vec<_>>();
    kinds.into_iter().map(|kind| of_one_kind(kind, &of_kind(kind))).collect()
}

fn of_one_kind(kind: Kind, all: &[&Evaluation]) -> String {
    let (title, note) = title(kind);
    let tables: String = match kind {
        Kind::Ablation => all.iter().map(|evaluation| ablation(evaluation)).collect(),
        Kind::Other => all.iter().map(|evaluation| other(evaluation)).collect(),
        _ => results(kind, all),
    };
    format!("<h3>{title}</h3>\n<p class=\"soft\">{note}</p>\n{tables}")
}

fn results(kind: Kind, all: &[&Evaluation]) -> String {
    let mut columns = layout(kind, all);
    // Only what was measured at least once.
    let has =
        |at: &str| all.iter().any(|evaluation| evaluation.values.pointer(at).is_some_and(|value| !value.is_null()));
    columns.retain(|(_, at, _)| has(at));
    let mut rows: Vec<Row> = all
        .iter()
        .map(|evaluation| {
            let cells = columns.iter().map(|(_, at, format)| cell(evaluation.values.pointer(at), *format));
            Row { cells: std::iter::once(Cell::Text(evaluation.file.clone())).chain(cells).collect(), class: "" }
        })
        .collect();
    rows.extend(paper_rows(kind, all, &columns));
    let header: Vec<String> =
        std::iter::once("file".to_owned()).chain(columns.into_iter().map(|(name, ..)| name)).collect();
    table(&header, &rows)
}

/// The paper's results, where at least one of ours is the same metric.
fn paper_rows(kind: Kind, all: &[&Evaluation], columns: &[Column]) -> Vec<Row> {
    let is =
        |at: &str, wanted: &str| all.iter().any(|evaluation| evaluation.values.pointer(at) == Some(&wanted.into()));
    let (results, fixed): (&[paper::Result], _) = match kind {
        Kind::TextToImage if is("/settings/features", DM_GAN) => (&paper::FID, ("features", DM_GAN)),
        Kind::Fid if is("/protocol", "dm-gan") => (&paper::FID, ("protocol", "dm-gan")),
        Kind::Caption if is("/tokens", "characters") => (&paper::CAPTIONS, ("", "")),
        _ => return Vec::new(),
    };
    let row = |result: &paper::Result| {
        let figure = |(name, ..): &Column| match result.figures.iter().find(|(metric, _)| metric == name) {
            Some((_, value)) => Cell::number(*value, 1),
            None if name == fixed.0 => Cell::Text(fixed.1.to_owned()),
            None => Cell::Missing,
        };
        let name = Cell::Text(format!("paper: {}", result.of));
        Row { cells: std::iter::once(name).chain(columns.iter().map(figure)).collect(), class: PAPER }
    };
    results.iter().map(row).collect()
}

/// A value of the JSON as a cell.
fn cell(value: Option<&Value>, format: Format) -> Cell {
    let value = value.unwrap_or(&Value::Null);
    let rate = match format {
        Format::Rate => value.get("rate"),
        _ => None,
    };
    let number = rate.unwrap_or(value).as_f64();
    match (format, number) {
        _ if value.is_null() => Cell::Missing,
        (Format::Text, _) | (_, None) => Cell::Text(text(value)),
        (Format::Number(digits), Some(number)) => {
            Cell::Number { shown: format!("{number:.digits$}"), exact: text(value) }
        }
        (Format::Share, Some(number)) => Cell::Number { shown: format!("{:.1} %", 100.0 * number), exact: text(value) },
        (Format::Hundredfold, Some(number)) => {
            Cell::Number { shown: format!("{:.1}", 100.0 * number), exact: text(value) }
        }
        (Format::Rate, Some(number)) => {
            let part = |at: &str| value.pointer(at).and_then(Value::as_f64);
            let mut shown = format!("{:.1} %", 100.0 * number);
            if let (Some(hits), Some(of)) = (part("/hits"), part("/of")) {
                shown += &format!(" ({hits} of {of}");
                if let (Some(low), Some(high)) = (part("/interval/0"), part("/interval/1")) {
                    shown += &format!("; {:.1} to {:.1}", 100.0 * low, 100.0 * high);
                }
                shown.push(')');
            }
            Cell::Number { shown, exact: rate.map(text).unwrap_or_default() }
        }
    }
}

/// A value as text: strings without quotes, lists with commas.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().take(ROWS).map(text).collect::<Vec<_>>().join(", "),
        Value::Null => "–".to_owned(),
        value => value.to_string(),
    }
}

/// The rows of an ablation, beside the paper's.
fn ablation(evaluation: &Evaluation) -> String {
    let values = &evaluation.values;
    let features = text(&values["settings"]["features"]);
    let is_fid = features.starts_with("Inception");
    let measured = values["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    let with_interval = |row: &Value, at: &str, interval: &str| match row[at].as_f64() {
        Some(number) => {
            let bounds = |at: usize| row[interval][at].as_f64();
            let mut shown = short(number);
            if let (Some(low), Some(high)) = (bounds(0), bounds(1)) {
                shown += &format!(" ({} to {})", short(low), short(high));
            }
            Cell::Number { shown, exact: row[at].to_string() }
        }
        None => Cell::Missing,
    };
    let row = |row: &Value| {
        let (codes, reconstructor) = (text(&row["codes"]), text(&row["reconstructor"]));
        let figure = paper::ablation(&codes, &reconstructor).map_or(Cell::Missing, |fid| Cell::number(fid, 1));
        let mut cells = vec![
            Cell::Text(codes),
            Cell::Text(reconstructor),
            with_interval(row, "mean", "interval"),
            with_interval(row, "difference", "difference_interval"),
        ];
        cells.extend(is_fid.then_some(figure));
        Row { cells, class: "" }
    };
    let mut header = ["codes", "reconstructor", "distance", "difference from two-stage"].map(str::to_owned).to_vec();
    header.extend(is_fid.then(|| "paper, FID".to_owned()));
    let rows: Vec<Row> = measured.iter().take(ROWS).map(row).collect();
    let about = escape(&format!("{}: features of {features}", evaluation.file));
    format!("<p>{about}</p>\n{}", table(&header, &rows))
}

/// All values of a result of another kind by their path.
fn other(evaluation: &Evaluation) -> String {
    let (mut rows, mut left_out) = (Vec::new(), 0_usize);
    flatten("", &evaluation.values, &mut rows, &mut left_out);
    let more = if left_out > 0 { format!("<p class=\"soft\">and {left_out} more values</p>\n") } else { String::new() };
    let header = ["value".to_owned(), evaluation.file.clone()];
    format!("{}{more}", table(&header, &rows))
}

/// Adds the values below `path` while there are few rows; counts the others.
fn flatten(path: &str, value: &Value, rows: &mut Vec<Row>, left_out: &mut usize) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(object) => object.iter().for_each(|(name, value)| flatten(&below(name), value, rows, left_out)),
        Value::Array(values) if values.iter().any(|value| value.is_object() || value.is_array()) => {
            values.iter().enumerate().for_each(|(i, value)| flatten(&below(&i.to_string()), value, rows, left_out));
        }
        _ if rows.len() >= ROWS => *left_out += 1,
        value => {
            let cell = match value.as_f64() {
                Some(number) => Cell::Number { shown: short(number), exact: value.to_string() },
                None => Cell::Text(text(value)),
            };
            rows.push(Row { cells: vec![Cell::Text(path.to_owned()), cell], class: "" });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shown(kind: Kind, values: &[Value]) -> String {
        let evaluation = |values: &Value| Evaluation { file: "e.json".into(), kind, values: values.clone() };
        html(&values.iter().map(evaluation).collect::<Vec<_>>())
    }

    #[test]
    fn numbers_are_those_of_the_json_and_the_paper_s_are_beside_the_same_metric() {
        let fid = |protocol: &str| {
            json!({ "a": "out", "b": "coco.npz", "protocol": protocol, "images": [30000, null], "fid": 12.345_678_901,
                "kid": { "mean": 0.001_234_56 } })
        };
        let html = shown(Kind::Fid, &[fid("dm-gan")]);
        assert!(html.contains("<data value=\"12.345678901\">12.35</data>"), "{html}");
        assert!(html.contains("<data value=\"0.00123456\">0.00123</data>") && !html.contains("recall"), "{html}");
        for figure in [14.7, 7.9, 27.5, 27.1] {
            assert!(html.contains(&format!("<data value=\"{figure}\">{figure}</data>")), "{figure}: {html}");
        }
        assert!(!shown(Kind::Fid, &[fid("pytorch-fid")]).contains("14.7"), "another protocol");
    }

    #[test]
    fn images_of_many_captions_are_beside_the_paper_s_only_with_its_features() {
        let of = |features: &str| {
            json!({ "settings": { "features": features, "best_of": 60 },
                "scores": { "images": 30000, "distance": 12.345, "clip_score": { "mean": 31.25 } } })
        };
        let html = shown(Kind::TextToImage, &[of("Inception, protocol dm-gan")]);
        assert!(
            html.contains(">FID<") && html.contains(">14.7</data>") && html.contains("<data value=\"31.25\">"),
            "{html}"
        );
        let html = shown(Kind::TextToImage, &[of("matcher 1")]);
        assert!(html.contains(">distance<") && !html.contains("14.7"), "{html}");
    }

    #[test]
    fn captions_are_times_100_beside_both_data_sets_of_the_paper() {
        let values =
            json!({ "data": "x", "images": 7, "tokens": "characters", "metrics": { "Bleu_4": 0.4321, "CIDEr": 1.5 } });
        let html = shown(Kind::Caption, &[values]);
        assert!(html.contains("<data value=\"0.4321\">43.2</data>") && html.contains(">150.0<"), "{html}");
        for figure in ["68.2", "231.4", "50.0", "138.2"] {
            assert!(html.contains(&format!(">{figure}</data>")), "{figure}: {html}");
        }
        assert!(!html.contains("41.7"), "METEOR was not measured: {html}");
    }

    #[test]
    fn rates_have_counts_and_intervals() {
        let rate = json!({ "hits": 182, "of": 200, "rate": 0.91, "interval": [0.862, 0.942] });
        let html = shown(Kind::Naming, &[json!({ "data": "x", "accuracy": rate })]);
        assert!(html.contains("<data value=\"0.91\">91.0 % (182 of 200; 86.2 to 94.2)</data>"), "{html}");
    }

    #[test]
    fn the_ablation_has_the_paper_s_fid_only_beside_features_of_inception() {
        let rows = json!([{ "codes": "gold", "reconstructor": "end-to-end", "mean": 0.25, "interval": [0.2, 0.3], "difference": -0.1 }]);
        let of = |features: &str| json!({ "settings": { "features": features }, "rows": rows });
        let html = shown(Kind::Ablation, &[of("Inception (FID)")]);
        assert!(
            html.contains(">18.6</data>") && html.contains("<data value=\"0.25\">0.25 (0.2 to 0.3)</data>"),
            "{html}"
        );
        assert!(!shown(Kind::Ablation, &[of("matcher 1")]).contains("18.6"));
    }

    #[test]
    fn other_results_and_hostile_ones_are_shown_as_text() {
        let html = shown(Kind::Other, &[json!({ "a": { "<b>": [1.5, "x"], "c": [{ "d": 0.25 }] } })]);
        assert!(
            html.contains("a.&lt;b&gt;<td>1.5, x") && html.contains("a.c.0.d") && html.contains(">0.25<"),
            "{html}"
        );
        let html = shown(Kind::Fid, &[json!({ "fid": "<i>", "protocol": 3, "images": { "a": [] }, "kid": 7 })]);
        assert!(html.contains("&lt;i&gt;") && !html.contains("<i>"), "{html}");
        let many: Vec<Value> = (0..ROWS + 5).map(|i| json!({ "x": i })).collect();
        assert!(shown(Kind::Other, &[json!({ "all": many })]).contains("and 5 more values"));
    }
}
