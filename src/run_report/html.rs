//! Pieces of HTML. Everything that comes from a file or the command line passes [`escape`].

use crate::report;

/// How a page begins; files that begin otherwise are not replaced.
pub const PAGE_START: &str = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"generator\" content=\"vilg report\">";

/// Maximum number of characters of a text from a file.
const LONGEST: usize = 600;

/// Escapes a text for HTML, in elements and in quoted attributes. Control characters become visible, and the end of a long
/// text is left out.
pub fn escape(text: &str) -> String {
    let short = match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    };
    let mut escaped = String::with_capacity(short.len());
    for c in report::escape_controls(&short).chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            c => escaped.push(c),
        }
    }
    escaped
}

/// A cell of a table.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    Text(String),
    /// A number as it is shown, with the exact value of the file in the page's source.
    Number {
        shown: String,
        exact: String,
    },
    Missing,
}

impl Cell {
    /// A number with `digits` decimals.
    pub fn number(value: f64, digits: usize) -> Self {
        Self::Number { shown: format!("{value:.digits$}"), exact: value.to_string() }
    }

    fn html(&self) -> String {
        match self {
            Self::Text(text) => format!("<td>{}", escape(text)),
            Self::Number { shown, exact } => {
                format!("<td class=\"number\"><data value=\"{}\">{}</data>", escape(exact), escape(shown))
            }
            Self::Missing => "<td class=\"number\">–".to_owned(),
        }
    }
}

/// A row of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub cells: Vec<Cell>,
    /// How it is set apart: figures of the paper, keys that differ between runs.
    pub class: &'static str,
}

/// A table with a header line.
pub fn table(header: &[String], rows: &[Row]) -> String {
    let head: String = header.iter().map(|name| format!("<th scope=\"col\">{}", escape(name))).collect();
    let body: String = rows
        .iter()
        .map(|row| {
            let class = if row.class.is_empty() { String::new() } else { format!(" class=\"{}\"", row.class) };
            format!("<tr{class}>{}\n", row.cells.iter().map(Cell::html).collect::<String>())
        })
        .collect();
    format!("<div class=\"table\"><table><thead><tr>{head}</thead><tbody>\n{body}</tbody></table></div>\n")
}

/// What stands for a run in plots and tables: `A`, `B`, ….
pub fn mark(run: usize) -> String {
    char::from(b'A' + (run % 26) as u8).to_string()
}

/// A whole number with thousands separators: `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Four significant digits, or fewer: `0.00045`, `12.35`, `1.5e-7`, `2,503,110`.
pub fn short(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if value == 0.0 => "0".to_owned(),
        _ if !(1e-4..1e15).contains(&size) => format!("{value:.3e}"),
        _ if size >= 1000.0 => {
            format!("{}{}", if value < 0.0 { "-" } else { "" }, grouped(size.round() as u64))
        }
        _ => {
            let digits = (3 - size.log10().floor() as i32).max(0) as usize;
            let text = format!("{value:.digits$}");
            if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
        }
    }
}

/// The style of the page: light, dark and printed.
pub const STYLE: &str = include_str!("style.css");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_quotes_and_control_characters_are_escaped() {
        assert_eq!(
            escape("<script>alert('1')</script> & \"月\"\u{1b}[2J\u{202e}"),
            "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;月&quot;\\u{1b}[2J\\u{202e}"
        );
        assert_eq!(escape(&"字".repeat(LONGEST)), "字".repeat(LONGEST));
        assert_eq!(escape(&"字".repeat(LONGEST + 1)), "字".repeat(LONGEST) + "…");
    }

    #[test]
    fn cells_of_tables_are_escaped_and_keep_exact_numbers() {
        let row =
            Row { cells: vec![Cell::Text("<b>".into()), Cell::number(0.123_456_789, 2), Cell::Missing], class: "" };
        let html = table(&["a&b".into()], &[row]);
        assert!(html.contains("<th scope=\"col\">a&amp;b<") && html.contains("<td>&lt;b&gt;<td"), "{html}");
        assert!(html.contains("<data value=\"0.123456789\">0.12</data>") && html.contains("–"), "{html}");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.00045, "0.00045"),
            (12.3456, "12.35"),
            (1.5e-7, "1.500e-7"),
            (2_503_110.4, "2,503,110"),
            (-1234.0, "-1,234"),
            (7.0, "7"),
            (100.0, "100"),
            (1e300, "1.000e300"),
        ] {
            assert_eq!(short(value), text);
        }
        assert_eq!([grouped(0), grouped(999), grouped(1000), grouped(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
    }
}
