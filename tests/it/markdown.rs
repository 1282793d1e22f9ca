//! As much of Markdown as the tests of the documentation need: code blocks, code spans, links, anchors.

/// A page, split into code blocks and the text around them.
pub struct Page {
    /// Paragraphs of text, headings among them.
    pub paragraphs: Vec<String>,
    pub blocks: Vec<Block>,
}

/// A fenced code block.
pub struct Block {
    /// What follows the fence: `sh run`.
    pub info: String,
    /// The block's lines; a line that ends in a backslash is joined with the next.
    pub lines: Vec<String>,
}

impl Page {
    pub fn parse(text: &str) -> Self {
        let (mut paragraphs, mut blocks) = (vec![String::new()], Vec::new());
        let mut open: Option<Block> = None;
        for line in text.lines() {
            let fence = line.trim_start().strip_prefix("```").filter(|rest| !rest.starts_with('`'));
            match (&mut open, fence) {
                (None, Some(info)) => open = Some(Block { info: info.trim().to_owned(), lines: Vec::new() }),
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(block), None) => match block.lines.last_mut().filter(|last| last.ends_with('\\')) {
                    Some(last) => *last = format!("{}{}", last.trim_end_matches('\\'), line.trim_start()),
                    None => block.lines.push(line.to_owned()),
                },
                (None, None) if line.trim().is_empty() => paragraphs.push(String::new()),
                (None, None) => {
                    if let Some(last) = paragraphs.last_mut() {
                        last.push_str(line);
                        last.push('\n');
                    }
                }
            }
        }
        assert!(open.is_none(), "a code block does not end");
        Self { paragraphs, blocks }
    }

    /// The contents of all code spans.
    pub fn code_spans(&self) -> Vec<String> {
        self.paragraphs.iter().flat_map(|paragraph| split_code(paragraph).1).collect()
    }

    /// The targets of all links and images.
    pub fn links(&self) -> Vec<String> {
        let target = |rest: &str| rest.split_once(')').map(|(target, _)| target.to_owned());
        let of = |paragraph: &String| {
            let text = split_code(paragraph).0;
            text.split("](").skip(1).filter_map(target).collect::<Vec<_>>()
        };
        self.paragraphs.iter().flat_map(of).collect()
    }

    /// The anchors of the headings, as GitHub makes them.
    pub fn anchors(&self) -> Vec<String> {
        let lines = self.paragraphs.iter().flat_map(|paragraph| paragraph.lines());
        let headings =
            lines.filter_map(|line| line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#')));
        let mut anchors: Vec<String> = Vec::new();
        for slug in headings.map(slug) {
            let again = anchors.iter().filter(|anchor| **anchor == slug).count();
            anchors.push(if again == 0 { slug } else { format!("{slug}-{again}") });
        }
        anchors
    }
}

fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// A paragraph without its code spans, and the contents of these.
fn split_code(text: &str) -> (String, Vec<String>) {
    let (mut plain, mut spans, mut rest) = (String::new(), Vec::new(), text);
    while let Some(start) = rest.find('`') {
        let ticks = rest[start..].chars().take_while(|c| *c == '`').count();
        let (fence, after) = (&rest[start..start + ticks], &rest[start + ticks..]);
        plain.push_str(&rest[..start]);
        // A span ends at as many backticks as it begins with.
        let mut at = 0;
        let end = loop {
            let Some(found) = after[at..].find('`').map(|found| at + found) else { break None };
            let run = after[found..].chars().take_while(|c| *c == '`').count();
            if run == ticks {
                break Some(found);
            }
            at = found + run;
        };
        match end {
            Some(end) => {
                spans.push(after[..end].trim().to_owned());
                rest = &after[end + ticks..];
            }
            None => {
                plain.push_str(fence);
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    (plain, spans)
}

/// The words of a shell command: quotes removed, comments left out, ended by the first `|`, `>`, `;` or `&`.
pub fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, '|' | '>' | ';' | '&') => break,
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[test]
fn pages_are_parsed() {
    let text = "# One `two`, three!\n\nSee [a](b.md#c) and `[no](x)`, `` a`b ``.\n\n```sh run\nvilg a \\\n  -b\n# c\n```\n\n## One two three\n";
    let page = Page::parse(text);
    assert_eq!(page.links(), ["b.md#c"]);
    assert_eq!(page.code_spans(), ["two", "[no](x)", "a`b"]);
    assert_eq!(page.anchors(), ["one-two-three", "one-two-three-1"]);
    assert_eq!(
        (page.blocks[0].info.as_str(), page.blocks[0].lines.as_slice()),
        ("sh run", &["vilg a -b".to_owned(), "# c".to_owned()][..])
    );
    assert_eq!(words("vilg t2i \"a b\" 'c=[\"d\"]' -o x.png  # e"), ["vilg", "t2i", "a b", "c=[\"d\"]", "-o", "x.png"]);
    assert_eq!(words("vilg t2i - -o - > u.png"), ["vilg", "t2i", "-", "-o", "-"]);
}
