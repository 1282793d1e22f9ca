//! The HTML of the raters' pages.

use super::{answers::Answers, html, texts};
use crate::eval::human::{
    kind::{Kind, Question},
    summary::Progress,
};

/// What a rating page shows.
pub struct Shown<'a> {
    pub kind: Kind,
    pub title: &'a str,
    pub token: &'a str,
    /// From 1 on.
    pub number: usize,
    pub progress: Progress,
    /// The prompt or question; empty for captions.
    pub prompt: &'a str,
    /// The texts of the outputs, for captions and answers.
    pub texts: Vec<Option<String>>,
    pub answers: &'a Answers,
    /// Whether to say that answers are missing.
    pub incomplete: bool,
}

fn both((zh, en): texts::Both) -> String {
    format!("{} <span class=\"en\" lang=\"en\">{}</span>", html::escape(zh), html::escape(en))
}

fn bar(progress: &Progress) -> String {
    let Progress { rated, pages, .. } = progress;
    let label = both(("已完成", "done"));
    format!(
        "<div class=\"progress\"><span>{label}</span><progress value=\"{rated}\" max=\"{pages}\"></progress>\
         <span id=\"progress\">{rated} / {pages}</span></div>\n"
    )
}

/// A rater's first page, also after a break and at the end.
pub fn overview(kind: Kind, title: &str, token: &str, progress: &Progress, next: Option<usize>) -> String {
    let mut body = format!("<h1>{}</h1>\n{}", html::escape(title), bar(progress));
    let task = texts::task(kind);
    body += &format!("<div class=\"box\"><p>{}</p><p class=\"en\" lang=\"en\">{}</p>\n", task.0, task.1);
    for question in kind.questions() {
        let steps = (question.low..=question.high).map(|value| {
            let (zh, en) = texts::step(kind, question.name, value);
            format!("{value} {zh} <span class=\"en\">{en}</span>")
        });
        let steps = steps.collect::<Vec<_>>().join(" · ");
        body += &format!("<p><strong>{}</strong><br>{steps}</p>\n", both(texts::question(kind, question.name)));
    }
    body += "</div>\n";
    body += &match next {
        Some(page) => {
            let begin = if progress.rated == 0 { ("开始", "Start") } else { ("继续", "Continue") };
            let pause = both((
                "可以随时关闭页面，以后用同一链接继续。",
                "You can close the page at any time and go on later with the same link.",
            ));
            format!(
                "<p>{pause}</p>\n<p class=\"actions\"><a class=\"button\" id=\"next\" href=\"/r/{token}/{page}\">{} {}</a></p>\n",
                begin.0, begin.1
            )
        }
        None => format!(
            "<h2 id=\"finished\">{}</h2>\n<p><a href=\"/r/{token}/1\">{}</a></p>\n",
            both(("全部完成，谢谢！", "All done, thank you!")),
            both(("检查或修改评分", "Check or change your ratings")),
        ),
    };
    html::page(title, &body)
}

/// A page with outputs to rate.
pub fn rating(shown: &Shown) -> String {
    let Shown { kind, title, token, number, progress, prompt, .. } = shown;
    let mut body = bar(progress);
    if *kind == Kind::Images {
        body += &format!("<h1>{}</h1>\n", html::escape(prompt));
    } else {
        body += &format!("<img src=\"/r/{token}/{number}/image\" alt=\"{}\">\n", "图像 image");
    }
    if *kind == Kind::Answers {
        body += &format!("<h1>{}：{}</h1>\n", both(("问题", "Question")), html::escape(prompt));
    }
    if shown.incomplete {
        body += &format!("<p class=\"missing\" id=\"missing\" role=\"alert\">{}</p>\n", both(MISSING));
    }
    body += &format!("<form method=\"post\" action=\"/r/{token}/{number}\">\n<div class=\"outputs\">\n");
    let several = shown.texts.len() > 1;
    for (place, text) in shown.texts.iter().enumerate() {
        body += &output(shown, place, text.as_deref(), several);
    }
    body += "</div>\n<p class=\"actions\">";
    if *number > 1 {
        body += &format!("<a id=\"previous\" href=\"/r/{token}/{}\">{}</a> ", number - 1, both(("上一页", "Previous")));
    }
    body += "<button id=\"send\">提交 Submit</button></p>\n</form>\n";
    html::page(title, &body)
}

const MISSING: texts::Both =
    ("还有问题没有回答，尚未保存。", "Some questions are not answered yet; nothing has been saved.");

fn output(shown: &Shown, place: usize, text: Option<&str>, several: bool) -> String {
    let Shown { kind, token, number, .. } = shown;
    let mut html = "<section class=\"output\">\n".to_owned();
    let letter = char::from(b'A' + u8::try_from(place).unwrap_or_default());
    if several {
        html += &format!("<h2>{letter}</h2>\n");
    }
    html += &match text {
        None => format!("<img src=\"/r/{token}/{number}/{place}\" alt=\"图像 image {letter}\">\n"),
        Some("") => format!("<p class=\"text\">{}</p>\n", both(("（空）", "(empty)"))),
        Some(text) => format!("<p class=\"text\">{}</p>\n", html::escape(text)),
    };
    for question in kind.questions() {
        html += &group(*kind, question, place, shown.answers);
    }
    html + "</section>\n"
}

/// The radio buttons of one question.
fn group(kind: Kind, question: &Question, place: usize, answers: &Answers) -> String {
    let legend = both(texts::question(kind, question.name));
    let mut html = format!("<fieldset><legend>{legend}</legend><div class=\"scale\">\n");
    for value in question.low..=question.high {
        let checked = if answers.get(&(place, question.name)) == Some(&value) { " checked" } else { "" };
        let (zh, en) = texts::step(kind, question.name, value);
        html += &format!(
            "<label><input type=\"radio\" name=\"{place}.{}\" value=\"{value}\" required{checked}> \
             <span class=\"step\">{value}</span> {zh} <small class=\"en\" lang=\"en\">{en}</small></label>\n",
            question.name
        );
    }
    html + "</div></fieldset>\n"
}

/// A page that only says something.
pub fn message(message: texts::Both, more: texts::Both) -> String {
    let body = format!("<div class=\"box\"><h1>{}</h1><p>{}</p></div>\n", both(message), both(more));
    html::page(message.0, &body)
}
