//! Local servers.

pub mod human;
