//! What a pickle builds.

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
    /// The range of the bytes in the pickle.
    Bytes(Range<usize>),
    /// A tuple, a list or a set.
    List(Vec<At>),
    Dict(Vec<(At, At)>),
    /// A class or function by module and name.
    Global(String, String),
    /// What a call would make, and the state that it is given afterwards.
    Call {
        function: At,
        arguments: At,
        state: Option<At>,
    },
    /// A reference to something outside of the pickle.
    Persistent(At),
}
