//! Text in HTML, and the frame of all pages.

const FRAME: &str = include_str!("page.html");

/// A text as the content of an element or of an attribute in quotes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() && c != '\n' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A whole page; `body` is HTML, `title` is text.
pub fn page(title: &str, body: &str) -> String {
    // The body goes in last: what it says is not looked at again.
    let (before, after) = FRAME.split_once("{body}").unwrap_or((FRAME, ""));
    let title = escape(title);
    [before.replace("{title}", &title).as_str(), body, after].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_cannot_become_markup() {
        assert_eq!(escape("<a href='x' b=\"y\">&\0"), "&lt;a href=&#39;x&#39; b=&quot;y&quot;&gt;&amp;\u{fffd}");
        let page = page("<{body}>", "<p>{title}</p>");
        assert!(page.contains("<title>&lt;{body}&gt;</title>") && page.contains("<p>{title}</p>"), "{page}");
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    }
}
