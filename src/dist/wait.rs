//! How a rank waits for messages of other processes.

use crate::error::Error;
use std::{thread, time::Duration};

/// How long a rank sleeps between two looks, once it no longer keeps its core.
const NAP: Duration = Duration::from_micros(100);

/// Why an exchange failed.
pub enum Lost {
    /// These ranks did not come in time.
    Late(Vec<usize>),
    /// The processes of these ranks are gone.
    Gone(Vec<usize>),
}

/// How to wait for messages.
pub struct Wait<'e> {
    /// This rank's own error, told instead of who is missing.
    pub own: Option<&'e Error>,
    pub patience: Duration,
    /// For how long to keep the core.
    pub eager: Duration,
}

impl Wait<'_> {
    /// A pause after having waited for `waited`: other ranks may need the core.
    pub fn rest(&self, waited: Duration) {
        if waited < self.eager { thread::yield_now() } else { thread::sleep(NAP) }
    }
}
