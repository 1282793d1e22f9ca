//! Reads Python's pickle format as data, without running code.
//!
//! A pickle is a program for a stack machine that may call any Python function. Here calls are only recorded, and
//! refused unless they belong to the few that build tensors and arrays. All objects are in one list and refer to each
//! other by index, so that depth and cycles are harmless; [`machine::BUDGET`] bounds their memory.

use crate::error::Result;

mod machine;
mod object;

pub use object::{At, Object};

/// The objects of a pickle.
pub struct Pickle {
    objects: Vec<Object>,
    root: At,
}

impl Pickle {
    /// Reads the pickle at the start of `bytes`; returns it and its length in bytes.
    ///
    /// # Errors
    /// The pickle is damaged, has an unknown protocol, or calls a function that checkpoints do not need.
    pub fn read(bytes: &[u8]) -> Result<(Self, usize)> {
        let (objects, root, length) = machine::run(bytes)?;
        Ok((Self { objects, root }, length))
    }

    /// The object that was pickled.
    pub fn root(&self) -> At {
        self.root
    }

    /// All objects, including unused ones.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter()
    }

    /// The object at a place.
    pub fn get(&self, at: At) -> &Object {
        &self.objects[at.0]
    }

    /// The text at a place; `None` if there is another kind of object.
    pub fn text(&self, at: At) -> Option<&str> {
        match self.get(at) {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The elements of the list at a place; `None` if there is another kind of object.
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

    /// The number at a place, not negative; `None` if there is another kind of object.
    pub fn size(&self, at: At) -> Option<usize> {
        match self.get(at) {
            Object::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        }
    }

    /// Function name and arguments of a call.
    pub fn call(&self, at: At) -> Option<(&str, &[At])> {
        let Object::Call { function, arguments, .. } = self.get(at) else { return None };
        let Object::Global(_, name) = self.get(*function) else { return None };
        Some((name, self.list(*arguments)?))
    }

    /// The entries of a dictionary or ordered dictionary.
    pub fn dict(&self, at: At) -> Option<&[(At, At)]> {
        match self.get(at) {
            Object::Dict(entries) => Some(entries),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
