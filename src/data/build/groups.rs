//! Collects values by id, in the order in which the ids first occur.

use std::collections::HashMap;

#[derive(Debug)]
pub struct Groups<T> {
    groups: Vec<(String, Vec<T>)>,
    index: HashMap<String, usize>,
}

impl<T> Default for Groups<T> {
    fn default() -> Self {
        Self { groups: Vec::new(), index: HashMap::new() }
    }
}

impl<T> Groups<T> {
    pub fn add(&mut self, id: &str, value: T) {
        let index = self.index.get(id).copied().unwrap_or_else(|| {
            self.index.insert(id.to_owned(), self.groups.len());
            self.groups.push((id.to_owned(), Vec::new()));
            self.groups.len() - 1
        });
        if let Some((_, values)) = self.groups.get_mut(index) {
            values.push(value);
        }
    }

    /// Takes the values of an id; `None` if there are none or they were taken before.
    pub fn take(&mut self, id: &str) -> Option<Vec<T>> {
        let index = self.index.remove(id)?;
        self.groups.get_mut(index).map(|(_, values)| std::mem::take(values))
    }

    /// The ids that were not taken, with their values.
    pub fn rest(self) -> impl Iterator<Item = (String, Vec<T>)> {
        let Self { groups, index } = self;
        groups.into_iter().filter(move |(id, _)| index.contains_key(id))
    }
}
