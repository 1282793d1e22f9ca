//! Servers over HTTP: the model's ([`api`]) and that of human evaluation ([`human`]).
//!
//! `listen` accepts connections, `patient` limits the time of slow clients, `secure` has the headers of all responses, and
//! `signals` ends a server.

pub mod api;
pub mod human;
mod listen;
mod patient;
mod secure;
mod signals;
