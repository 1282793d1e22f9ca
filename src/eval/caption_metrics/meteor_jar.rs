//! The original METEOR, a Java program, with the options that pycocoevalcap uses. It stems Latin words and knows their
//! synonyms and paraphrases, and it reads its paraphrases from the folder `data` beside its jar.

use super::case::{Case, Scores};
use crate::error::{Context, Hint, Result, ensure, failed};
use std::{
    io::{BufRead, BufReader, BufWriter, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

const HINT: &str = "it must be meteor-1.5.jar, with its folder `data` beside it";

/// Scores all images with the METEOR 1.5 in `jar`.
///
/// # Errors
/// There is no Java, or the jar is not METEOR or fails.
pub fn meteor(jar: &Path, cases: &[Case]) -> Result<Scores> {
    let none = || failed(format_args!("there is no file {}", jar.display()), HINT);
    ensure!(jar.is_file(), none());
    let mut process = Process::start(jar)?;
    let scores = process.score(cases);
    // Whether it succeeded or not, the process must not outlive its use; it may already have ended.
    let _ = process.child.kill();
    process.child.wait().ok();
    scores.hint(format_args!("METEOR in {} failed", jar.display()), HINT)
}

struct Process {
    child: Child,
    input: BufWriter<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(jar: &Path) -> Result<Self> {
        // Java reads and writes numbers in the language of the user, and METEOR's parser expects English ones.
        let mut command = Command::new("java");
        command.args(["-Xmx2G", "-Duser.language=en", "-jar"]).arg(jar).args(["-", "-", "-stdio", "-l", "en", "-norm"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child =
            command.spawn().hint("cannot start `java`", "install a Java runtime, or leave out --meteor-jar")?;
        let input = BufWriter::new(child.stdin.take().context("no input for java")?);
        let output = BufReader::new(child.stdout.take().context("no output of java")?);
        Ok(Self { child, input, output })
    }

    /// One line of statistics for each image, then the scores of all of them and their total.
    fn score(&mut self, cases: &[Case]) -> Result<Scores> {
        let mut all = "EVAL".to_owned();
        for case in cases {
            let texts = case.references.iter().chain([&case.caption]).map(|tokens| spaced(tokens));
            self.say(&format!("SCORE ||| {}", texts.collect::<Vec<_>>().join(" ||| ")))?;
            all += &format!(" ||| {}", self.answer()?);
        }
        self.say(&all)?;
        let number = |line: String| line.parse::<f64>().with_context(|| format!("it answered `{line}`, not a number"));
        let images = cases.iter().map(|_| number(self.answer()?)).collect::<Result<_>>()?;
        Ok(Scores { corpus: number(self.answer()?)?, images })
    }

    fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").and_then(|()| self.input.flush()).context("it stopped")
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "it stopped");
        Ok(line.trim().to_owned())
    }
}

/// Tokens with a blank between them, so that METEOR sees each as a word.
fn spaced(tokens: &[char]) -> String {
    tokens.iter().map(char::to_string).collect::<Vec<_>>().join(" ")
}
