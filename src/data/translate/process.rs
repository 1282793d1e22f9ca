//! A program that translates: started once, JSON lines on its stdin and from its stdout.

use super::{
    protocol::{self, Answer, MAX_LINE, Question},
    report::{Cause, Failure},
};
use crate::{
    error::{Hint, Result, usage},
    report,
};
use std::{
    collections::HashSet,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

/// Answers that are read ahead.
const AHEAD: usize = 1024;
/// Bytes of the program's messages that an error shows.
const MESSAGES: usize = 1000;
/// Time that a program has to end after the end of its input.
const END: Duration = Duration::from_secs(2);
/// Time between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(10);

/// A program with its arguments, started when it is needed.
pub struct Process {
    words: Vec<String>,
    timeout: Duration,
    running: Option<Running>,
}

/// The started program. Threads read and write its pipes, so that neither side waits for the other.
struct Running {
    child: Child,
    input: Sender<Vec<u8>>,
    lines: Receiver<Vec<u8>>,
    messages: Arc<Mutex<String>>,
    /// Disconnected at the end of its messages.
    messages_end: Receiver<()>,
}

impl Process {
    /// `command` is a program and its arguments, separated by spaces; `'…'` and `"…"` quote.
    ///
    /// # Errors
    /// There is no program, or a quote is not closed.
    pub fn new(command: &str, timeout: Duration) -> Result<Self> {
        let hint = "name a program and its arguments, such as --command 'python3 translate.py'";
        let words = words(command).filter(|words| !words.is_empty());
        let words = words.ok_or_else(|| usage(format_args!("--command `{command}` is not a command"), hint))?;
        Ok(Self { words, timeout, running: None })
    }

    /// Sends questions and passes on the answers; `None` if all have one.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn ask(&mut self, questions: &[Question<'_>], answer: &mut dyn FnMut(u64, Answer)) -> Result<Option<Failure>> {
        if self.running.is_none() {
            self.running = Some(self.start()?);
        }
        let Some(running) = &mut self.running else { return Ok(None) };
        // If it has ended, its lines end too.
        let _ = running.input.send(protocol::lines(questions)?);
        let mut open: HashSet<u64> = questions.iter().map(|question| question.id).collect();
        let mut deadline = Instant::now() + self.timeout;
        while !open.is_empty() {
            let failure = match running.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => match protocol::parse(&line) {
                    // Second answers, and answers to what nobody asked, are not used.
                    Some((id, text)) => {
                        if open.remove(&id) {
                            answer(id, text);
                            deadline = Instant::now() + self.timeout;
                        }
                        continue;
                    }
                    None => (Cause::BadAnswer, format!("the command printed {}", protocol::shown(&line))),
                },
                Err(RecvTimeoutError::Timeout) => {
                    (Cause::Timeout, format!("the command gave no answer in {} s", self.timeout.as_secs_f64()))
                }
                Err(RecvTimeoutError::Disconnected) => (Cause::Exited, "the command closed its stdout".into()),
            };
            return Ok(Some(self.stop(failure)));
        }
        Ok(None)
    }

    fn start(&self) -> Result<Running> {
        let (program, arguments) = self.words.split_first().hint("--command is empty", "name a program")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let hint = "is it installed, on PATH, and executable? For pipes: --command \"sh -c '…'\"";
        let mut child = command.spawn().hint(format_args!("cannot start `{program}`"), hint)?;
        let (input, to_write) = mpsc::channel();
        let (read, lines) = mpsc::sync_channel(AHEAD);
        let (end, messages_end) = mpsc::channel();
        let messages = Arc::new(Mutex::new(String::new()));
        if let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        {
            let last = Arc::clone(&messages);
            thread::spawn(move || write_all(stdin, to_write));
            thread::spawn(move || read_lines(stdout, &read));
            thread::spawn(move || read_messages(stderr, &last, end));
        }
        Ok(Running { child, input, lines, messages, messages_end })
    }

    /// Ends the program and describes the failure with its exit status and its last messages.
    fn stop(&mut self, (cause, what): (Cause, String)) -> Failure {
        let Some(mut running) = self.running.take() else { return Failure::new(cause, what) };
        // A program whose stdout ended is about to end.
        let grace = if cause == Cause::Exited { END } else { Duration::ZERO };
        let ended = match (end(&mut running.child, grace), cause) {
            (Some(status), Cause::Exited) => format!("the command ended ({status})"),
            _ => what,
        };
        let _ = running.messages_end.recv_timeout(END);
        let messages = running.messages.lock().unwrap_or_else(PoisonError::into_inner);
        match messages.trim() {
            "" => Failure::new(cause, ended),
            messages => Failure::new(cause, format!("{ended}; its last messages: {messages}")),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(Running { mut child, input, .. }) = self.running.take() else { return };
        // Without a sender, the writing thread closes the program's stdin.
        drop(input);
        end(&mut child, END);
    }
}

/// Waits for the end of a program, and kills it after `grace`. Its exit status, if it ended by itself.
fn end(child: &mut Child, grace: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + grace;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            // It may have ended in the meantime.
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(POLL);
    }
}

fn write_all(mut stdin: ChildStdin, to_write: Receiver<Vec<u8>>) {
    while let Ok(bytes) = to_write.recv() {
        if stdin.write_all(&bytes).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: ChildStdout, lines: &SyncSender<Vec<u8>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        match stdout.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.trim_ascii().is_empty() => {}
            Ok(_) if lines.send(line.trim_ascii_end().to_vec()).is_err() => return,
            Ok(_) => {}
        }
    }
}

fn read_messages(stderr: ChildStderr, last: &Mutex<String>, _end: Sender<()>) {
    let mut stderr = BufReader::new(stderr);
    loop {
        let mut line = Vec::new();
        match stderr.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let line = String::from_utf8_lossy(&line);
                report::detail(format_args!("translator: {}", line.trim_end()));
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                last.push_str(&line);
                let start = last.len().saturating_sub(MESSAGES);
                let start = (start..=last.len()).find(|at| last.is_char_boundary(*at)).unwrap_or(0);
                last.drain(..start);
            }
        }
    }
}

/// The words of a command; `None` if a quote is not closed.
fn words(command: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in command.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_split_at_spaces_outside_of_quotes() {
        let of = |text: &str| words(text).unwrap();
        assert_eq!(of(" python3  translate.py -n 4 "), ["python3", "translate.py", "-n", "4"]);
        assert_eq!(of("sh -c 'a | b' \"it's\" ''"), ["sh", "-c", "a | b", "it's", ""]);
        assert_eq!(of("a'b c'd"), ["ab cd"]);
        assert!(of(" ").is_empty() && words("a 'b").is_none());
        assert!(Process::new("", END).is_err() && Process::new("'", END).is_err());
    }
}
