//! The objects of a pickle.

use std::ops::Range;

/// The index of an object in its [`Pickle`](super::Pickle).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At(pub(super) usize);

/// An object.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    /// Bytes, as a range of the pickle.
    Bytes(Range<usize>),
    /// A tuple, a list or a set.
    List(Vec<At>),
    Dict(Vec<(At, At)>),
    /// A class or function by module and name.
    Global(String, String),
    /// The result of a call, with the state set afterwards.
    Call {
        function: At,
        arguments: At,
        state: Option<At>,
    },
    /// A reference to data outside of the pickle.
    Persistent(At),
}
