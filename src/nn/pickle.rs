//! Python's pickle format as data: builds what a checkpoint holds and never runs any of it.
//!
//! A pickle is a program for a stack machine that may call any function of Python. Here a call is only noted, and refused
//! unless it is one of the few that put tensors and arrays together. All objects are in one list and refer to each other
//! by index, so that neither depth nor cycles do harm; [`machine::BUDGET`] bounds the memory that they take together.

use crate::error::Result;

mod machine;
mod object;

pub use object::{At, Object};

/// A pickle's objects.
pub struct Pickle {
    objects: Vec<Object>,
    root: At,
}

impl Pickle {
    /// Reads the pickle at the beginning of `bytes`; returns it and its length.
    ///
    /// # Errors
    /// It is damaged, of an unknown kind, or calls a function that does not belong into a checkpoint.
    pub fn read(bytes: &[u8]) -> Result<(Self, usize)> {
        let (objects, root, length) = machine::run(bytes)?;
        Ok((Self { objects, root }, length))
    }

    /// What the pickle is of.
    pub fn root(&self) -> At {
        self.root
    }

    /// All objects, also those that nothing refers to.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter()
    }

    pub fn get(&self, at: At) -> &Object {
        &self.objects[at.0]
    }

    pub fn text(&self, at: At) -> Option<&str> {
        match self.get(at) {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn list(&self, at: At) -> Option<&[At]> {
        match self.get(at) {
            Object::List(list) => Some(list),
            _ => None,
        }
    }

    /// A list of sizes.
    pub fn sizes(&self, at: At) -> Option<Vec<usize>> {
        self.list(at)?.iter().map(|&size| self.size(size)).collect()
    }

    pub fn size(&self, at: At) -> Option<usize> {
        match self.get(at) {
            Object::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        }
    }

    /// The function's name and the arguments of a call.
    pub fn call(&self, at: At) -> Option<(&str, &[At])> {
        let Object::Call { function, arguments, .. } = self.get(at) else { return None };
        let Object::Global(_, name) = self.get(*function) else { return None };
        Some((name, self.list(*arguments)?))
    }

    /// The entries of a dictionary, ordered or not.
    pub fn dict(&self, at: At) -> Option<&[(At, At)]> {
        match self.get(at) {
            Object::Dict(entries) => Some(entries),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
