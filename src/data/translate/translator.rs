//! Asks a program or a service until every text has an answer or cannot get one.

use super::{
    process::Process,
    protocol::{Answer, Question},
    report::{Cause, Failure},
    service::Service,
};
use crate::{
    data::clean::clean,
    error::{Error, Result, ensure, failed},
};
use std::{thread, time::Duration};

/// Pause after the first failed attempt; each further one doubles it.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Attempts in a row without any answer, beyond the retries, after which the run ends. It is more than the halvings of the
/// largest batch, so that one text on which the translator fails does not end the run.
const FRUITLESS: u32 = 20;

/// Where the translator is.
#[derive(Debug, Clone)]
pub enum Address {
    /// A program with its arguments.
    Command(String),
    /// A URL.
    Url(String),
}

/// A program or a service, used by one thread.
pub struct Translator {
    backend: Backend,
    next_id: u64,
    retries: u32,
    /// Attempts in a row without any answer.
    fruitless: u32,
    /// Whether there was any answer yet.
    has_answered: bool,
}

enum Backend {
    Process(Process),
    Service(Service),
}

/// A translation, or why there is none.
pub type Translated = std::result::Result<String, Failure>;

impl Translator {
    /// A translator that is asked again up to `retries` times, and must answer within `timeout`.
    ///
    /// # Errors
    /// The address is not a command or not a URL.
    pub fn new(address: &Address, retries: u32, timeout: Duration) -> Result<Self> {
        let backend = match address {
            Address::Command(command) => Backend::Process(Process::new(command, timeout)?),
            Address::Url(url) => Backend::Service(Service::new(url, timeout)?),
        };
        Ok(Self { backend, next_id: 0, retries, fruitless: 0, has_answered: false })
    }

    /// Translates texts, in order. Control characters and runs of spaces in a translation become one space.
    ///
    /// # Errors
    /// The translator cannot be used at all, or never answers.
    pub fn translate(&mut self, texts: &[&str]) -> Result<Vec<Translated>> {
        let mut answers = vec![None; texts.len()];
        self.fill(texts, (0..texts.len()).collect(), self.retries, &mut answers)?;
        if let [Some(Err(failure)), _, ..] = answers.as_slice()
            && !self.has_answered
        {
            return Err(no_answer(failure));
        }
        let missing = || Err(Failure::new(Cause::NoAnswer, "no answer"));
        Ok(answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect())
    }

    /// Fills in the answers of the texts `open`. If they have none after all attempts, they are asked in two halves, down to
    /// single texts: one text on which the translator fails does not cost the others their answers.
    fn fill(
        &mut self,
        texts: &[&str],
        mut open: Vec<usize>,
        retries: u32,
        answers: &mut [Option<Translated>],
    ) -> Result<()> {
        for attempt in 0.. {
            let before = open.len();
            let failure = self.attempt(texts, &open, answers)?;
            open.retain(|index| answers.get(*index).is_some_and(Option::is_none));
            let Some(failure) = failure.filter(|_| !open.is_empty()) else {
                (self.fruitless, self.has_answered) = (0, true);
                return Ok(());
            };
            self.has_answered |= open.len() < before;
            self.fruitless = if open.len() < before { 0 } else { self.fruitless + 1 };
            ensure!(self.fruitless <= self.retries + FRUITLESS, no_answer(&failure));
            if attempt >= retries {
                return self.give_up_or_halve(texts, open, &failure, answers);
            }
            thread::sleep(PAUSE.saturating_mul(1 << attempt.min(16)).min(LONGEST_PAUSE));
        }
        Ok(())
    }

    fn give_up_or_halve(
        &mut self,
        texts: &[&str],
        mut open: Vec<usize>,
        failure: &Failure,
        answers: &mut [Option<Translated>],
    ) -> Result<()> {
        if let [index] = open.as_slice() {
            if let Some(answer) = answers.get_mut(*index) {
                *answer = Some(Err(failure.clone()));
            }
            return Ok(());
        }
        let second = open.split_off(open.len() / 2);
        self.fill(texts, open, 0, answers)?;
        self.fill(texts, second, 0, answers)
    }

    /// Asks once. Ids are never used twice, so that a late answer is not taken for that of another text.
    fn attempt(
        &mut self,
        texts: &[&str],
        open: &[usize],
        answers: &mut [Option<Translated>],
    ) -> Result<Option<Failure>> {
        let first = self.next_id;
        self.next_id += open.len() as u64;
        let asked = open.iter().filter_map(|index| texts.get(*index)).zip(first..);
        let questions: Vec<Question<'_>> = asked.map(|(text, id)| Question { id, text }).collect();
        let mut answer = |id: u64, answer: Answer| {
            let index = id.checked_sub(first).and_then(|place| open.get(usize::try_from(place).ok()?));
            if let Some(slot) = index.and_then(|index| answers.get_mut(*index)) {
                *slot = Some(translated(answer));
            }
        };
        match &mut self.backend {
            Backend::Process(process) => process.ask(&questions, &mut answer),
            Backend::Service(service) => service.ask(&questions, &mut answer),
        }
    }
}

fn no_answer(failure: &Failure) -> Error {
    let hint = "try the translator with a line such as {\"id\":1,\"text\":\"a cat\"}; run the command again to resume";
    failed(format_args!("the translator does not answer: {}", failure.message), hint)
}

fn translated(answer: Answer) -> Translated {
    let text = clean(&answer.map_err(|error| Failure::new(Cause::Refused, error))?);
    if text.is_empty() { Err(Failure::new(Cause::Empty, "an empty translation")) } else { Ok(text) }
}
