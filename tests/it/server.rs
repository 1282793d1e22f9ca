//! A server of the program, on a port that it chose itself.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
};

/// A running server; ended when dropped.
pub struct Running(Child);

impl Running {
    /// Starts a command; also returns the line that it prints when it is ready.
    pub fn start(command: &mut Command) -> (Self, String) {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut server, mut line) = (Self(child), String::new());
        BufReader::new(server.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            panic!("{:?}", server.end());
        }
        (server, line)
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal, such as `-TERM`.
    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.id().to_string()]).status().unwrap().success());
    }

    /// Waits for its end: the exit code and what was said.
    pub fn end(mut self) -> (Option<i32>, String) {
        let status = self.0.wait().unwrap();
        let mut said = String::new();
        self.0.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        (status.code(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop((self.0.kill(), self.0.wait()));
    }
}
